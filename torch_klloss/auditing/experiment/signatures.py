"""Signatures: the arguments that a loss may take, and the pair (q, p) that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, MultivariateNormal, Normal

from torch_klloss.auditing.experiment.probes import (
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
ProbedPair = Normals | Categoricals
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
SPREAD_WORDS: Mapping[Spread, str] = {
    "std": "standard deviation",
    "logstd": "log standard deviation",
    "var": "variance",
    "logvar": "log-variance",
}


@dataclass(frozen=True)
class Signature:
    """The arguments of a kind of loss, and the pair (q, p) that they stand for.

    Attributes:
        name: the name that `audit` takes.
        roles: the role of each argument, in order.
        about: the arguments in words.
        arguments: takes one probe's leaves, each `[batch, *latent]`, and returns the arguments of the loss in the order
            of `roles`; it may draw from the global stream.
        leaves: takes the drawn pair and returns the flat tensors that gradients are taken to, by name.
        pair: takes the flat leaves and returns the pair that the KL is of.
        right: a right loss in these arguments, as an expression.
        categorical: whether the pair is categorical.
        standard: whether p is the standard Normal.
        log_densities: for arguments that hold samples of q, so that one call is an estimate: takes the arguments by
            role and returns log q and log p at these samples.
        fixed_samples: `arguments` with samples that do not depend on q's parameters, where both are usual.
        spread: the kind of q's spread, where it is an argument.
        ranks: the numbers of dimensions to try, in order.
    """

    name: str
    roles: tuple[str, ...]
    about: str
    arguments: Callable[[Leaves], tuple[Any, ...]]
    leaves: Callable[[Any], Leaves]
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


def _logits_pair(leaves: Leaves, layout: Layout, family: type[Categoricals] = Categoricals) -> Categoricals:
    return family(leaves["q.logits"], leaves["p.logits"], layout)


def _with_logits(leaves: Leaves, family: Callable[..., Distribution]) -> tuple[Distribution, Distribution]:
    return family(logits=leaves["q.logits"]), family(logits=leaves["p.logits"])


def _multivariate_normals(leaves: Leaves) -> tuple[MultivariateNormal, MultivariateNormal]:
    q, p = (
        MultivariateNormal(leaves[f"{name}.mean"], scale_tril=torch.diag_embed(leaves[f"{name}.std"]))
        for name in ("q", "p")
    )
    return q, p


def _log_probs_at_samples(leaves: Leaves, *, fixed: bool = False) -> tuple[Tensor, Tensor]:
    """Return the joint log-densities at samples of q, `[num_samples]`: an example's draw is a sample."""
    q, p = _independent_normals(leaves)
    x = q.sample() if fixed else q.rsample()
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
        about=f"the mean and the {SPREAD_WORDS[spread]} of a diagonal Normal q; p is the standard Normal",
        arguments=lambda leaves: (leaves["mean"], leaves[spread]),
        leaves=lambda drawn: {"mean": drawn.q_mean, spread: _FROM_LOG_VARIANCE[spread](drawn.q_logvar)},
        pair=pair,
        right=right,
        standard=True,
        spread=spread,
    )


_RIGHT = "torch_klloss.AutoKL()(q, p)"
_of_normals = partial(Signature, leaves=_normal_leaves, pair=_normal_pair, right=_RIGHT)
_of_logits = partial(Signature, leaves=_logits_leaves, pair=_logits_pair, right=_RIGHT, categorical=True)
_MEAN_LOGVAR = _against_standard(
    "logvar",
    "-0.5 * (1 + logvar - mean**2 - logvar.exp()).sum(-1).mean(), or with torch_klloss: "
    "q = diagonal_normal(mean, logvar); AutoKL()(q, standard_normal_like(q))",
)
_SIGNATURES = (
    _of_normals(
        "distributions",
        ("q", "p"),
        "two `Normal`s over [batch, latent], not wrapped in `Independent`",
        _normals,
    ),
    _of_normals(
        "independent",
        ("q", "p"),
        "two `Independent(Normal(…), 1)` over [batch], with the latent dimensions as one event",
        _independent_normals,
    ),
    _of_normals(
        "multivariate",
        ("q", "p"),
        "two `MultivariateNormal`s over [batch] with diagonal covariances",
        _multivariate_normals,
        ranks=(2,),
    ),
    _of_logits(
        "categorical",
        ("q", "p"),
        "two `Categorical`s over [batch]",
        partial(_with_logits, family=Categorical),
        ranks=(2,),
    ),
    _of_logits(
        "bernoulli",
        ("q", "p"),
        "two `Bernoulli`s over [batch, latent]",
        partial(_with_logits, family=Bernoulli),
        pair=partial(_logits_pair, family=Bernoullis),
        ranks=(2,),
    ),
    _MEAN_LOGVAR,
    _against_standard("std", "(0.5 * (mean**2 + std**2 - 1) - std.log()).sum(-1).mean()"),
    _against_standard("logstd", "(0.5 * (mean**2 + (2 * logstd).exp() - 1) - logstd).sum(-1).mean()"),
    _against_standard("var", "0.5 * (mean**2 + var - 1 - var.log()).sum(-1).mean()"),
    _of_normals(
        "log_probs",
        ("log_q", "log_p"),
        "log q(x) and log p(x) at samples x of q, [num_samples]",
        _log_probs_at_samples,
        right="(log_q - log_p).mean()",
        log_densities=lambda by_role: (by_role["log_q"], by_role["log_p"]),
        fixed_samples=partial(_log_probs_at_samples, fixed=True),
        ranks=(2,),
    ),
    replace(
        _MEAN_LOGVAR,
        name="samples",
        roles=("z", "mean", "logvar"),
        about="a reparameterised sample z of the diagonal Normal q, its mean and log-variance; p is the standard "
        "Normal",
        arguments=_sample_and_parameters,
        right="(0.5 * z**2 - 0.5 * (z - mean) ** 2 / logvar.exp() - 0.5 * logvar).sum(-1).mean()",
        log_densities=_densities_of_sample,
    ),
    _of_logits(
        "logits",
        ("logits_q", "logits_p"),
        "the raw scores of two categorical distributions, [batch, classes]",
        lambda leaves: (leaves["q.logits"], leaves["p.logits"]),
        right="F.kl_div(logits_p.log_softmax(-1), logits_q.log_softmax(-1), log_target=True, reduction='batchmean')",
    ),
    _of_logits(
        "kl_div",
        ("input", "target"),
        "`input` = log p and `target` = q in the order of `F.kl_div`, which returns KL(q‖p) = KL(target‖input)",
        lambda leaves: (leaves["p.logits"].log_softmax(-1), leaves["q.logits"].softmax(-1)),
        right="F.kl_div(input, target, reduction='batchmean')",
    ),
    _of_logits(
        "kl_div_log_target",
        ("input", "log_target"),
        "`input` = log p and `log_target` = log q in the order of `F.kl_div(log_target=True)`",
        lambda leaves: (leaves["p.logits"].log_softmax(-1), leaves["q.logits"].log_softmax(-1)),
        right="F.kl_div(input, log_target, log_target=True, reduction='batchmean')",
    ),
)
SIGNATURES: Mapping[str, Signature] = {signature.name: signature for signature in _SIGNATURES}
"""Every signature by its name."""
