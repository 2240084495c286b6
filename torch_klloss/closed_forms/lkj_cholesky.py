"""LKJCholesky‖LKJCholesky."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import LKJCholesky

from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.numerics.custom_gradient import custom_gradient
from torch_klloss.numerics.elementary import common_dtype, isd_from_gap

_STEPS = 10
# Of f(b) = lgamma(b) - lgamma(b + ½) + ½ log c, c = b - ¼, in c⁻²: E_2k/(k 4^(2k+1)) with the Euler numbers. Good to
# 1e-14 from c = _STEPS on.
_TAIL = (
    -1 / 64,
    5 / 2048,
    -61 / 49152,
    1385 / 1048576,
    -50521 / 20971520,
    2702765 / 402653184,
    -199360981 / 7516192768,
    19391512145 / 137438953472,
)


@register_kl(LKJCholesky, LKJCholesky)
def _lkj_lkj(q: LKJCholesky, p: LKJCholesky) -> Tensor:
    """Σ m D(ηp + (m - 1)/2, ηq + (m - 1)/2) over m = 1, …, dim - 1: all terms are ≥ 0.

    D is the Bregman divergence of the convex lgamma(b) - lgamma(b + ½): a correlation matrix has m partial correlations
    of which (1 + r)/2 is Beta(b, b) with b = η + (m - 1)/2. Computed in float64, whatever the dtype of the parameters.

    References:
        *Generating random correlation matrices based on vines and extended onion method* (Lewandowski, Kurowicka and
        Joe, 2009).
    """
    m = torch.arange(1, q.dim, dtype=torch.float64, device=q.concentration.device)
    of_levels = _kl(q.concentration.double().unsqueeze(-1), p.concentration.double().unsqueeze(-1), (m - 1) / 2)
    return (m * of_levels).sum(-1).to(common_dtype(q.concentration, p.concentration))


def _partials(needs: Sequence[bool], q: Tensor, p: Tensor, shift: Tensor) -> Sequence[Tensor | None]:
    gap, a, b = p - q, p + shift, q + shift
    by_q = -gap * _curvature(b) if needs[0] else None
    return by_q, _slope_gap(gap, a, b) if needs[1] else None, None


@custom_gradient(_partials)
def _kl(q: Tensor, p: Tensor, shift: Tensor) -> Tensor:
    """Return the divergence of f, stepped up by the recurrence of lgamma to where its series holds."""
    gap, a, b = p - q, p + shift, q + shift
    steps = sum(isd_from_gap(gap, a + k, b + k) - isd_from_gap(gap, a + k + 0.5, b + k + 0.5) for k in range(_STEPS))
    is_small, a, b = _stepped(a, b)
    s, r = 1 / a, 1 / b
    total, terms = torch.zeros_like(s * r), torch.zeros_like(s * r)  # Σ i s^(n+1-i) r^(i+1) over i = 1, …, n
    for n in range(1, 2 * len(_TAIL) + 1):
        terms = s * (terms + n * r ** (n + 1))
        total = total if n % 2 else total + _TAIL[n // 2 - 1] * terms
    return torch.where(is_small, steps, 0.0) + isd_from_gap(gap, a, b) / 2 + gap.square() * total


def _stepped(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return which arguments are small, and c of both, a quarter below where the series holds."""
    is_small = torch.minimum(a, b) < _STEPS
    c, d = (torch.where(is_small, x + _STEPS, x) - 0.25 for x in (a, b))
    return is_small, c, d


def _slope_gap(gap: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return f'(a) - f'(b)."""
    steps = sum(gap / ((a + k) * (b + k)) - gap / ((a + k + 0.5) * (b + k + 0.5)) for k in range(_STEPS))
    is_small, a, b = _stepped(a, b)
    s, r = 1 / a, 1 / b
    total, terms = torch.zeros_like(s * r), s * r  # Σ s^(n+1-i) r^(i+1) over i = 0, …, n
    for n in range(1, 2 * len(_TAIL) + 1):
        terms = s * (terms + r ** (n + 1))
        total = total if n % 2 else total + n * _TAIL[n // 2 - 1] * terms
    return torch.where(is_small, steps, 0.0) + gap * (s * r / 2 + total)


def _curvature(b: Tensor) -> Tensor:
    """Return f''(b)."""
    steps = sum((b + k).square().reciprocal() - (b + k + 0.5).square().reciprocal() for k in range(_STEPS))
    is_small, c, _ = _stepped(b, b)
    square = c.square().reciprocal()
    total = torch.full_like(c, 0.5)
    for k, factor in enumerate(_TAIL, start=1):
        total = total + 2 * k * (2 * k + 1) * factor * square**k
    return torch.where(is_small, steps, 0.0) + square * total
