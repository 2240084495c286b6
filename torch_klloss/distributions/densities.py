"""Log-densities that stay accurate far out in the tails and close to the ends, where torch's are not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import (
    Beta,
    ContinuousBernoulli,
    Dirichlet,
    Distribution,
    FisherSnedecor,
    Gamma,
    GeneralizedPareto,
    Independent,
    InverseGamma,
    Kumaraswamy,
    MixtureSameFamily,
    TransformedDistribution,
    Uniform,
    VonMises,
    Weibull,
    constraints,
    transform_to,
)
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli
from torch.nn.functional import logsigmoid

from torch_klloss.distributions.impossible import is_impossible
from torch_klloss.distributions.located import Located, located, log1m_power
from torch_klloss.distributions.maps import log_slope, preimage
from torch_klloss.distributions.pushforward import is_a
from torch_klloss.distributions.stated_supports import believed_support, innermost, is_discrete, support_of
from torch_klloss.distributions.supports import Bounds, bounds_of, is_within, log_prob_at, takes_integers
from torch_klloss.distributions.tensors import dtype_of, unvalidated
from torch_klloss.distributions.transforms import parts_of
from torch_klloss.numerics.devices import scalar
from torch_klloss.numerics.dimensions import sum_last
from torch_klloss.numerics.elementary import magnitude


def log_density(
    d: Distribution, x: Tensor | Located, contains_support: bool | Tensor | None, shape: torch.Size | None = None
) -> Tensor:
    """Return log d(x) `[*sample, *batch]`, -inf outside d's support, whatever validation d was built with.

    Args:
        d: the distribution.
        x: points `[*sample, *batch, *event]`.
        contains_support: what `contained` returned for the distribution that the points belong to.
        shape: of the result; by default that of the points without their event, broadcast to d's batch.

    Raises:
        LogProbError: if d.log_prob returns another shape.
    """
    x = located(x)
    shape = _shape_of(d, x) if shape is None else shape
    if not x.x.is_floating_point() and not takes_integers(d):
        x = Located(x.x.to(dtype_of(d)))
    d = unvalidated(d)
    support = None if contains_support is True else believed_support(d)
    if support is None:
        return log_density_within(d, x, shape)
    if isinstance(d, MixtureSameFamily):
        return _mixture(d, x, None)
    inside, kept = _moved_inside(d, support, x, contains_support, shape)
    return torch.where(inside, log_density_within(d, kept, shape), -math.inf)


def log_density_within(d: Distribution, x: Tensor | Located, shape: torch.Size | None = None) -> Tensor:
    """Return log d(x) `[*sample, *batch]` at points within d's support.

    Args:
        d: the distribution, unvalidated.
        x: points `[*sample, *batch, *event]`.
        shape: of the result, as for `log_density`.
    """
    x = located(x)
    for cls in type(d).__mro__:
        if cls in _FORMULAS and type(d).log_prob is cls.log_prob:
            return _FORMULAS[cls](d, x)
    if is_a(d, TransformedDistribution):
        return _transformed(d, x)
    log_prob = log_prob_at(d, x.x, _shape_of(d, x) if shape is None else shape)
    impossible = is_impossible(d, x.x)
    return log_prob if impossible is None else torch.where(impossible, -math.inf, log_prob)


def _shape_of(d: Distribution, x: Located) -> torch.Size:
    return torch.broadcast_shapes(x.x.shape[: x.x.dim() - len(d.event_shape)], d.batch_shape)


def _moved_inside(
    d: Distribution, support: Any, x: Located, contains_support: bool | Tensor | None, shape: torch.Size
) -> tuple[Tensor, Located]:
    """Return which points lie inside, and the points with the others moved there: their NaN gradient would stay."""
    bounds, event_dims = bounds_of(d), len(d.event_shape)
    if bounds is None or is_discrete(d):
        inside = support.check(x.x)
    else:  # tighter than the constraint of a family whose density ends earlier
        inside = is_within(x.x, bounds)
        inside = inside.flatten(-event_dims).all(-1) if event_dims else inside
    if inside.shape != shape:  # a support that does not check whole events is as good as unknown
        inside = torch.ones((), dtype=torch.bool, device=x.x.device).expand(shape)
    if isinstance(contains_support, Tensor):
        inside = inside | contains_support
    mask = inside.reshape(inside.shape + (1,) * event_dims)
    return inside, x.inside(mask, _interior_point(support, bounds, x.x))


def point_inside(d: Distribution, x: Tensor) -> Tensor:
    """Return points inside the support of d, of the shape of x; x itself if none is known."""
    support = support_of(d)
    return x if support is None else _interior_point(support, bounds_of(d), x).to(x)


def _interior_point(support: constraints.Constraint, bounds: Bounds | None, x: Tensor) -> Tensor:
    """Return points inside the support, of the shape of x; x itself if none is known."""
    if not innermost(support).is_discrete:
        try:
            to_support = transform_to(support)
            return to_support(x.new_zeros(to_support.inverse_shape(x.shape)))
        except NotImplementedError:
            return x
    if bounds is None:
        return x
    lower, upper = (scalar(end, x.device, x.dtype) for end in (bounds.lower, bounds.upper))
    return torch.where(lower.isfinite(), lower, torch.where(upper.isfinite(), upper, 0.0))


def _independent(d: Independent, x: Located) -> Tensor:
    return sum_last(log_density_within(d.base_dist, x), d.reinterpreted_batch_ndims)


def _mixture(d: MixtureSameFamily, x: Located, is_shared: Literal[True] | None) -> Tensor:
    """Return log d(x), the components -inf outside their own supports (torch's check requires all).

    Args:
        d: the mixture.
        x: the points.
        is_shared: whether all components are known to have the points in their supports.
    """
    log_components = log_density(d.component_distribution, x.map(d._pad), is_shared)
    terms = log_components + torch.log_softmax(d.mixture_distribution.logits, -1)
    inside = (terms > -math.inf).any(-1) | terms.isnan().any(-1)
    return torch.where(inside, torch.where(inside.unsqueeze(-1), terms, 0.0).logsumexp(-1), -math.inf)


def _transformed(d: TransformedDistribution, x: Located) -> Tensor:
    """Return log d(x) through the points that x is the image of; torch's inverse rounds where the image did."""
    log_prob: Tensor | float = 0.0
    event_dims = len(d.event_shape)
    for t in reversed(parts_of(d.transforms)):
        y = preimage(t, x)
        event_dims += t.domain.event_dim - t.codomain.event_dim
        log_prob = log_prob - sum_last(log_slope(t, y, x), event_dims - t.domain.event_dim)
        x = y
    base = log_density_within(d.base_dist, x)
    return log_prob + sum_last(base, event_dims - len(d.base_dist.event_shape))


def _uniform(d: Uniform, x: Located) -> Tensor:
    """Return log d(x); torch's is -inf at the upper end, which draws of another distribution round to."""
    return torch.zeros_like(x.x) - (d.high - d.low).log()


def _power(exponent: Tensor, log: Tensor) -> Tensor:
    """Return the logarithm of a power, where the power 0 of 0 is 1."""
    return exponent * torch.where((exponent == 0) & log.isinf(), 0.0, log)


def _beta(d: Beta, x: Located) -> Tensor:
    """Return log d(x); torch's rounds 1 - x."""
    a, b = d.concentration1, d.concentration0
    log_norm = a.lgamma() + b.lgamma() - (a + b).lgamma()
    return _power(a - 1, x.log_from(0.0)) + _power(b - 1, x.log_to(1.0)) - log_norm


def _dirichlet(d: Dirichlet, x: Located) -> Tensor:
    """Return log d(x), from the logarithms."""
    a = d.concentration
    return _power(a - 1, x.log_from(0.0)).sum(-1) + a.sum(-1).lgamma() - a.lgamma().sum(-1)


def _gamma(d: Gamma, x: Located) -> Tensor:
    """Return log d(x), from the logarithm."""
    a, log_x = d.concentration, x.log_from(0.0)
    return a * d.rate.log() + _power(a - 1, log_x) - d.rate * x.x - a.lgamma()


def _fisher_snedecor(d: FisherSnedecor, x: Located) -> Tensor:
    """Return log d(x), from the logarithm."""
    a, b, log_x = d.df1 / 2, d.df2 / 2, x.log_from(0.0)
    log_ratio = log_x + (d.df1 / d.df2).log()
    log_norm = a.lgamma() + b.lgamma() - (a + b).lgamma()
    return a * log_ratio + (a + b) * logsigmoid(-log_ratio) - log_x - log_norm


def _generalized_pareto(d: GeneralizedPareto, x: Located) -> Tensor:
    """Return log d(x); torch's refuses every dtype but the default one."""
    c, z = d.concentration, (x.x - d.loc) / d.scale
    is_zero = c.abs() < 1e-12
    kept = torch.where(is_zero, 1.0, c)
    bent = (1 + 1 / kept) * torch.log1p(torch.where(is_zero, 0.0, kept * z))
    return -torch.where(is_zero, z * (1 + c * (1 - z / 2)), bent) - d.scale.log()


def _inverse_gamma(d: InverseGamma, x: Located) -> Tensor:
    """Return log d(x); torch's loses the slope of 1/x where that underflows."""
    a, rate, log_x = d.concentration, d.rate, x.log_from(0.0)
    return a * rate.log() - a.lgamma() - (a + 1) * log_x - rate * (-log_x).exp()


def _weibull(d: Weibull, x: Located) -> Tensor:
    """Return log d(x); torch's loses the slope of a power where that underflows."""
    k, log_ratio = d.concentration, x.log_from(0.0) - d.scale.log()
    return k.log() - d.scale.log() + (k - 1) * log_ratio - (k * log_ratio).exp()


def _kumaraswamy(d: Kumaraswamy, x: Located) -> Tensor:
    """Return log d(x); torch's computes a chain of powers that rounds to infinity near 0 and 1."""
    a, b = d.concentration1, d.concentration0
    return a.log() + b.log() + _power(a - 1, x.log_from(0.0)) + _power(b - 1, log1m_power(x, a))


def _von_mises(d: VonMises, x: Located) -> Tensor:
    """Return log d(x); torch's normaliser has seven digits."""
    c = d.concentration
    return -2 * c * torch.sin((x.x - d.loc) / 2) ** 2 - torch.special.i0e(c).log() - math.log(2 * math.pi)


def _logit_relaxed_bernoulli(d: LogitRelaxedBernoulli, x: Located) -> Tensor:
    """Return log d(x); torch's overflows where the gap is large."""
    gap = d.logits - d.temperature * x.x
    return torch.as_tensor(d.temperature).log() + logsigmoid(gap) + logsigmoid(-gap)


def _continuous_bernoulli(d: ContinuousBernoulli, x: Located) -> Tensor:
    """Return log d(x); torch's loses its normaliser at log-odds beyond 30."""
    half = magnitude(d.logits) / 2
    near = half < 0.03  # three terms of the series of log(sinh(h)/h) are enough here
    square, far = half**2, torch.where(near, 1.0, half)
    series = square / 6 - square**2 / 180 + square**3 / 2835
    log_norm = torch.where(near, series, far + torch.log1p(-torch.exp(-2 * far)) - (2 * far).log())
    return d.logits * (x.x - 0.5) - log_norm


_FORMULAS: dict[type[Distribution], Callable[[Any, Located], Tensor]] = {
    Beta: _beta,
    ContinuousBernoulli: _continuous_bernoulli,
    Dirichlet: _dirichlet,
    FisherSnedecor: _fisher_snedecor,
    Gamma: _gamma,
    GeneralizedPareto: _generalized_pareto,
    Independent: _independent,
    InverseGamma: _inverse_gamma,
    Kumaraswamy: _kumaraswamy,
    LogitRelaxedBernoulli: _logit_relaxed_bernoulli,
    MixtureSameFamily: lambda d, x: _mixture(d, x, None if bounds_of(d) is None else True),
    Uniform: _uniform,
    VonMises: _von_mises,
    Weibull: _weibull,
}
