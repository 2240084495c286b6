"""Signatures: the arguments that a loss may take, and the pair (q, p) that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, MultivariateNormal, Normal
from torch.nn.functional import softplus

from torch_klloss.auditing.experiment.probes import (
    Bernoullis,
    Categoricals,
    Layout,
    MixedNormals,
    Normals,
    Shape,
    Width,
    draw_categoricals,
    draw_normals,
    log_density,
    shapes_of_rank,
)
from torch_klloss.auditing.experiment.tokens import TOKEN_SCALES, TOKEN_SHAPES, Tokens, token_mask

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
    "mean_rho",
    "means_logvars",
    "means_stds",
    "means_logstds",
    "means_vars",
    "log_probs",
    "samples",
    "logits",
    "token_logits",
    "kl_div",
    "kl_div_log_target",
    "uniform_logits",
    "uniform_probs",
    "uniform_log_probs",
]
Leaves = dict[str, Tensor]
ProbedPair = Normals | Categoricals
Spread = Literal["std", "logstd", "var", "logvar", "rho"]

LOG_VARIANCE: Mapping[Spread, Callable[[Tensor], Tensor]] = {
    "std": lambda spread: spread.square().log(),
    "logstd": lambda spread: 2 * spread,
    "var": torch.log,
    "logvar": lambda spread: spread,
    "rho": lambda spread: 2 * softplus(spread).log(),
}
FROM_LOG_VARIANCE: Mapping[Spread, Callable[[Tensor], Tensor]] = {
    "std": lambda logvar: (0.5 * logvar).exp(),
    "logstd": lambda logvar: 0.5 * logvar,
    "var": torch.exp,
    "logvar": lambda logvar: logvar,
    "rho": lambda logvar: (0.5 * logvar).exp().expm1().log(),
}
SPREAD_WORDS: Mapping[Spread, str] = {
    "std": "standard deviation",
    "logstd": "log standard deviation",
    "var": "variance",
    "logvar": "log-variance",
    "rho": "raw scale (its softplus is the standard deviation)",
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
        standard: whether p is the standard Normal, or the uniform distribution.
        log_densities: for arguments that hold samples of q, so that one call is an estimate: takes the arguments by
            role and returns log q and log p at these samples.
        fixed_samples: `arguments` with samples that do not depend on q's parameters, where both are usual.
        spread: the kind of q's spread, and of p's, where it is an argument.
        ranks: the numbers of dimensions to try, in order.
        masked: whether the examples are tokens, and the last argument is a mask of them.
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
    masked: bool = False

    @property
    def given_samples(self) -> bool:
        """Whether the arguments hold samples of q."""
        return self.log_densities is not None

    def draw(self, seed: int, *, rank: int, width: Width = "any") -> tuple[Layout, Leaves]:
        """Draw probes of `rank` dimensions: their layout, and the leaves, which require no gradient yet."""
        if self.masked:
            layout, drawn = draw_categoricals(TOKEN_SHAPES, seed, TOKEN_SCALES)
            return replace(layout, example_dims=2), self.leaves(drawn)
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


def mixing(shape: Shape) -> Tensor:
    """Return a matrix for each example, `[batch, …, latent, latent]`: the dimensions it maps depend on one another."""
    batch, size = (torch.arange(length, dtype=torch.float64) for length in (shape[0], shape[-1]))
    phases = 1.7 * size[:, None] + 2.9 * size + 1.3 * size[:, None] * size + 0.8 * batch[:, None, None]
    matrix = torch.eye(shape[-1], dtype=torch.float64) + 0.6 * torch.sin(phases) / shape[-1] ** 0.5
    matrix = matrix / torch.linalg.det(matrix).abs()[:, None, None] ** (1 / shape[-1])  # keeps all densities
    return matrix.reshape(shape[0], *(1 for _ in shape[1:-1]), shape[-1], shape[-1])


def _multivariate_normals(leaves: Leaves) -> tuple[MultivariateNormal, MultivariateNormal]:
    """Return q and p after one linear map of the space: their covariances are full, and the KL is as before."""
    matrix = mixing(leaves["q.mean"].shape).to(leaves["q.mean"])
    mixed = []
    for name in "qp":
        loc = (matrix @ leaves[f"{name}.mean"][..., None])[..., 0]
        root = matrix * leaves[f"{name}.std"][..., None, :]
        mixed.append(MultivariateNormal(loc, scale_tril=torch.linalg.cholesky(root @ root.mT)))
    return mixed[0], mixed[1]


def _mixed_pair(leaves: Leaves, layout: Layout) -> MixedNormals:
    matrices = [mixing(shape) for shape in layout.shapes]
    n = _normal_pair(leaves, layout)
    return MixedNormals(n.q_mean, n.q_logvar, n.p_mean, n.p_logvar, layout, matrices)


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
        leaves=lambda drawn: {"mean": drawn.q_mean, spread: FROM_LOG_VARIANCE[spread](drawn.q_logvar)},
        pair=pair,
        right=right,
        standard=True,
        spread=spread,
    )


def _of_two_normals(spread: Spread, right: str) -> Signature:
    roles = ("q_mean", f"q_{spread}", "p_mean", f"p_{spread}")

    def leaves(drawn: Normals) -> Leaves:
        tensors = drawn.q_mean, drawn.q_logvar, drawn.p_mean, drawn.p_logvar
        return {
            role.replace("_", "."): tensor if role.endswith("mean") else FROM_LOG_VARIANCE[spread](tensor)
            for role, tensor in zip(roles, tensors, strict=True)
        }

    def pair(leaves: Leaves, layout: Layout) -> Normals:
        q, p = (LOG_VARIANCE[spread](leaves[f"{side}.{spread}"]) for side in "qp")
        return Normals(leaves["q.mean"], q, leaves["p.mean"], p)

    return Signature(
        name=f"means_{spread}s",
        roles=roles,
        about=f"the mean and the {SPREAD_WORDS[spread]} of a diagonal Normal q, and of a diagonal Normal p",
        arguments=lambda leaves: tuple(leaves[role.replace("_", ".")] for role in roles),
        leaves=leaves,
        pair=pair,
        right=right,
        spread=spread,
    )


def _against_uniform(kind: str, of_logits: Callable[[Tensor], Tensor], right: str) -> Signature:
    return Signature(
        name=f"uniform_{kind}",
        roles=(kind,),
        about=f"the {_CLASS_WORDS[kind]} of a categorical distribution q; p is the uniform one",
        arguments=lambda leaves: (of_logits(leaves["logits"]),),
        leaves=lambda drawn: {"logits": drawn.q_logits},
        pair=lambda leaves, layout: Categoricals(leaves["logits"], torch.zeros_like(leaves["logits"]), layout),
        right=right,
        categorical=True,
        standard=True,
    )


_CLASS_WORDS = {"logits": "raw scores", "probs": "probabilities", "log_probs": "log-probabilities"}
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
        "two `MultivariateNormal`s over [batch] with full covariances",
        _multivariate_normals,
        pair=_mixed_pair,
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
    _against_standard(
        "rho",
        "(0.5 * (mean**2 + F.softplus(rho)**2 - 1) - F.softplus(rho).log()).sum(-1).mean()",
    ),
    _of_two_normals(
        "logvar",
        "0.5 * (p_logvar - q_logvar + (q_logvar.exp() + (q_mean - p_mean)**2) / p_logvar.exp() - 1).sum(-1).mean()",
    ),
    _of_two_normals(
        "std", "((p_std / q_std).log() + (q_std**2 + (q_mean - p_mean)**2) / (2 * p_std**2) - 0.5).sum(-1).mean()"
    ),
    _of_two_normals(
        "logstd",
        "(p_logstd - q_logstd + 0.5 * ((2 * q_logstd).exp() + (q_mean - p_mean)**2) / (2 * p_logstd).exp() - 0.5)"
        ".sum(-1).mean()",
    ),
    _of_two_normals("var", "0.5 * ((p_var / q_var).log() + (q_var + (q_mean - p_mean)**2) / p_var - 1).sum(-1).mean()"),
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
        "token_logits",
        ("logits_q", "logits_p", "mask"),
        "the raw scores of the next token of two language models, [batch, time, vocabulary], and a bool mask [batch, "
        "time] of the tokens that count",
        lambda leaves: (leaves["q.logits"], leaves["p.logits"], token_mask(*leaves["q.logits"].shape[:2])),
        pair=partial(_logits_pair, family=Tokens),
        right="((logits_q.softmax(-1) * (logits_q.log_softmax(-1) - logits_p.log_softmax(-1))).sum(-1) * mask).sum() "
        "/ mask.sum(), or with torch_klloss: "
        "kl = torch_klloss.language.token_kl(logits_q, logits_p, mask=mask); kl.sum() / mask.sum()",
        ranks=(3,),
        masked=True,
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
    _against_uniform(
        "logits",
        lambda logits: logits,
        "(logits.softmax(-1) * (logits.log_softmax(-1) + math.log(logits.shape[-1]))).sum(-1).mean()",
    ),
    _against_uniform(
        "probs",
        lambda logits: logits.softmax(-1),
        "(probs * (probs.log() + math.log(probs.shape[-1]))).sum(-1).mean()",
    ),
    _against_uniform(
        "log_probs",
        lambda logits: logits.log_softmax(-1),
        "(log_probs.exp() * (log_probs + math.log(log_probs.shape[-1]))).sum(-1).mean()",
    ),
)
SIGNATURES: Mapping[str, Signature] = {signature.name: signature for signature in _SIGNATURES}
"""Every signature by its name."""
