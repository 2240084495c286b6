"""Pareto‖Pareto."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Pareto

from torch_klloss.closed_forms.formula import register_formula
from torch_klloss.numerics.elementary import at_least, isd


def _partials(
    needs: Sequence[bool], q_scale: Tensor, q_alpha: Tensor, p_scale: Tensor, p_alpha: Tensor
) -> Sequence[Tensor | None]:
    outside = q_scale < p_scale
    x = (p_alpha - q_alpha) / q_alpha
    partials = (
        p_alpha / q_scale if needs[0] else None,
        -x / q_alpha if needs[1] else None,
        -p_alpha / p_scale if needs[2] else None,
        torch.log1p(at_least((q_scale - p_scale) / p_scale, 0.0)) + x / p_alpha if needs[3] else None,
    )
    return tuple(None if d is None else torch.where(outside, 0.0, d) for d in partials)


@register_formula(Pareto, "scale", "alpha", partials=_partials)
def kl(q_scale: Tensor, q_alpha: Tensor, p_scale: Tensor, p_alpha: Tensor) -> Tensor:
    """αp log(sq/sp) + αp/αq - 1 - log(αp/αq) of the scales s and the exponents α; inf where sq < sp.

    Both parts are ≥ 0. There q starts below p's support, and the gradient is 0.
    """
    gap = q_scale - p_scale
    value = torch.addcmul(isd(p_alpha, q_alpha), p_alpha, torch.log1p(at_least(gap / p_scale, 0.0)))
    return torch.where(gap < 0, torch.inf, value)
