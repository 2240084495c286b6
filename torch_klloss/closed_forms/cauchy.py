"""Cauchy‖Cauchy and HalfCauchy‖HalfCauchy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Cauchy, HalfCauchy

from torch_klloss.closed_forms.formula import register_formula
from torch_klloss.numerics.blocks import Derivatives
from torch_klloss.numerics.quick_kernels import narrow_or_wide


@register_formula(Cauchy, "loc", "scale")
@narrow_or_wide
def kl(
    needs: Sequence[bool], q_loc: Tensor, q_scale: Tensor, p_loc: Tensor, p_scale: Tensor
) -> tuple[Tensor, Derivatives]:
    """log(1 + ((σq - σp)² + (μq - μp)²) / (4 σq σp)).

    References:
        *A closed-form formula for the Kullback-Leibler divergence between Cauchy distributions* (Chyzak and
        Nielsen, 2019).
    """
    distance, gap = q_loc - p_loc, q_scale - p_scale
    value = torch.log1p((gap / q_scale * (gap / p_scale) + distance / q_scale * (distance / p_scale)) / 4)
    if not any(needs):
        return value, (None,) * 4
    total = q_scale + p_scale
    x, r = gap / total, distance / total
    square = r * r
    by_q_loc = 2 * r / (total * (1 + square)) if needs[0] or needs[2] else None
    by_p_loc = -by_q_loc if by_q_loc is not None and needs[2] else None
    by_q_scale = (x - square) / (q_scale * (1 + square)) if needs[1] else None
    by_p_scale = -(x + square) / (p_scale * (1 + square)) if needs[3] else None
    return value, (by_q_loc if needs[0] else None, by_q_scale, by_p_loc, by_p_scale)


@register_formula(HalfCauchy, "scale")
@narrow_or_wide
def half_kl(needs: Sequence[bool], q_scale: Tensor, p_scale: Tensor) -> tuple[Tensor, Derivatives]:
    """log(1 + (σq - σp)² / (4 σq σp)): by symmetry, the KL of the two Cauchy distributions around 0."""
    gap = q_scale - p_scale
    x = gap / (q_scale + p_scale) if any(needs) else gap
    value = torch.log1p(gap / q_scale * (gap / p_scale) / 4)
    return value, (x / q_scale if needs[0] else None, -x / p_scale if needs[1] else None)
