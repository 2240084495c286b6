"""HalfNormal‖HalfNormal."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributions import HalfNormal

from torch_klloss.closed_forms.formula import register_formula
from torch_klloss.numerics.blocks import Derivatives
from torch_klloss.numerics.elementary import excess_of_squares, quotient


@register_formula(HalfNormal, "scale", guards=("p.scale",))
def kl(needs: Sequence[bool], q_scale: Tensor, p_scale: Tensor) -> tuple[Tensor, Derivatives]:
    """½ x² + x - log(1 + x) with x = (σq - σp)/σp: the KL of the two Normals around 0."""
    half, value = excess_of_squares(q_scale, p_scale)
    by_q = quotient(half, q_scale, times=2) if needs[0] else None
    return value, (by_q, quotient(half, p_scale, times=-2) if needs[1] else None)
