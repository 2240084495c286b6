"""Pareto‖Pareto."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Pareto

from torch_klloss.closed_forms.formula import register_formula
from torch_klloss.numerics.blocks import Derivatives
from torch_klloss.numerics.elementary import (
    at_least,
    excess,
    has_digits_to_spare,
    may_be_negative,
    narrowed,
    quotient,
    replaced,
)


@register_formula(Pareto, "scale", "alpha", guards=("q.scale", "p.scale", "q.alpha"))
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
    value = torch.addcmul(value, p_alpha.to(value.dtype), log.to(value.dtype))
    x, alpha = narrowed(x, q_alpha), p_alpha
    if outside is not None:
        value = replaced(value, outside, torch.inf)
        x, alpha = (replaced(t, outside, 0.0) for t in (x, alpha))  # where the logarithm is 0 too
    return value, (
        alpha / q_scale if needs[0] else None,
        quotient(x, q_alpha, times=-1) if needs[1] else None,
        quotient(alpha, p_scale, times=-1) if needs[2] else None,
        torch.addcdiv(log, x, p_alpha) if needs[3] else None,
    )


def _log_of_scales(q_scale: Tensor, p_scale: Tensor, gap: Tensor, outside: Tensor | None) -> Tensor:
    """Return log(sq/sp), and 0 where that is negative."""
    if outside is None and has_digits_to_spare(gap):
        return torch.log(q_scale.double() / p_scale)
    return torch.log1p(at_least(gap / p_scale, 0.0))
