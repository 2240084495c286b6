"""Cauchy‖Cauchy and HalfCauchy‖HalfCauchy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Cauchy, HalfCauchy

from torch_klloss.closed_forms.formula import register_formula
from torch_klloss.numerics.blocks import Derivatives
from torch_klloss.numerics.elementary import log1p, product, quotient
from torch_klloss.numerics.quick_kernels import narrow_or_wide


@register_formula(Cauchy, "loc", "scale", guards=("q.scale", "p.scale"))
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
    square = torch.addcmul((gap / q_scale) * (gap / p_scale), distance / q_scale, distance / p_scale)
    value = log1p(0.25 * square)
    if not any(needs):
        return value, (None,) * 4
    total = q_scale + p_scale
    x, r = gap / total, distance / total
    square = r * r
    by_q_loc = quotient(r, torch.addcmul(total, total, square), times=2) if needs[0] or needs[2] else None
    by_p_loc = -by_q_loc if by_q_loc is not None and needs[2] else None
    by_q_scale = (x - square) / torch.addcmul(q_scale, q_scale, square) if needs[1] else None
    by_p_scale = quotient(x + square, torch.addcmul(p_scale, p_scale, square), times=-1) if needs[3] else None
    return value, (by_q_loc if needs[0] else None, by_q_scale, by_p_loc, by_p_scale)


@register_formula(HalfCauchy, "scale", guards=("q.scale", "p.scale"))
@narrow_or_wide
def half_kl(needs: Sequence[bool], q_scale: Tensor, p_scale: Tensor) -> tuple[Tensor, Derivatives]:
    """log(1 + (σq - σp)² / (4 σq σp)): by symmetry, the KL of the two Cauchy distributions around 0."""
    gap = q_scale - p_scale
    x = gap / (q_scale + p_scale) if any(needs) else gap
    value = log1p(product(gap / q_scale, gap / p_scale, times=0.25))
    return value, (x / q_scale if needs[0] else None, quotient(x, p_scale, times=-1) if needs[1] else None)
