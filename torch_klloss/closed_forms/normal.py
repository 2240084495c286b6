"""Normal‖Normal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Normal

from torch_klloss.closed_forms.analytic import analytic
from torch_klloss.closed_forms.registry import register_kl


@register_kl(Normal, Normal)
def _normal_normal(q: Normal, p: Normal) -> Tensor:
    """½ ((μq - μp)/σp)² + ½ x² + x - log(1 + x) with x = (σq - σp)/σp: three terms, each ≥ 0.

    Every difference is taken before anything is rounded, so that the KL is exactly 0 at q = p and keeps its
    digits near it.
    """
    return _kl(q.loc, q.scale, p.loc, p.scale)


def _partials(
    needs: Sequence[bool], q_loc: Tensor, q_scale: Tensor, p_loc: Tensor, p_scale: Tensor
) -> Sequence[Tensor | None]:
    by_q_loc = by_q_scale = by_p_loc = by_p_scale = None
    distance = (q_loc - p_loc) / p_scale
    x = (q_scale - p_scale) / p_scale
    if needs[0] or needs[2]:
        by_q_loc = distance / p_scale
        by_p_loc = -by_q_loc if needs[2] else None
    if needs[1]:
        by_q_scale = x * (p_scale.reciprocal() + q_scale.reciprocal())
    if needs[3]:
        by_p_scale = -(x * (2 + x) + distance * distance) / p_scale
    return by_q_loc, by_q_scale, by_p_loc, by_p_scale


@analytic(_partials)
def _kl(q_loc: Tensor, q_scale: Tensor, p_loc: Tensor, p_scale: Tensor) -> Tensor:
    distance = (q_loc - p_loc) / p_scale
    wide_q, wide_p = q_scale.double(), p_scale.double()  # float32 in float64: its x - log(1 + x) needs no series
    gap = wide_p - wide_q
    x = gap / wide_p  # with the sign turned, so that log(1 + gap/σq) = -log(σq/σp) holds where σq is tiny too
    spread = torch.log1p(gap / wide_q) - x
    if q_scale.dtype == torch.float64:
        spread = torch.where(x.abs() < 0.125, _x_minus_log1p_near_zero(-x), spread)
    spread = torch.addcmul(spread, x, x, value=0.5)
    return torch.addcmul(spread.to(distance.dtype), distance, distance, value=0.5)


def _x_minus_log1p_near_zero(x: Tensor) -> Tensor:
    """With s = x/(2 + x), log(1 + x) = 2 artanh s and x = 2s/(1 - s): xs - 2s³ (1/3 + s²/5 + s⁴/7 + …)."""
    s = x / (2 + x)
    square = s * s
    series = torch.full_like(square, 1 / 17)
    for k in (15, 13, 11, 9, 7, 5, 3):
        series = torch.addcmul(torch.full_like(square, 1 / k), series, square)
    return x * s - 2 * s * square * series
