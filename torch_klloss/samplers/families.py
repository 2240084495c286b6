"""Transports of families whose `icdf` is missing, or inaccurate for uniform numbers near 0 or 1."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Cauchy,
    Dirichlet,
    FisherSnedecor,
    Gamma,
    Geometric,
    Gumbel,
    HalfCauchy,
    HalfNormal,
    InverseGamma,
    Kumaraswamy,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    StudentT,
    Uniform,
    VonMises,
    Weibull,
    Wishart,
)
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical

from torch_klloss.numerics.exponentials import expm1
from torch_klloss.samplers.log_space import LogDirichlet, log_dirichlet
from torch_klloss.samplers.quantiles import log_gamma_quantile, logit_beta_quantile, von_mises_quantile, wide
from torch_klloss.samplers.transport import num_uniforms, register_transport, transport


def _standard_normal(u: Tensor) -> Tensor:
    return math.sqrt(2) * torch.erfinv(2 * u - 1)  # 2u - 1 is exact


def _event_size(q: torch.distributions.Distribution) -> int:
    return q.event_shape.numel()


def _positive(log_x: Tensor, like: Tensor) -> Tensor:
    """Return exp(log_x) in the dtype and on the device of `like`, kept above zero as torch's own draws are."""
    return log_x.exp().to(like).clamp(min=torch.finfo(like.dtype).tiny)


def _inside(x: Tensor) -> Tensor:
    """Keep x where both it and 1 - x are less than 1."""
    half = torch.finfo(x.dtype).eps / 2
    return x.clamp(half, 1 - half)


@register_transport(HalfNormal)
def half_normal(q: HalfNormal, u: Tensor) -> Tensor:
    """Return quantiles of |z|; torch takes the Normal's at (1 + u) / 2, which may round to 1."""
    return q.scale * (math.sqrt(2) * torch.erfinv(u))


def _side(u: Tensor) -> Tensor:
    return (u - 0.5).sign()  # u is the midpoint of a cell, hence not ½


def _cotangent(m: Tensor) -> Tensor:
    return (math.pi * m).tan().reciprocal()


@register_transport(Cauchy)
def cauchy(q: Cauchy, u: Tensor) -> Tensor:
    """Return quantiles from the nearer tail, where tan(π(u - ½)) has no digits left."""
    return q.loc + q.scale * _side(u) * _cotangent(torch.minimum(u, 1 - u))


@register_transport(HalfCauchy)
def half_cauchy(q: HalfCauchy, u: Tensor) -> Tensor:
    """Return quantiles of |x|."""
    return q.scale * _cotangent((1 - u) / 2)


@register_transport(Gumbel)
def gumbel(q: Gumbel, u: Tensor) -> Tensor:
    """Return quantiles; torch moves u inside (tiny, 1 - eps) first, although it is inside (0, 1)."""
    return q.loc - q.scale * (-u.log()).log()


@register_transport(Weibull)
def weibull(q: Weibull, u: Tensor) -> Tensor:
    """Return quantiles."""
    return q.scale * (-torch.log1p(-u)) ** q.concentration_reciprocal


@register_transport(Kumaraswamy)
def kumaraswamy(q: Kumaraswamy, u: Tensor) -> Tensor:
    """Return quantiles, (1 - (1 - u)^(1/b))^(1/a), where torch's log_prob is finite: it computes 1 - x^a."""
    power = _inside(-expm1(torch.log1p(-u) / q.concentration0))
    return _inside(power ** q.concentration1.reciprocal())


@register_transport(Uniform)
def uniform(q: Uniform, u: Tensor) -> Tensor:
    """Return quantiles below the upper end, which has no density and which a product may round to."""
    x = q.low + (q.high - q.low) * u
    last = torch.nextafter(q.high, q.low).detach() + (q.high - q.high.detach())
    return torch.where(x < q.high, x, last)


@register_transport(Gamma)
def gamma(q: Gamma, u: Tensor) -> Tensor:
    """Return quantiles of Gamma and Chi2."""
    return _positive(log_gamma_quantile(q.concentration, u) - wide(q.rate).log(), u)


@register_transport(InverseGamma)
def inverse_gamma(q: InverseGamma, u: Tensor) -> Tensor:
    """Return quantiles of 1/x."""
    return _positive(wide(q.rate).log() - log_gamma_quantile(q.concentration, 1 - u), u)


@register_transport(Beta)
def beta(q: Beta, u: Tensor) -> Tensor:
    """Return quantiles, kept inside (0, 1) in their dtype."""
    x = logit_beta_quantile(q.concentration1, q.concentration0, u).sigmoid().to(u)
    info = torch.finfo(u.dtype)
    return x.clamp(info.tiny, 1 - info.eps / 2)


@register_transport(Dirichlet, lambda q: q.event_shape[-1] - 1)
def dirichlet(q: Dirichlet, u: Tensor) -> Tensor:
    """Return points by breaking a stick: the k-th takes a Beta(α_k, α_{k+1} + … + α_K) share of the rest."""
    return _positive(log_dirichlet(LogDirichlet(q.concentration), u), u)


