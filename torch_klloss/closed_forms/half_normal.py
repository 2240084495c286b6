"""HalfNormal‖HalfNormal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import HalfNormal

from torch_klloss.closed_forms.formula import register_formula
from torch_klloss.numerics.blocks import Derivatives
from torch_klloss.numerics.elementary import excess


@register_formula(HalfNormal, "scale")
def kl(needs: Sequence[bool], q_scale: Tensor, p_scale: Tensor) -> tuple[Tensor, Derivatives]:
    """½ x² + x - log(1 + x) with x = (σq - σp)/σp: the KL of the two Normals around 0."""
    _, x, spread = excess(q_scale, p_scale)
    value, x = torch.addcmul(spread, x, x, value=0.5), x.to(q_scale.dtype)
    by_q = x / p_scale + x / q_scale if needs[0] else None
    return value, (by_q, -x / p_scale * (2 + x) if needs[1] else None)
