"""Uniform‖Uniform."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Uniform

from torch_klloss.closed_forms.formula import register_formula
from torch_klloss.numerics.elementary import at_least


def _partials(
    needs: Sequence[bool], q_low: Tensor, q_high: Tensor, p_low: Tensor, p_high: Tensor
) -> Sequence[Tensor | None]:
    outside = (q_low < p_low) | (q_high > p_high)
    by_q = torch.where(outside, 0.0, 1 / (q_high - q_low)) if needs[0] or needs[1] else None
    by_p = torch.where(outside, 0.0, 1 / (p_high - p_low)) if needs[2] or needs[3] else None
    signed = (by_q, None if by_q is None else -by_q, None if by_p is None else -by_p, by_p)
    return tuple(d if need else None for d, need in zip(signed, needs, strict=True))


@register_formula(Uniform, "low", "high", partials=_partials)
def kl(q_low: Tensor, q_high: Tensor, p_low: Tensor, p_high: Tensor) -> Tensor:
    """log(1 + (the gaps that p leaves on both sides of q) / (the width of q)); inf where p does not contain q.

    There the gradient is 0.
    """
    below, above = q_low - p_low, p_high - q_high
    gaps = at_least(below, 0.0) + at_least(above, 0.0)
    return torch.where((below < 0) | (above < 0), torch.inf, torch.log1p(gaps / (q_high - q_low)))
