"""Families of counts, Bernoulli and Poisson, and the pairs of unlike ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributions as dist
from torch import Tensor
from torch.nn.functional import softplus

from torch_klloss.closed_forms.cross_family.registration import Family, cross_family, nowhere
from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.distributions.given import as_given
from torch_klloss.distributions.tensors import dtype_of
from torch_klloss.numerics.elementary import infinity
from torch_klloss.numerics.moments import generalised_kl
from torch_klloss.numerics.rounded import Rounded


class _Bernoulli(Family, of=dist.Bernoulli, placeholders=(0.5, 0.5)):
    """The parameters are the probabilities of 1 and of 0, both to all digits where the logits were given."""

    one: Rounded
    zero: Rounded

    @classmethod
    def parameters_of(cls, d: Any) -> tuple[Tensor, ...]:
        param, is_probs = as_given(d)
        param = param.double()
        return (param, 1 - param) if is_probs else (param.sigmoid(), (-param).sigmoid())


class _Poisson(Family, of=dist.Poisson, placeholders=(1.0,)):
    """It takes part in written formulas alone."""

    rate: Rounded


@cross_family(dist.Bernoulli, dist.Poisson, infinite=nowhere)
def _bernoulli_poisson(one: Tensor, zero: Tensor, rate: Tensor) -> Tensor:
    """With q the probability of 1, q log(q/λ) - q + λ and the same of 1 - q and 1: two parts, each ≥ 0."""
    gap = torch.where(one > 0.5, (1 - rate) - zero, one - rate)
    return generalised_kl(one, rate, gap) + generalised_kl(zero, torch.ones_like(zero), -one)


@register_kl(dist.Poisson, dist.Bernoulli)
@register_kl(dist.Poisson, dist.Binomial)
def _poisson_binomial(q: dist.Poisson, p: dist.Bernoulli | dist.Binomial) -> Tensor:
    """Infinite, but -n log(1 - p) at rate 0, where q is the point 0; a Bernoulli has n = 1."""
    is_finite = q.rate == 0
    param, is_probs = as_given(p)
    count = p.total_count if isinstance(p, dist.Binomial) else torch.ones_like(param)
    kept = torch.where(is_finite & (count > 0), param, 0.0)
    at_zero = count * (-torch.log1p(-kept) if is_probs else softplus(kept))
    at_zero = torch.where(count > 0, at_zero, 0.0)
    value = torch.where(is_finite & ~param.isnan(), at_zero, infinity(q.rate, count, param))
    return value.to(dtype_of(q, p))
