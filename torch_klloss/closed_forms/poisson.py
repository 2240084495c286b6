"""Poisson‖Poisson."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Poisson

from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.numerics.custom_gradient import custom_gradient
from torch_klloss.numerics.elementary import common_dtype, gkl, has_float64, log_ratio, may_fall_to


@register_kl(Poisson, Poisson)
def _poisson_poisson(q: Poisson, p: Poisson) -> Tensor:
    """λq log(λq/λp) - λq + λp, with 0 log 0 = 0: λp where λq = 0, inf where only λp = 0.

    The derivative by λq is log(λq/λp), kept finite at 0.
    """
    return _kl(q.rate, p.rate)


def _partials(needs: Sequence[bool], q_rate: Tensor, p_rate: Tensor) -> Sequence[Tensor | None]:
    by_q = by_p = None
    q_rate, p_rate = q_rate.double(), p_rate.double()
    gap = q_rate - p_rate
    if needs[0]:
        by_q = log_ratio(q_rate, p_rate, gap)
    if needs[1]:
        if may_fall_to(p_rate, 0):
            nonzero = torch.where(p_rate == 0, 1.0, p_rate)
            by_p = torch.where(p_rate == 0, (q_rate == 0).double(), -gap / nonzero)
        else:
            by_p = -gap / p_rate
    return by_q, by_p


@custom_gradient(_partials)
def _kl(q_rate: Tensor, p_rate: Tensor) -> Tensor:
    q, p = q_rate.double(), p_rate.double()
    return gkl(q, p, q - p, series=has_float64(q_rate, p_rate)).to(common_dtype(q_rate, p_rate))
