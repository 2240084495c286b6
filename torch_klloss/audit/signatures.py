"""What a loss is called with: one declaration a signature, and how to tell a function's from its parameter names."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Independent, MultivariateNormal, Normal

from torch_klloss.audit.probes import (
    Bernoullis,
    Categoricals,
    Layout,
    Normals,
    Shape,
    Width,
    draw_categoricals,
    draw_normals,
    log_density,
    shapes_of_rank,
)

SignatureName = Literal[
    "auto",
    "distributions",
    "independent",
    "multivariate",
    "categorical",
    "bernoulli",
    "mean_logvar",
    "mean_std",
    "mean_logstd",
    "mean_var",
    "log_probs",
    "samples",
    "logits",
    "kl_div",
    "kl_div_log_target",
]
Leaves = dict[str, Tensor]
Pair = Normals | Categoricals
Spread = Literal["std", "logstd", "var", "logvar"]

LOG_VARIANCE: Mapping[Spread, Callable[[Tensor], Tensor]] = {
    "std": lambda spread: spread.square().log(),
    "logstd": lambda spread: 2 * spread,
    "var": torch.log,
    "logvar": lambda spread: spread,
}
_FROM_LOG_VARIANCE: Mapping[Spread, Callable[[Tensor], Tensor]] = {
    "std": lambda logvar: (0.5 * logvar).exp(),
    "logstd": lambda logvar: 0.5 * logvar,
    "var": torch.exp,
    "logvar": lambda logvar: logvar,
}


@dataclass(frozen=True)
class Signature:
    """Say how a kind of loss is called, and what pair it is then asked about.

    Attributes:
        name: as `audit` takes it.
        roles: what each argument is, in order.
        about: what the arguments are, in words.
        leaves: from the drawn pair to the flat tensors that gradients are taken to, by name.
        arguments: from one probe's leaves, each `[batch, *latent]`, to the arguments of the loss, in the order of
            `roles`; it may draw from the global stream.
        pair: from the flat leaves to the pair that the KL is of.
        right: a right loss in these arguments, as an expression.
        categorical: whether the pair is one of categorical distributions.
        standard: whether p is the standard Normal.
        log_densities: for arguments that hold samples of q, so that one call is an estimate: from the arguments by
            role to log q and log p at these samples.
        fixed_samples: the same arguments with samples that have no gradient of their own, where both are usual.
        spread: how q's spread is given, where it is a tensor.
        ranks: the numbers of dimensions to try, in order.
    """

    name: str
    roles: tuple[str, ...]
    about: str
    leaves: Callable[[Any], Leaves]
    arguments: Callable[[Leaves], tuple[Any, ...]]
    pair: Callable[[Leaves, Layout], Any]
    right: str
    categorical: bool = False
    standard: bool = False
    log_densities: Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]] | None = None
    fixed_samples: Callable[[Leaves], tuple[Any, ...]] | None = None
    spread: Spread | None = None
    ranks: tuple[int, ...] = (2, 3, 4, 1)

    @property
    def given_samples(self) -> bool:
        """Whether the arguments hold samples of q."""
        return self.log_densities is not None

    def draw(self, seed: int, *, rank: int, width: Width = "any") -> tuple[Layout, Leaves]:
        """Draw probes of `rank` dimensions: their layout, and the leaves, which require no gradient yet."""
        shapes: tuple[Shape, ...] = shapes_of_rank(rank, few_dims=width != "any")
        if self.categorical:
            layout, categoricals = draw_categoricals(shapes, seed)
            return layout, self.leaves(categoricals)
        layout, normals = draw_normals(shapes, seed, width=width, standard=self.standard)
        return layout, self.leaves(normals)


def _normal_leaves(pair: Normals) -> Leaves:
    return {
        "q.mean": pair.q_mean,
        "q.std": (0.5 * pair.q_logvar).exp(),
        "p.mean": pair.p_mean,
        "p.std": (0.5 * pair.p_logvar).exp(),
    }


def _normal_pair(leaves: Leaves, layout: Layout) -> Normals:
    return Normals(leaves["q.mean"], 2 * leaves["q.std"].log(), leaves["p.mean"], 2 * leaves["p.std"].log())


def _normals(leaves: Leaves) -> tuple[Normal, Normal]:
    return Normal(leaves["q.mean"], leaves["q.std"]), Normal(leaves["p.mean"], leaves["p.std"])


def _independent_normals(leaves: Leaves) -> tuple[Independent, Independent]:
    q, p = _normals(leaves)
    num_dims = leaves["q.mean"].dim() - 1
    return Independent(q, num_dims), Independent(p, num_dims)


def _logits_leaves(pair: Categoricals) -> Leaves:
    return {"q.logits": pair.q_logits, "p.logits": pair.p_logits}


def _logits_pair(leaves: Leaves, layout: Layout) -> Categoricals:
    return Categoricals(leaves["q.logits"], leaves["p.logits"], layout)


def _categoricals(leaves: Leaves) -> tuple[Categorical, Categorical]:
    return Categorical(logits=leaves["q.logits"]), Categorical(logits=leaves["p.logits"])


def _multivariate_normals(leaves: Leaves) -> tuple[MultivariateNormal, MultivariateNormal]:
    q, p = (
        MultivariateNormal(leaves[f"{name}.mean"], scale_tril=torch.diag_embed(leaves[f"{name}.std"]))
        for name in ("q", "p")
    )
    return q, p


def _bernoullis(leaves: Leaves) -> tuple[Bernoulli, Bernoulli]:
    return Bernoulli(logits=leaves["q.logits"]), Bernoulli(logits=leaves["p.logits"])


def _bernoulli_pair(leaves: Leaves, layout: Layout) -> Bernoullis:
    return Bernoullis(leaves["q.logits"], leaves["p.logits"], layout)


def _log_probs_at_samples(leaves: Leaves) -> tuple[Tensor, Tensor]:
    """Return the joint log-densities at samples of q, `[num_samples]`: an example's draw is a sample."""
    q, p = _independent_normals(leaves)
    x = q.rsample()
    return q.log_prob(x), p.log_prob(x)


