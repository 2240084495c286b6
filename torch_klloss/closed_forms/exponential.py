"""Exponential‖Exponential."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributions import Exponential

from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.numerics.custom_gradient import custom_gradient
from torch_klloss.numerics.elementary import common_dtype, isd


@register_kl(Exponential, Exponential)
def _exponential_exponential(q: Exponential, p: Exponential) -> Tensor:
    """λp/λq - 1 - log(λp/λq), the Itakura-Saito divergence of the rates, p's first."""
    return _kl(q.rate, p.rate)


def _partials(needs: Sequence[bool], q_rate: Tensor, p_rate: Tensor) -> Sequence[Tensor | None]:
    q_rate, p_rate = q_rate.double(), p_rate.double()
    x = (p_rate - q_rate) / q_rate
    return -x / q_rate if needs[0] else None, x / p_rate if needs[1] else None


@custom_gradient(_partials)
def _kl(q_rate: Tensor, p_rate: Tensor) -> Tensor:
    return isd(p_rate, q_rate).to(common_dtype(q_rate, p_rate))
