"""Uniform‖Uniform."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Uniform

from torch_klloss.closed_forms.formula import register_formula
from torch_klloss.numerics.blocks import Derivatives
from torch_klloss.numerics.elementary import may_be_negative, nan_below_zero, replaced


@register_formula(Uniform, "low", "high", guards=())
def kl(
    needs: Sequence[bool], q_low: Tensor, q_high: Tensor, p_low: Tensor, p_high: Tensor
) -> tuple[Tensor, Derivatives]:
    """log(1 + (the gaps that p leaves on both sides of q) / (the width of q)); inf where p does not contain q.

    There the gradient is 0.
    """
    below, above, width, p_width = q_low - p_low, p_high - q_high, q_high - q_low, p_high - p_low
    narrower, gaps = torch.minimum(below, above), below + above
    outside = None
    if may_be_negative(narrower):  # as where p is no interval
        outside, width, p_width = narrower < 0, nan_below_zero(width), nan_below_zero(p_width)
        gaps = torch.where(outside, p_width + torch.inf, gaps)
    value = torch.log1p(gaps / width)
    by_q = _slope(width, outside) if needs[0] or needs[1] else None
    by_p = _slope(p_width, outside) if needs[2] or needs[3] else None
    signed = (by_q, None if by_q is None else -by_q, None if by_p is None else -by_p, by_p)
    return value, tuple(d if need else None for d, need in zip(signed, needs, strict=True))


def _slope(width: Tensor, outside: Tensor | None) -> Tensor:
    return width.reciprocal() if outside is None else replaced(width.reciprocal(), outside, 0.0)
