"""Normal‖Normal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Normal

from torch_klloss.closed_forms.formula import register_formula
from torch_klloss.numerics.blocks import Derivatives
from torch_klloss.numerics.elementary import excess_of_squares, quotient


def kernel(
    needs: Sequence[bool], q_loc: Tensor, q_scale: Tensor, p_loc: Tensor, p_scale: Tensor
) -> tuple[Tensor, Derivatives]:
    """½ ((μq - μp)/σp)² + ½ x² + x - log(1 + x) with x = (σq - σp)/σp: three terms, each ≥ 0.

    Every difference is taken before anything is rounded, so that the KL is exactly 0 at q = p and keeps its
    digits near it.
    """
    (half, spread), distance = excess_of_squares(q_scale, p_scale), (q_loc - p_loc) / p_scale
    value = torch.addcmul(spread, distance, distance, value=0.5)
    by_q_loc = distance / p_scale if needs[0] or needs[2] else None
    by_p_loc = -by_q_loc if by_q_loc is not None and needs[2] else None
    by_q_scale = quotient(half, q_scale, times=2) if needs[1] else None
    by_p_scale = None
    if needs[3]:
        by_p_scale = quotient(torch.addcmul(half, distance, distance, value=0.5), p_scale, times=-2)
    return value, (by_q_loc if needs[0] else None, by_q_scale, by_p_loc, by_p_scale)


kl = register_formula(Normal, "loc", "scale", guards=("p.scale",))(kernel)
