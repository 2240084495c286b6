"""HalfNormal‖HalfNormal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import HalfNormal

from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.numerics.custom_gradient import custom_gradient
from torch_klloss.numerics.elementary import common_dtype, has_float64, isd


@register_kl(HalfNormal, HalfNormal)
def _half_normal_half_normal(q: HalfNormal, p: HalfNormal) -> Tensor:
    """½ x² + x - log(1 + x) with x = (σq - σp)/σp: the KL of the two Normals around 0."""
    return _kl(q.scale, p.scale)


def _partials(needs: Sequence[bool], q_scale: Tensor, p_scale: Tensor) -> Sequence[Tensor | None]:
    q_scale, p_scale = q_scale.double(), p_scale.double()
    x = (q_scale - p_scale) / p_scale
    by_q = x / p_scale + x / q_scale if needs[0] else None
    return by_q, -x * (2 + x) / p_scale if needs[1] else None


@custom_gradient(_partials)
def _kl(q_scale: Tensor, p_scale: Tensor) -> Tensor:
    q, p = q_scale.double(), p_scale.double()
    x = (q - p) / p
    value = torch.addcmul(isd(q, p, series=has_float64(q_scale, p_scale)), x, x, value=0.5)
    return value.to(common_dtype(q_scale, p_scale))