def _log_probs_at_fixed_samples(leaves: Leaves) -> tuple[Tensor, Tensor]:
    """Return the same at samples that do not depend on q's parameters."""
    q, p = _independent_normals(leaves)
    x = q.sample()
    return q.log_prob(x), p.log_prob(x)


def _densities_of_sample(by_role: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    z, mean, logvar = (by_role[role] for role in ("z", "mean", "logvar"))
    zero = torch.zeros_like(mean)
    return log_density(z, mean, logvar), log_density(z, zero, zero)


def _sample_and_parameters(leaves: Leaves) -> tuple[Tensor, Tensor, Tensor]:
    mean, logvar = leaves["mean"], leaves["logvar"]
    return mean + (0.5 * logvar).exp() * torch.randn_like(mean), mean, logvar


def _against_standard(spread: Spread, right: str) -> Signature:
    def pair(leaves: Leaves, layout: Layout) -> Normals:
        zero = torch.zeros_like(leaves["mean"])
        return Normals(leaves["mean"], LOG_VARIANCE[spread](leaves[spread]), zero, zero)

    return Signature(
        name=f"mean_{spread}",
        roles=("mean", spread),
        about=f"the mean and the {_SPREAD_WORDS[spread]} of a diagonal Normal q; p is the standard Normal",
        leaves=lambda drawn: {"mean": drawn.q_mean, spread: _FROM_LOG_VARIANCE[spread](drawn.q_logvar)},
        arguments=lambda leaves: (leaves["mean"], leaves[spread]),
        pair=pair,
        right=right,
        standard=True,
        spread=spread,
    )


_SPREAD_WORDS: Mapping[Spread, str] = {
    "std": "standard deviation",
    "logstd": "log standard deviation",
    "var": "variance",
    "logvar": "log-variance",
}

_RIGHT_DISTRIBUTIONS = "torch_klloss.AutoKL()(q, p)"
_DISTRIBUTIONS = Signature(
    name="distributions",
    roles=("q", "p"),
    about="two `Normal`s over [batch, latent], not wrapped in `Independent`",
    leaves=_normal_leaves,
    arguments=_normals,
    pair=_normal_pair,
    right=_RIGHT_DISTRIBUTIONS,
)
_INDEPENDENT = Signature(
    name="independent",
    roles=("q", "p"),
    about="two `Independent(Normal(…), 1)` over [batch], with the latent dimensions as one event",
    leaves=_normal_leaves,
    arguments=_independent_normals,
    pair=_normal_pair,
    right=_RIGHT_DISTRIBUTIONS,
)
_MULTIVARIATE = Signature(
    name="multivariate",
    roles=("q", "p"),
    about="two `MultivariateNormal`s over [batch] with diagonal covariances",
    leaves=_normal_leaves,
    arguments=_multivariate_normals,
    pair=_normal_pair,
    right=_RIGHT_DISTRIBUTIONS,
    ranks=(2,),
)
_BERNOULLIS = Signature(
    name="bernoulli",
    roles=("q", "p"),
    about="two `Bernoulli`s over [batch, latent]",
    leaves=_logits_leaves,
    arguments=_bernoullis,
    pair=_bernoulli_pair,
    right=_RIGHT_DISTRIBUTIONS,
    categorical=True,
    ranks=(2,),
)
_CATEGORICALS = Signature(
    name="categorical",
    roles=("q", "p"),
    about="two `Categorical`s over [batch]",
    leaves=_logits_leaves,
    arguments=_categoricals,
    pair=_logits_pair,
    right=_RIGHT_DISTRIBUTIONS,
    categorical=True,
    ranks=(2,),
)
_LOG_PROBS = Signature(
    name="log_probs",
    roles=("log_q", "log_p"),
    about="log q(x) and log p(x) at samples x of q, [num_samples]",
    leaves=_normal_leaves,
    arguments=_log_probs_at_samples,
    pair=_normal_pair,
    right="(log_q - log_p).mean()",
    log_densities=lambda by_role: (by_role["log_q"], by_role["log_p"]),
    fixed_samples=_log_probs_at_fixed_samples,
    ranks=(2,),
)
_SAMPLES = Signature(
    name="samples",
    roles=("z", "mean", "logvar"),
    about="a reparameterised sample z of the diagonal Normal q, its mean and log-variance; p is the standard Normal",
    leaves=lambda drawn: {"mean": drawn.q_mean, "logvar": drawn.q_logvar},
    arguments=_sample_and_parameters,
    pair=lambda leaves, layout: Normals(
        leaves["mean"], leaves["logvar"], torch.zeros_like(leaves["mean"]), torch.zeros_like(leaves["mean"])
    ),
    right="(0.5 * z**2 - 0.5 * (z - mean) ** 2 / logvar.exp() - 0.5 * logvar).sum(-1).mean()",
    standard=True,
    log_densities=_densities_of_sample,
    spread="logvar",
)
_LOGITS = Signature(
    name="logits",
    roles=("logits_q", "logits_p"),
    about="the raw scores of two categorical distributions, [batch, classes]",
    leaves=_logits_leaves,
    arguments=lambda leaves: (leaves["q.logits"], leaves["p.logits"]),
    pair=_logits_pair,
    right="F.kl_div(logits_p.log_softmax(-1), logits_q.log_softmax(-1), log_target=True, reduction='batchmean')",
    categorical=True,
)
_KL_DIV = Signature(
    name="kl_div",
    roles=("input", "target"),
    about="`input` = log p and `target` = q in the order of `F.kl_div`, which returns KL(q‖p) = KL(target‖input)",
    leaves=_logits_leaves,
    arguments=lambda leaves: (leaves["p.logits"].log_softmax(-1), leaves["q.logits"].softmax(-1)),
    pair=_logits_pair,
    right="F.kl_div(input, target, reduction='batchmean')",
    categorical=True,
)
_KL_DIV_LOG_TARGET = Signature(
    name="kl_div_log_target",
    roles=("input", "log_target"),
    about="`input` = log p and `log_target` = log q in the order of `F.kl_div(log_target=True)`",
    leaves=_logits_leaves,
    arguments=lambda leaves: (leaves["p.logits"].log_softmax(-1), leaves["q.logits"].log_softmax(-1)),
    pair=_logits_pair,
    right="F.kl_div(input, log_target, log_target=True, reduction='batchmean')",
    categorical=True,
)

SIGNATURES: Mapping[str, Signature] = {
    signature.name: signature
    for signature in (
        _DISTRIBUTIONS,
        _INDEPENDENT,
        _MULTIVARIATE,
        _CATEGORICALS,
        _BERNOULLIS,
        _against_standard(
            "logvar",
            "-0.5 * (1 + logvar - mean**2 - logvar.exp()).sum(-1).mean(), or with torch_klloss: "
            "q = diagonal_normal(mean, logvar); AutoKL()(q, standard_normal_like(q))",
        ),
        _against_standard("std", "(0.5 * (mean**2 + std**2 - 1) - std.log()).sum(-1).mean()"),
        _against_standard("logstd", "(0.5 * (mean**2 + (2 * logstd).exp() - 1) - logstd).sum(-1).mean()"),
        _against_standard("var", "0.5 * (mean**2 + var - 1 - var.log()).sum(-1).mean()"),
        _LOG_PROBS,
        _SAMPLES,
        _LOGITS,
        _KL_DIV,
        _KL_DIV_LOG_TARGET,
    )
}
"""Every signature by its name."""


_OTHER_FAMILIES = (_INDEPENDENT, _MULTIVARIATE, _CATEGORICALS, _BERNOULLIS)
"""What a loss of (q, p) is tried with that does not take Normals."""


class SignatureError(ValueError):
    """Raised where the names of the parameters do not tell what a loss is called with."""


@dataclass(frozen=True)
class Call:
    """Say how to call a loss: a signature, and which of its roles each positional parameter takes."""

    signature: Signature
    order: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def right(self) -> str:
        """A right loss in the loss's own parameters, as an expression."""
        own = {self.signature.roles[role]: name for role, name in zip(self.order, self.names, strict=False)}
        return re.sub(r"(?<![.\w])[a-z]\w*\b(?!=)", lambda word: own.get(word[0], word[0]), self.signature.right)

    def arguments(self, leaves: Leaves) -> tuple[Any, ...]:
        """Return the arguments of one probe in the order of the parameters."""
        by_role = self.signature.arguments(leaves)
        return tuple(by_role[index] for index in self.order)


def adapted(adapter: Callable[..., Any], fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the loss of (q, p) that calls `adapter(fn, q, p)`."""
    return lambda q, p: adapter(fn, q, p)


def calls_to_try(fn: Callable[..., Any], signature: str) -> list[Call]:
    """Return how `fn` may be called, best first: as stated, or as the names of its parameters tell.

    Raises:
        ValueError: if there is no signature of that name.
        SignatureError: if the parameters do not tell and `signature` is "auto".
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
        calls = [Call(chosen, order or tuple(range(len(chosen.roles))), names or chosen.roles)]
    else:
        calls = _told_by_names(names, fn)
    if calls[0].signature is _DISTRIBUTIONS:
        calls += [Call(other, call.order, call.names) for other in _OTHER_FAMILIES for call in calls]
    return calls


def _told_by_names(names: tuple[str, ...], fn: Callable[..., Any]) -> list[Call]:
    found = [
        Call(SIGNATURES[name], order, names)
        for name in BY_NAMES
        if (order := _order(SIGNATURES[name], names)) is not None
    ]
    if not found:
        raise SignatureError(
            f"the parameters ({', '.join(names)}) do not tell what the loss takes: pass signature=, one of "
            f"{', '.join(map(repr, SIGNATURES))}, or a function adapter(fn, q, p) that calls it."
        )
    if found[0].signature is _KL_DIV and _says_log_target(fn):
        return [Call(_KL_DIV_LOG_TARGET, found[0].order, names)]
    if found[0].signature is _DISTRIBUTIONS and tuple(map(str.lower, names)) == ("p", "q"):
        return [found[0], Call(_DISTRIBUTIONS, (1, 0), names)]  # or as this library has it: KL(q‖p) of fn(p, q)
    return found[:1]


def _says_log_target(fn: Callable[..., Any]) -> bool:
    """Return whether log_target=True is part of the loss, as in a partial or an `nn.KLDivLoss`."""
    return bool(getattr(fn, "keywords", {}).get("log_target", getattr(fn, "log_target", False)))


def _parameter_names(fn: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the positional parameters without a default; none where they cannot be known."""
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
    """Return the role that each parameter takes, or None where the names do not tell.

    torch writes `kl_divergence(p, q)` and means KL(p‖q): parameters of these names keep their order.
    """
    patterns = BY_NAMES.get(signature.name)
    if patterns is None or len(names) != len(patterns):
        return None
    lowered = [name.lower() for name in names]
    if signature is _DISTRIBUTIONS and lowered == ["p", "q"]:
        return (0, 1)
    for order in itertools.permutations(range(len(patterns))):
        if all(re.fullmatch(patterns[role], name) for role, name in zip(order, lowered, strict=True)):
            return order
    return None
