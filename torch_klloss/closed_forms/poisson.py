"""Poisson‖Poisson."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Poisson

from torch_klloss.closed_forms.formula import register_formula
from torch_klloss.numerics.blocks import Derivatives
from torch_klloss.numerics.elementary import (
    gkl_and_log,
    has_digits_to_spare,
    may_fall_to,
    quotient,
    replaced,
    spare_gkl_and_log,
)


def _quick(needs: Sequence[bool], q_rate: Tensor, p_rate: Tensor) -> tuple[Tensor, Derivatives]:
    ratio = p_rate / q_rate
    x, log = ratio - 1.0, torch.log(ratio)
    return q_rate * (x - log), (-log if needs[0] else None, x / ratio if needs[1] else None)


@register_formula(Poisson, "rate", quick=_quick, guards=("q.rate", "p.rate"))
def kl(needs: Sequence[bool], q_rate: Tensor, p_rate: Tensor) -> tuple[Tensor, Derivatives]:
    """λq log(λq/λp) - λq + λp, with 0 log 0 = 0: λp where λq = 0, inf where only λp = 0.

    The derivative by λq is log(λq/λp), kept finite at 0.
    """
    gap = q_rate - p_rate
    if has_digits_to_spare(q_rate):
        value, log = spare_gkl_and_log(q_rate.double(), p_rate)
    else:
        value, log = gkl_and_log(q_rate, p_rate, gap)
    return value, (-log if needs[0] else None, _by_p(gap, q_rate, p_rate) if needs[1] else None)


def _by_p(gap: Tensor, q_rate: Tensor, p_rate: Tensor) -> Tensor:
    """Return 1 - λq/λp; where λp = 0, what it is for λq = 0 in its neighbourhood, and 0 where the KL is infinite."""
    if not may_fall_to(p_rate, 0):
        return -gap / p_rate
    is_zero = p_rate == 0
    at_zero = (q_rate == 0).to(gap.dtype)
    return torch.where(is_zero, at_zero, quotient(gap, replaced(p_rate, is_zero, 1.0), times=-1))
