"""Bindings of a loss's parameters to the roles of a signature, by name or as stated."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_klloss.auditing.experiment.signatures import SIGNATURES, Leaves, Signature

_OTHER_FAMILIES = ("independent", "multivariate", "categorical", "bernoulli")
"""The signatures to try with a loss of (q, p) that does not take Normals."""


class SignatureError(ValueError):
    """Raised where the names of a loss's parameters determine no signature."""


@dataclass(frozen=True)
class Binding:
    """A signature, and which of its roles each positional parameter of a loss has."""

    signature: Signature
    order: tuple[int, ...]
    names: tuple[str, ...]

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
        chosen = SIGNATURES[signature]
        order = _order(chosen, names) if names else None
        bindings = [Binding(chosen, order or tuple(range(len(chosen.roles))), names or chosen.roles)]
    else:
        bindings = _bindings_by_name(names, fn)
    if bindings[0].signature is SIGNATURES["distributions"]:
        bindings += [
            Binding(SIGNATURES[other], binding.order, binding.names)
            for other in _OTHER_FAMILIES
            for binding in bindings
        ]
    return bindings


def _bindings_by_name(names: tuple[str, ...], fn: Callable[..., Any]) -> list[Binding]:
    found = [
        Binding(SIGNATURES[name], order, names)
        for name in BY_NAMES
        if (order := _order(SIGNATURES[name], names)) is not None
    ]
    if not found:
        raise SignatureError(
            f"the parameters ({', '.join(names)}) determine no signature: pass signature=, one of "
            f"{', '.join(map(repr, SIGNATURES))}, or a function adapter(fn, q, p) that calls it."
        )
    if found[0].signature is SIGNATURES["kl_div"] and _says_log_target(fn):
        return [Binding(SIGNATURES["kl_div_log_target"], found[0].order, names)]
    if found[0].signature is SIGNATURES["distributions"] and tuple(map(str.lower, names)) == ("p", "q"):
        return [found[0], Binding(SIGNATURES["distributions"], (1, 0), names)]  # KL(p‖q) as in torch, else KL(q‖p)
    return found[:1]


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


_MEAN = r"(?:.*_)?(?:mu|mean|means|m|loc|mus)(?:_?[qz])?(?:_.*)?"
_Q = r"(?:q|posterior|q_?dist|dist_?q|q_z|qz|q_?zx|qz_?x|post|teacher|target_dist|guide)"
_P = r"(?:p|prior|p_?dist|dist_?p|p_z|pz|student|model)"
BY_NAMES: Mapping[str, tuple[str, ...]] = {
    "samples": (r"z|z_?s|x|sample|samples|latent|latents", _MEAN, r"(?:.*_)?(?:log_?var.*|lv|log_?sigma_?(?:2|sq.*))"),
    "mean_logvar": (_MEAN, r"(?:.*_)?(?:log_?var.*|lv|log_?sigma_?(?:2|sq.*)|log_?std_?(?:2|sq.*)|log_?s2)(?:_?[qz])?"),
    "mean_logstd": (_MEAN, r"(?:.*_)?(?:log_?(?:std|sigma|scale|sd|stddev)s?|ls|lsigma|rho)(?:_?[qz])?"),
    "mean_var": (_MEAN, r"(?:.*_)?(?:var|variance|sigma_?(?:2|sq.*)|std_?(?:2|sq.*)|v)(?:_?[qz])?"),
    "mean_std": (_MEAN, r"(?:.*_)?(?:std|sigma|scale|sd|stddev|s|stds|sigmas|std_?dev)(?:_?[qz])?"),
    "log_probs": (
        r"log_?(?:prob|p(?=rob))?s?_?q.*|lq|logqx?|q_?log_?probs?|log_?probs?|new_?log_?probs?|policy_?log_?probs?",
        r"log_?(?:prob)?s?_?p(?!rob).*|lp|logpx?|p_?log_?probs?|ref.*log_?probs?|old_?log_?probs?|prior_?log_?probs?",
    ),
    "logits": (
        r"(?:q_?|teacher_?|target_?|t_?)logits|logits_?(?:q|t|teacher|target)|q_?scores|scores_?q",
        r"(?:p_?|student_?|input_?|s_?)logits|logits_?(?:p|s|student|input)|p_?scores|scores_?p",
    ),
    "kl_div": (r"inputs?|log_?input|log_?p(?:rob)?s?|student_?log_?probs?", r"targets?|target_?probs?|teacher_?probs?"),
    "kl_div_log_target": (r"inputs?|log_?input", r"log_?targets?|targets?_?log(?:_?probs?)?"),
    "distributions": (_Q, _P),
}
"""Patterns of parameter names, by signature and role."""


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
