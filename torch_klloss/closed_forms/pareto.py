"""Pareto‖Pareto."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Pareto

from torch_klloss.closed_forms.formula import register_formula
from torch_klloss.numerics.blocks import Derivatives
from torch_klloss.numerics.elementary import at_least, excess, has_digits_to_spare, may_be_negative


@register_formula(Pareto, "scale", "alpha")
def kl(
    needs: Sequence[bool], q_scale: Tensor, q_alpha: Tensor, p_scale: Tensor, p_alpha: Tensor
) -> tuple[Tensor, Derivatives]:
    """αp log(sq/sp) + αp/αq - 1 - log(αp/αq) of the scales s and the exponents α; inf where sq < sp.

    Both parts are ≥ 0. There q starts below p's support, and the gradient is 0.
    """
    gap = q_scale - p_scale
    outside = gap < 0 if may_be_negative(gap) else None
    _, x, value = excess(p_alpha, q_alpha)
    log = _log_of_scales(q_scale, p_scale, gap, outside)
    value = torch.addcmul(value, p_alpha.to(value.dtype), log)
    partials: Derivatives = (
        p_alpha / q_scale if needs[0] else None,
        -x / q_alpha if needs[1] else None,
        -p_alpha / p_scale if needs[2] else None,
        log + x / p_alpha if needs[3] else None,
    )
    if outside is not None:
        value = torch.where(outside, torch.inf, value)
        partials = tuple(None if d is None else torch.where(outside, 0.0, d) for d in partials)
    return value, partials


def _log_of_scales(q_scale: Tensor, p_scale: Tensor, gap: Tensor, outside: Tensor | None) -> Tensor:
    """Return log(sq/sp), and 0 where that is negative."""
    if outside is None and has_digits_to_spare(gap):
        return torch.log(q_scale.double() / p_scale.double())
    return torch.log1p(at_least(gap / p_scale, 0.0)).to(torch.float64 if has_digits_to_spare(gap) else gap.dtype)
