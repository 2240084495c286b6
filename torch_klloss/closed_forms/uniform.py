"""Uniform‖Uniform."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Uniform

from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.numerics.custom_gradient import custom_gradient
from torch_klloss.numerics.elementary import at_least, common_dtype


@register_kl(Uniform, Uniform)
def _uniform_uniform(q: Uniform, p: Uniform) -> Tensor:
    """log(1 + (the gaps that p leaves on both sides of q) / (the width of q)); inf where p does not contain q.

    There the gradient is 0.
    """
    return _kl(q.low, q.high, p.low, p.high)


def _partials(
    needs: Sequence[bool], q_low: Tensor, q_high: Tensor, p_low: Tensor, p_high: Tensor
) -> Sequence[Tensor | None]:
    outside = (q_low < p_low) | (q_high > p_high)
    by_q = torch.where(outside, 0.0, 1 / (q_high.double() - q_low.double())) if needs[0] or needs[1] else None
    by_p = torch.where(outside, 0.0, 1 / (p_high.double() - p_low.double())) if needs[2] or needs[3] else None
    signed = (by_q, None if by_q is None else -by_q, None if by_p is None else -by_p, by_p)
    return tuple(d if need else None for d, need in zip(signed, needs, strict=True))


@custom_gradient(_partials)
def _kl(q_low: Tensor, q_high: Tensor, p_low: Tensor, p_high: Tensor) -> Tensor:
    low, high = q_low.double(), q_high.double()
    below, above = low - p_low.double(), p_high.double() - high
    gaps = at_least(below, 0.0) + at_least(above, 0.0)
    value = torch.where((below < 0) | (above < 0), torch.inf, torch.log1p(gaps / (high - low)))
    return value.to(common_dtype(q_low, q_high, p_low, p_high))