@register_transport(StudentT)
def student_t(q: StudentT, u: Tensor) -> Tensor:
    """Return quantiles: ν / (ν + t²) is Beta(ν/2, ½), and t² is computed from the nearer tail."""
    tail = 2 * torch.minimum(u, 1 - u)
    y = logit_beta_quantile(q.df / 2, torch.full_like(q.df, 0.5), tail)
    t = wide(q.df).sqrt() * (-y / 2).exp()
    return q.loc + q.scale * _side(u) * t.to(u)


@register_transport(FisherSnedecor)
def fisher_snedecor(q: FisherSnedecor, u: Tensor) -> Tensor:
    """Return quantiles: d₁x / (d₁x + d₂) is Beta(d₁/2, d₂/2)."""
    return _positive(logit_beta_quantile(q.df1 / 2, q.df2 / 2, u) + wide(q.df2 / q.df1).log(), u)


@register_transport(VonMises)
def von_mises(q: VonMises, u: Tensor) -> Tensor:
    """Return quantiles counted from the side opposite of the mean direction, turned into [-π, π)."""
    x = von_mises_quantile(q.concentration, u).to(u) + q.loc
    return (x + math.pi) % (2 * math.pi) - math.pi


@register_transport(MultivariateNormal, _event_size)
def multivariate_normal(q: MultivariateNormal, u: Tensor) -> Tensor:
    """Return loc + L z."""
    z = _standard_normal(u)
    return q.loc + (q._unbroadcasted_scale_tril @ z.unsqueeze(-1)).squeeze(-1)


@register_transport(LowRankMultivariateNormal, lambda q: q.cov_factor.shape[-1] + q.event_shape[-1])
def low_rank_multivariate_normal(q: LowRankMultivariateNormal, u: Tensor) -> Tensor:
    """Return loc + W z + √D z'; the factors come first, in the most even dimensions of a net."""
    factors, own = _standard_normal(u).split([q.cov_factor.shape[-1], q.event_shape[-1]], -1)
    common = (q._unbroadcasted_cov_factor @ factors.unsqueeze(-1)).squeeze(-1)
    return q.loc + common + q._unbroadcasted_cov_diag.sqrt() * own


@register_transport(Wishart, lambda q: q.event_shape[-1] * (q.event_shape[-1] + 1) // 2)
def wishart(q: Wishart, u: Tensor) -> Tensor:
    """Return L A Aᵀ Lᵀ with A of Bartlett's decomposition: roots of Chi2 on the diagonal, Normal below."""
    p = q.event_shape[-1]
    df = q.df.unsqueeze(-1) - torch.arange(p, dtype=u.dtype, device=u.device)
    diagonal = (log_gamma_quantile(df / 2, u[..., :p]) + math.log(2)).div(2).exp().to(u)
    i, j = torch.tril_indices(p, p, -1, device=u.device)
    below = torch.zeros(*u.shape[:-1], p, p, dtype=u.dtype, device=u.device)
    below[..., i, j] = _standard_normal(u[..., p:])
    factor = q._unbroadcasted_scale_tril @ (below + diagonal.diag_embed())
    return factor @ factor.mT


@register_transport(LogitRelaxedBernoulli)
def logit_relaxed_bernoulli(q: LogitRelaxedBernoulli, u: Tensor) -> Tensor:
    """Return quantiles, (logit u + logits) / temperature."""
    return (u.log() - torch.log1p(-u) + q.logits) / q.temperature


@register_transport(ExpRelaxedCategorical, _event_size)
def exp_relaxed_categorical(q: ExpRelaxedCategorical, u: Tensor) -> Tensor:
    """Return the log-softmax of logits to which Gumbel noise is added."""
    return torch.log_softmax((q.logits - (-u.log()).log()) / q.temperature, -1)


@register_transport(Bernoulli, differentiable=False)
def bernoulli(q: Bernoulli, u: Tensor) -> Tensor:
    """Return 1 where u is less than the probability: near 0, where small numbers are represented best."""
    return (u < q.probs).to(q.probs.dtype)


@register_transport(Geometric, differentiable=False)
def geometric(q: Geometric, u: Tensor) -> Tensor:
    """Return quantiles of the number of failures before the first success."""
    return (torch.log1p(-u) / torch.log1p(-q.probs)).floor()


@register_transport(Categorical, lambda q: 1, differentiable=False)
def categorical(q: Categorical, u: Tensor) -> Tensor:
    """Return quantiles: the number of cumulative probabilities below u."""
    below = q.probs.cumsum(-1)[..., :-1]
    return (u > below).sum(-1)


@register_transport(MixtureSameFamily, lambda q: 1 + num_uniforms(q.component_distribution), differentiable=False)
def mixture(q: MixtureSameFamily, u: Tensor) -> Tensor:
    """Return a point of the component that the first uniform number picks. All components share the other numbers."""
    picked = categorical(q.mixture_distribution, u[..., :1])
    events = len(q.event_shape)
    each = u[..., 1:].unsqueeze(-2).expand(*u.shape[:-1], q._num_component, u.shape[-1] - 1)
    x = transport(q.component_distribution, each, differentiable=False)
    index = picked.reshape(picked.shape + (1,) * (events + 1))
    return torch.take_along_dim(x, index, -1 - events).squeeze(-1 - events)
