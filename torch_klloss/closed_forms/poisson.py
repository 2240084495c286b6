"""Poisson‖Poisson."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Poisson

from torch_klloss.closed_forms.formula import register_formula
from torch_klloss.numerics.elementary import gkl, log_ratio, may_fall_to


def _partials(needs: Sequence[bool], q_rate: Tensor, p_rate: Tensor) -> Sequence[Tensor | None]:
    by_q = by_p = None
    gap = q_rate - p_rate
    if needs[0]:
        by_q = log_ratio(q_rate, p_rate, gap)
    if needs[1]:
        if may_fall_to(p_rate, 0):
            is_zero = p_rate == 0
            at_zero = (q_rate == 0).to(gap.dtype)
            by_p = torch.where(is_zero, at_zero, -gap / torch.where(is_zero, 1.0, p_rate))
        else:
            by_p = -gap / p_rate
    return by_q, by_p


@register_formula(Poisson, "rate", partials=_partials)
def kl(q_rate: Tensor, p_rate: Tensor) -> Tensor:
    """λq log(λq/λp) - λq + λp, with 0 log 0 = 0: λp where λq = 0, inf where only λp = 0.

    The derivative by λq is log(λq/λp), kept finite at 0.
    """
    return gkl(q_rate, p_rate, q_rate - p_rate)
