"""Bindings of a loss's parameters to the roles of a signature, by name or as stated."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch_klloss.auditing.experiment.names import (
    BY_NAMES,
    log_prob_words,
    moment_of,
    standing_of,
    words_of,
    words_of_kind,
)
from torch_klloss.auditing.experiment.signatures import SIGNATURES, Leaves, Signature

OTHER_FAMILIES = ("independent", "multivariate", "categorical", "bernoulli")
"""The signatures to try with a loss of (q, p) that does not take Normals."""


class SignatureError(ValueError):
    """Raised where the names of a loss's parameters determine no signature."""


@dataclass(frozen=True)
class Binding:
    """A signature, and which of its roles each positional parameter of a loss has.

    Attributes:
        signature: the signature.
        order: the role of each parameter.
        names: of the parameters.
        note: what was assumed of q and p, in words; empty where the names say it.
    """

    signature: Signature
    order: tuple[int, ...]
    names: tuple[str, ...]
    note: str = ""

    @property
    def right(self) -> str:
        """A right loss in the loss's own parameters, as an expression."""
        own = {self.signature.roles[role]: name for role, name in zip(self.order, self.names, strict=False)}
        return re.sub(r"(?<![.\w])[a-z]\w*\b(?!=)", lambda word: own.get(word[0], word[0]), self.signature.right)

    def by_role(self, arguments: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return what the parameters are given, by role."""
        return {self.signature.roles[role]: part for role, part in zip(self.order, arguments, strict=True)}

    def arguments(self, leaves: Leaves) -> tuple[Any, ...]:
        """Return one probe's arguments in the order of the parameters."""
        by_role = self.signature.arguments(leaves)
        return tuple(by_role[index] for index in self.order)


def adapted(adapter: Callable[..., Any], fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the loss of (q, p) that calls `adapter(fn, q, p)`."""
    return lambda q, p: adapter(fn, q, p)


def bindings_to_try(fn: Callable[..., Any], signature: str) -> list[Binding]:
    """Return the bindings to try, best first: of the stated signature, or determined from the parameters' names.

    Raises:
        ValueError: if `signature` is unknown.
        SignatureError: if `signature` is "auto" and the names determine none.
    """
    if signature != "auto" and signature not in SIGNATURES:
        raise ValueError(
            f"signature must be 'auto', one of {', '.join(map(repr, SIGNATURES))}, or a function "
            f"adapter(fn, q, p) that calls the loss, got {signature!r}."
        )
    names = _parameter_names(fn)
    if signature != "auto":
        of_one = _OF_ONE_TENSOR.get(signature, signature) if len(names) == 1 else signature
        chosen = SIGNATURES[of_one]
        by_name = [
            one
            for one in (*_of_policies(names), *_of_four_tensors(names), *_of_tokens(names))
            if one.signature is chosen
        ]
        order = _order(chosen, names) or (by_name[0].order if by_name else tuple(range(len(chosen.roles))))
        bindings = [Binding(chosen, order, names or chosen.roles)]
    else:
        bindings = _bindings_by_name(names, fn)
    if bindings[0].signature is SIGNATURES["distributions"]:
        bindings += [replace(one, signature=SIGNATURES[other]) for other in OTHER_FAMILIES for one in bindings]
    return bindings


def _bindings_by_name(names: tuple[str, ...], fn: Callable[..., Any]) -> list[Binding]:
    found = [
        Binding(SIGNATURES[name], order, names)
        for name in BY_NAMES
        if (order := _order(SIGNATURES[name], names)) is not None
    ]
    found = found or _by_words(names)
    if not found:
        raise SignatureError(
            f"the parameters ({', '.join(names)}) determine no signature: pass signature=, one of "
            f"{', '.join(map(repr, SIGNATURES))}, or a function adapter(fn, q, p) that calls it."
        )
    first = found[0].signature.name
    if first == "kl_div" and _says_log_target(fn):
        return [Binding(SIGNATURES["kl_div_log_target"], found[0].order, names)]
    if first == "distributions" and tuple(map(str.lower, names)) == ("p", "q"):
        return [found[0], Binding(SIGNATURES["distributions"], (1, 0), names)]  # KL(p‖q) as in torch, else KL(q‖p)
    return found if found[0].note or {one.signature.name for one in found} <= _BOTH_OF_RHO else found[:1]


# Of a loss of one tensor p is the uniform law.
_OF_ONE_TENSOR = {"logits": "uniform_logits", "categorical": "uniform_logits", "log_probs": "uniform_log_probs"}
_BOTH_OF_RHO = frozenset({"mean_logstd", "mean_rho"})  # rho is a logarithm to some, and what softplus takes to others


def _by_words(names: tuple[str, ...]) -> list[Binding]:
    """Return the bindings that the words within the names determine."""
    return [*_of_policies(names), *_of_four_tensors(names), *_of_tokens(names)]


def _of_policies(names: tuple[str, ...]) -> list[Binding]:
    """Return the bindings of two policies: an old and a new one, one and a reference, a student and a teacher.

    Log-probabilities are at the draws of q, which the names determine, or else of all classes. The names of
    distributions and logits, and those of student and teacher, do not determine q: the other order comes last.
    """
    if len(names) != 2:
        return []
    kinds = {
        "log_probs": [log_prob_words(name) for name in names],
        **{kind: [words_of_kind(name, kind) for name in names] for kind in ("logits", "distributions")},
    }
    for kind, words in kinds.items():
        standings = [standing_of(own) for own in words if own is not None]
        if len(standings) == 2 and standings[0] != standings[1]:
            order = (0, 1) if standings[0] > standings[1] else (1, 0)
            tried = [(kind, order), (kind, order[::-1])]
            if kind == "log_probs":
                is_of_teacher = any("teacher" in own for own in words if own is not None)
                tried = [(kind, order), (_OF_CLASSES, order[::-1]), *([(_OF_CLASSES, order), tried[1]] * is_of_teacher)]
            return [Binding(SIGNATURES[name], one, names, _which(SIGNATURES[name], names, one)) for name, one in tried]
    return []


_OF_CLASSES = "kl_div_log_target"


_MASK = re.compile(r"(?:.*_)?masks?|valid|keep|is_?valid|(?:.*_)?mask_?(?:tokens?|valid)")


def _of_tokens(names: tuple[str, ...]) -> list[Binding]:
    """Return the bindings of the logits of two language models and a mask; either may be q, unless a name says it."""
    masks = [name for name in names if _MASK.fullmatch(name.lower())]
    if len(names) != 3 or len(masks) != 1:
        return []
    others = tuple(name for name in names if name not in masks)
    logits, chosen = SIGNATURES["logits"], SIGNATURES["token_logits"]
    first = _order(logits, others) or next((b.order for b in _of_policies(others) if b.signature is logits), None)
    found = []
    is_said = {"q", "p"} <= {word for name in others for word in words_of(name)}
    for order in () if first is None else (first,) if is_said else (first, first[::-1]):
        roles = dict(zip(others, order, strict=True))
        whole = tuple(roles.get(name, 2) for name in names)
        found.append(Binding(chosen, whole, names, "" if is_said else _which(chosen, names, whole)))
    return found


def _which(signature: Signature, names: Sequence[str], order: tuple[int, ...]) -> str:
    first, second = (names[order.index(role)] for role in (0, 1))
    q, p = (second, first) if signature.name == _OF_CLASSES else (first, second)
    return f"q is {q}, and p is {p}{', the log-probabilities of all classes' * (signature.name == _OF_CLASSES)}."


def _of_four_tensors(names: tuple[str, ...]) -> list[Binding]:
    """Return the bindings of a mean and a spread of q and of p each, in any order."""
    if len(names) != 4:
        return []
    for moments in itertools.product(*map(moment_of, names)):
        sides = list(dict.fromkeys(rest for _, rest in moments))
        (spread, *others) = {kind for kind, _ in moments if kind != "mean"} or {""}
        roles = [f"{'qp'[sides.index(rest)]}_{kind}" for kind, rest in moments] if len(sides) == 2 else []
        if others or f"means_{spread}s" not in SIGNATURES or len(set(roles)) != 4:
            continue
        signature = SIGNATURES[f"means_{spread}s"]
        order = tuple(signature.roles.index(role) for role in roles)
        first, second = (standing_of(side) for side in sides)
        swapped = tuple((role + 2) % 4 for role in order)
        return [Binding(signature, order if first >= second else swapped, names)]
    return []


def _says_log_target(fn: Callable[..., Any]) -> bool:
    """Return whether log_target=True is part of the loss, as in a partial or an `nn.KLDivLoss`."""
    return bool(getattr(fn, "keywords", {}).get("log_target", getattr(fn, "log_target", False)))


def _parameter_names(fn: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the positional parameters without a default; empty where they are unknown."""
    target = fn.forward if isinstance(fn, torch.nn.Module) else fn
    schema = getattr(fn, "schema", None)
    if schema is not None and not isinstance(fn, torch.nn.Module):  # a scripted function
        return tuple(argument.name for argument in schema.arguments if argument.default_value is None)
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return ()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in positional and p.default is inspect.Parameter.empty)


def _order(signature: Signature, names: Sequence[str]) -> tuple[int, ...] | None:
    """Return the role of each parameter, or None where the names do not match the signature.

    torch writes `kl_divergence(p, q)` and means KL(p‖q): parameters of these names keep their order.
    """
    patterns = BY_NAMES.get(signature.name)
    if patterns is None or len(names) != len(patterns):
        return None
    lowered = [name.lower() for name in names]
    if signature is SIGNATURES["distributions"] and lowered == ["p", "q"]:
        return (0, 1)
    for order in itertools.permutations(range(len(patterns))):
        if all(re.fullmatch(patterns[role], name) for role, name in zip(order, lowered, strict=True)):
            return order
    return None
