"""Pairs whose KL is infinite: p's support does not reach where q has mass, whatever the parameters."""

from __future__ import annotations

import torch
import torch.distributions as dist
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    ContinuousBernoulli,
    Distribution,
    Exponential,
    Gamma,
    Gumbel,
    Laplace,
    Normal,
    Pareto,
    Poisson,
    Uniform,
)
from torch.nn.functional import softplus

from torch_klloss.closed_forms.cross_family.registration import FAMILIES, parameters_of
from torch_klloss.closed_forms.registry import _RULES, register_kl
from torch_klloss.distributions.given import as_given
from torch_klloss.distributions.tensors import dtype_of
from torch_klloss.numerics.elementary import infinity

# q: where it has mass and these have none: below a Pareto's first point, beyond an interval, below 0.
_INFINITE: dict[type[Distribution], tuple[type[Distribution], ...]] = {
    Beta: (Pareto,),
    ContinuousBernoulli: (Pareto,),
    Exponential: (Beta, ContinuousBernoulli, Pareto, Uniform),
    Gamma: (Beta, ContinuousBernoulli, Pareto, Uniform),
    Pareto: (Beta, ContinuousBernoulli, Uniform),
    Gumbel: (Beta, ContinuousBernoulli, Exponential, Gamma, Pareto, Uniform),
    Laplace: (Beta, ContinuousBernoulli, Exponential, Gamma, Pareto, Uniform),
    Normal: (Beta, ContinuousBernoulli, Exponential, Gamma, Pareto, Uniform),
}


def _infinite(q: Distribution, p: Distribution) -> Tensor:
    """Infinite: q has mass where p has none."""
    value = infinity(*parameters_of(q), *parameters_of(p))
    return value.to(torch.promote_types(dtype_of(q), dtype_of(p)))


for _type_q, _types_p in _INFINITE.items():
    for _type_p in _types_p:
        register_kl(_type_q, _type_p)(_infinite)


@register_kl(Poisson, Bernoulli)
@register_kl(Poisson, Binomial)
def _poisson_binomial(q: Poisson, p: Bernoulli | Binomial) -> Tensor:
    """Infinite, but -n log(1 - p) at rate 0, where q is the point 0; a Bernoulli has n = 1."""
    is_finite = q.rate == 0
    param, is_probs = as_given(p)
    count = p.total_count if isinstance(p, Binomial) else torch.ones_like(param)
    kept = torch.where(is_finite & (count > 0), param, 0.0)
    at_zero = count * (-torch.log1p(-kept) if is_probs else softplus(kept))
    at_zero = torch.where(count > 0, at_zero, 0.0)
    value = torch.where(is_finite & ~param.isnan(), at_zero, infinity(q.rate, count, param))
    return value.to(torch.promote_types(dtype_of(q), dtype_of(p)))


Types = tuple[type[Distribution], ...]

_LINE: Types = (dist.Normal, dist.Laplace, dist.Gumbel, dist.StudentT, dist.Cauchy)
_LIGHT: Types = (dist.Exponential, dist.Gamma)  # -log p grows as x
_HALF_LINE: Types = (
    *_LIGHT,
    dist.FisherSnedecor,
    dist.HalfCauchy,
    dist.HalfNormal,
    dist.InverseGamma,
    dist.LogNormal,
    dist.Weibull,
)
_UNIT: Types = (dist.Beta, dist.ContinuousBernoulli, dist.Kumaraswamy)
_MOVING: Types = (dist.Uniform, dist.Pareto)
_CIRCLE: Types = (dist.VonMises,)
# A density that is neither 0 nor infinite at 0, against one whose -log grows as 1/x.
_FLAT_AT_ZERO: Types = (dist.Exponential, dist.HalfNormal, dist.HalfCauchy, dist.ContinuousBernoulli)

INFINITE: list[tuple[Types, Types]] = [
    (_LINE, (*_HALF_LINE, *_UNIT, *_MOVING, *_CIRCLE, dist.GeneralizedPareto)),
    (_HALF_LINE, (*_UNIT, *_MOVING, *_CIRCLE)),
    ((dist.Pareto,), (*_UNIT, dist.Uniform, *_CIRCLE)),
    (_UNIT, (dist.Pareto,)),
    (_CIRCLE, (*_HALF_LINE, *_UNIT, dist.Pareto)),
    ((dist.Cauchy, dist.HalfCauchy), (dist.Normal, dist.Laplace, dist.Gumbel)),
    ((dist.HalfCauchy,), (dist.HalfNormal, *_LIGHT)),
    ((dist.StudentT,), (dist.Gumbel,)),
    (_FLAT_AT_ZERO, (dist.InverseGamma,)),
]


def register_infinite() -> None:
    """Register the pairs of `INFINITE` that have no rule of ours yet."""
    for types_q, types_p in INFINITE:
        for type_q in types_q:
            for type_p in types_p:
                if (type_q, type_p) not in _RULES:
                    register_kl(type_q, type_p)(_infinite_by_tails)


def _infinite_by_tails(q: Distribution, p: Distribution) -> Tensor:
    """Infinite: q has mass where p has none, or tails that are too heavy for p."""
    value = infinity(*_parameters(q), *_parameters(p))
    return value.to(torch.promote_types(dtype_of(q), dtype_of(p)))


def _parameters(d: Distribution) -> tuple[Tensor, ...]:
    family = next(FAMILIES[cls] for cls in type(d).__mro__ if cls in FAMILIES)
    return tuple(t.double() for t in family.parameters_of(d))
