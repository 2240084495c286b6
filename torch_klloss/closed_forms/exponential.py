"""Exponential‖Exponential."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributions import Exponential

from torch_klloss.closed_forms.formula import register_formula
from torch_klloss.numerics.blocks import Derivatives
from torch_klloss.numerics.elementary import excess, narrowed, quotient


@register_formula(Exponential, "rate", guards=("q.rate",))
def kl(needs: Sequence[bool], q_rate: Tensor, p_rate: Tensor) -> tuple[Tensor, Derivatives]:
    """λp/λq - 1 - log(λp/λq), the Itakura-Saito divergence of the rates, p's first."""
    _, x, value = excess(p_rate, q_rate)
    x = narrowed(x, q_rate)
    return value, (quotient(x, q_rate, times=-1) if needs[0] else None, x / p_rate if needs[1] else None)
