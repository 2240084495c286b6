"""Pareto‖Pareto."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Pareto

from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.numerics.custom_gradient import custom_gradient
from torch_klloss.numerics.elementary import at_least, common_dtype, isd


@register_kl(Pareto, Pareto)
def _pareto_pareto(q: Pareto, p: Pareto) -> Tensor:
    """αp log(sq/sp) + αp/αq - 1 - log(αp/αq) of the scales s and the exponents α; inf where sq < sp.

    Both parts are ≥ 0. There q starts below p's support, and the gradient is 0.
    """
    return _kl(q.scale, q.alpha, p.scale, p.alpha)


def _partials(
    needs: Sequence[bool], q_scale: Tensor, q_alpha: Tensor, p_scale: Tensor, p_alpha: Tensor
) -> Sequence[Tensor | None]:
    outside = q_scale < p_scale
    q_scale, q_alpha, p_scale, p_alpha = (t.double() for t in (q_scale, q_alpha, p_scale, p_alpha))
    x = (p_alpha - q_alpha) / q_alpha
    partials = (
        p_alpha / q_scale if needs[0] else None,
        -x / q_alpha if needs[1] else None,
        -p_alpha / p_scale if needs[2] else None,
        torch.log1p(at_least((q_scale - p_scale) / p_scale, 0.0)) + x / p_alpha if needs[3] else None,
    )
    return tuple(None if d is None else torch.where(outside, 0.0, d) for d in partials)


@custom_gradient(_partials)
def _kl(q_scale: Tensor, q_alpha: Tensor, p_scale: Tensor, p_alpha: Tensor) -> Tensor:
    gap = q_scale.double() - p_scale.double()
    value = p_alpha.double() * torch.log1p(at_least(gap / p_scale.double(), 0.0)) + isd(p_alpha, q_alpha)
    return torch.where(gap < 0, torch.inf, value).to(common_dtype(q_scale, q_alpha, p_scale, p_alpha))
