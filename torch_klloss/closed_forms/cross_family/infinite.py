"""Pairs whose KL is infinite: p's support does not reach where q has mass, whatever the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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

from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.distributions.given import as_given
from torch_klloss.distributions.tensors import dtype_of
from torch_klloss.numerics.elementary import log_ratio

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


def parameters_of(d: Distribution) -> tuple[Tensor, ...]:
    """Return the parameters of d in float64, from those that it was built from.

    They are torch's, but log-odds for a ContinuousBernoulli, and for a Bernoulli the probabilities of 1 and of 0.
    """
    for cls in type(d).__mro__:
        if cls in _PARAMETERS:
            return tuple(t.double() for t in _PARAMETERS[cls](d))
    raise NotImplementedError(f"no parameters are known for {type(d).__name__}")


def _probabilities(d: Bernoulli) -> tuple[Tensor, Tensor]:
    param, is_probs = as_given(d)
    param = param.double()
    return (param, 1 - param) if is_probs else (param.sigmoid(), (-param).sigmoid())


def _log_odds(d: ContinuousBernoulli) -> tuple[Tensor]:
    param, is_probs = as_given(d)
    param = param.double()
    return (log_ratio(param, 1 - param, 2 * param - 1) if is_probs else param,)


_PARAMETERS: dict[type[Distribution], Callable[[Any], tuple[Tensor, ...]]] = {
    Bernoulli: _probabilities,
    Beta: lambda d: (d.concentration1, d.concentration0),
    ContinuousBernoulli: _log_odds,
    Exponential: lambda d: (d.rate,),
    Gamma: lambda d: (d.concentration, d.rate),
    Gumbel: lambda d: (d.loc, d.scale),
    Laplace: lambda d: (d.loc, d.scale),
    Normal: lambda d: (d.loc, d.scale),
    Pareto: lambda d: (d.scale, d.alpha),
    Poisson: lambda d: (d.rate,),
    Uniform: lambda d: (d.low, d.high),
}


def infinity(*parameters: Tensor) -> Tensor:
    """Return inf in the broadcast shape of the parameters, NaN where one of them is; its gradient is 0."""
    value = torch.full((), torch.inf, dtype=parameters[0].dtype, device=parameters[0].device)
    for parameter in parameters:
        value = torch.where(parameter.isnan(), parameter, value)
    return value


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
