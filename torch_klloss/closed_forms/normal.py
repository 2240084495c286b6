"""Normal‖Normal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Normal

from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.numerics.custom_gradient import custom_gradient
from torch_klloss.numerics.elementary import ABOVE_MINUS_ONE, has_float64, x_minus_log1p
from torch_klloss.numerics.tracing import is_traced


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
    distance = (q_loc - p_loc) / p_scale
    x = (q_scale - p_scale) / p_scale
    by_q_loc = distance / p_scale if needs[0] or needs[2] else None
    by_p_loc = -by_q_loc if by_q_loc is not None and needs[2] else None
    by_q_scale = x / p_scale + x / q_scale if needs[1] else None
    by_p_scale = -(x * (2 + x) + distance * distance) / p_scale if needs[3] else None
    return by_q_loc, by_q_scale, by_p_loc, by_p_scale


@custom_gradient(_partials)
def _kl(q_loc: Tensor, q_scale: Tensor, p_loc: Tensor, p_scale: Tensor) -> Tensor:
    # Where autograd and tracing record nothing, buffers that are not needed any more are written over.
    alike = q_loc.shape == q_scale.shape == p_loc.shape == p_scale.shape and q_loc.dtype == p_scale.dtype
    reuse = alike and not is_traced()
    distance = q_loc - p_loc
    distance = torch.div(distance, p_scale, out=distance if reuse else None)
    wide_q, wide_p = q_scale.double(), p_scale.double()  # float32 in float64: its x - log(1 + x) needs no series
    gap = wide_p - wide_q
    x = gap / wide_p  # with the sign turned, so that log(1 + gap/σq) = -log(σq/σp) holds where σq is tiny too
    into = gap if reuse else None
    ratio = torch.clamp(torch.div(gap, wide_q, out=into), min=ABOVE_MINUS_ONE, out=into)  # -1 if σq is beyond 1e16 σp
    spread = torch.sub(torch.log1p(ratio, out=into), x, out=into)
    if has_float64(q_scale, p_scale):
        is_near = x.abs() < 0.125  # the branch not taken must be finite, or its derivative is NaN
        spread = torch.where(is_near, x_minus_log1p(torch.where(is_near, -x, 0.0)), spread)
    spread = torch.addcmul(spread, x, x, value=0.5, out=into)
    spread = spread.to(distance.dtype)
    return torch.addcmul(spread, distance, distance, value=0.5, out=spread if reuse else None)
