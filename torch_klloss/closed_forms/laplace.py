"""Laplace‖Laplace."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Laplace

from torch_klloss.closed_forms.formula import register_formula
from torch_klloss.numerics.blocks import Derivatives
from torch_klloss.numerics.elementary import excess, narrowed, quotient, sign_of
from torch_klloss.numerics.exponentials import decay
from torch_klloss.numerics.quick_kernels import narrow_or_wide


@register_formula(Laplace, "loc", "scale", guards=("p.scale",))
@narrow_or_wide
def kl(
    needs: Sequence[bool], q_loc: Tensor, q_scale: Tensor, p_loc: Tensor, p_scale: Tensor
) -> tuple[Tensor, Derivatives]:
    """(bq/bp) (exp(-t) - 1 + t) + bq/bp - 1 - log(bq/bp) with t = |μq - μp|/bq: two parts, each ≥ 0.

    References:
        *Rényi divergence measures for commonly used univariate continuous distributions* (Gil, Alajaji and Linder,
        2013), rearranged.
    """
    ratio, x, spread = (narrowed(t, q_loc) for t in excess(q_scale, p_scale))
    distance = q_loc - p_loc
    sign = sign_of(distance)  # not abs, which would hide the second derivative at 0
    minus_t = quotient(sign * distance, q_scale, times=-1)
    lost, lead = decay(minus_t)
    value = torch.addcmul(spread, ratio, lead)
    by_p_loc = sign * lost / p_scale if needs[0] or needs[2] else None
    by_q_loc = -by_p_loc if by_p_loc is not None and needs[0] else None
    by_q_scale = by_p_scale = None
    if needs[1]:
        by_q_scale = torch.addcdiv(torch.addcmul(lead, minus_t, lost, value=-1) / p_scale, x, q_scale)
    if needs[3]:
        by_p_scale = quotient(torch.addcmul(x, ratio, lead), p_scale, times=-1)
    return value, (by_q_loc, by_q_scale, by_p_loc if needs[2] else None, by_p_scale)
