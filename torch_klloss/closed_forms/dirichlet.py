"""Dirichlet‖Dirichlet, and with two components Beta‖Beta."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Dirichlet

from torch_klloss.closed_forms.formula import register_formula
from torch_klloss.numerics import lgamma_at_once as at_once
from torch_klloss.numerics.blocks import Derivatives
from torch_klloss.numerics.elementary import at_least, isd_from_gap, log_ratio
from torch_klloss.numerics.lgamma import (
    SHIFT,
    binet_digamma_difference,
    binet_trigamma,
    bregman,
    stirling_bregman,
    trigamma,
)
from torch_klloss.numerics.lgamma_at_once import Arguments, divergence_and_slope


def partials(needs: Sequence[bool], q: Tensor, p: Tensor) -> Sequence[Tensor | None]:
    """Return the derivatives of `value`."""
    by_q = by_p = None
    q, p = q.double(), p.double()
    gap = p - q
    total = _Pair(*(t.sum(-1, keepdim=True) for t in (q, p, gap)))
    cross = _cross(_Pair(q, p, gap), total, total.p < total.q)
    if needs[0]:
        by_q = binet_trigamma(total.q) * total.gap - binet_trigamma(q) * gap - cross / q / total.q
    if needs[1]:
        of_total = binet_digamma_difference(total.gap, total.p, total.q)
        by_p = binet_digamma_difference(gap, p, q) - of_total + log_ratio(p * total.q, q * total.p, cross)
    return by_q, by_p


def direct(needs: Sequence[bool], q: Tensor, p: Tensor) -> tuple[Tensor, Derivatives, Tensor]:
    """Σ log Γ(pᵢ)/Γ(qᵢ) - log Γ(T)/Γ(S) + Σ (qᵢ - pᵢ) (ψ(qᵢ) - ψ(S)), with S and T the sums of q and p."""
    step, q_total, p_total = q - p, q.sum(-1), p.sum(-1)
    of_each, of_total = torch.digamma(q), torch.digamma(q_total)
    weights = step * (of_each - of_total.unsqueeze(-1))
    logs = torch.lgamma(p), torch.lgamma(q), torch.lgamma(p_total), torch.lgamma(q_total)
    kl = (logs[0] - logs[1] + weights).sum(-1) - (logs[2] - logs[3])
    size = (logs[0].abs() + logs[1].abs() + weights.abs()).sum(-1) + (logs[2].abs() + logs[3].abs())
    by_q = by_p = None
    if needs[0]:
        by_q = step * trigamma(q) - (step.sum(-1) * trigamma(q_total)).unsqueeze(-1)
    if needs[1]:
        by_p = torch.digamma(p) - of_each - (torch.digamma(p_total) - of_total).unsqueeze(-1)
    return kl, (by_q, by_p), size


def value(q: Tensor, p: Tensor) -> Tensor:
    """S KL(mean of p‖mean of q) + Σ B(pᵢ, qᵢ) - B(S, T), with S and T the sums of p and q and B of `bregman`.

    The last term nearly equals the one of p's largest component, and is subtracted from it before either is rounded.
    Computed in float64, whatever the dtype of the parameters.

    References:
        *Rényi divergence measures for commonly used univariate continuous distributions* (Gil, Alajaji and Linder,
        2013), for the KL that this rearranges.
    """
    rest, top = _split(*(t.double().movedim(-1, 0) for t in torch.broadcast_tensors(q, p)))
    return at_least(bregman(rest.p, rest.q).sum(0) + _means_and_top(rest, top), 0.0)


def whole(needs: Sequence[bool], q: Tensor, p: Tensor) -> tuple[Tensor, Derivatives]:
    """The same by few operations: the terms of all components, less the one of their total."""
    q, p = torch.broadcast_tensors(q.double(), p.double())
    b, a, gap = (torch.cat((t, t.sum(-1, keepdim=True)), -1) for t in (q, p, p - q))
    q_total, p_total, total_gap = (t[..., -1:] for t in (b, a, gap))
    cross = torch.addcmul(b * total_gap, gap, q_total, value=-1)
    terms, slopes = divergence_and_slope(Arguments(a, b, gap, (b * p_total, a * q_total), cross))
    by_q = by_p = None
    if needs[0]:
        curves = gap * at_once.binet_trigamma(b)
        by_q = torch.addcdiv(curves[..., -1:] - curves[..., :-1], cross[..., :-1], q * q_total)
    if needs[1]:
        by_p = slopes[..., :-1] - slopes[..., -1:]
    return at_least(terms[..., :-1].sum(-1) - terms[..., -1], 0.0), (by_q, by_p)


kl = register_formula(
    Dirichlet, "concentration", partials=partials, direct=direct, whole=whole, event_dims=1, needs_float64=True
)(value)
"""The KL of two Dirichlets, from their concentrations."""


class _Pair(NamedTuple):
    """Corresponding quantities of q and p, and p - q as it was before they were rounded."""

    q: Tensor
    p: Tensor
    gap: Tensor

    def plus(self, step: float | Tensor) -> _Pair:
        return _Pair(self.q + step, self.p + step, self.gap)


def _split(q: Tensor, p: Tensor) -> tuple[_Pair, _Pair]:
    """Separate the largest component of p from the others, `[K - 1, *batch]`."""
    largest = p.argmax(0, keepdim=True)
    others = torch.arange(len(p) - 1, device=p.device).view(-1, *(1,) * (p.dim() - 1))
    others = others + (others >= largest)
    rest_q, rest_p, top_q, top_p = (t.gather(0, index) for index in (others, largest) for t in (q, p))
    return _Pair(rest_q, rest_p, rest_p - rest_q), _Pair(top_q[0], top_p[0], (top_p - top_q)[0])


def _means_and_top(rest: _Pair, top: _Pair) -> Tensor:
    """Return the Bregman divergences of x log x at the others and of lgamma at the top, less the one at the total.

    Both of lgamma are taken SHIFT steps up. In each step, those of -log at b and b + a differ by isd and z, the excess
    over 1 of b_q (a + b)_p / (b_p (a + b)_q), which is a_p b_q - a_q b_p over that denominator. At the end, their
    x log x and the one of the others make the KL of the shares of all components: a sum of c_p isd, each ≥ 0.
    """
    others = _Pair(*(t.sum(0) for t in rest))
    total = _Pair(*(a + b for a, b in zip(others, top, strict=True)))
    is_lower = total.p < total.q
    k = torch.arange(SHIFT + 1, dtype=top.q.dtype, device=top.q.device).view(-1, *(1,) * top.q.dim())
    tops, totals = top.plus(k), total.plus(k)
    far_top, far_total = top.plus(SHIFT), total.plus(SHIFT)
    cross = _cross(others, tops, is_lower)
    of_tops = isd_from_gap(cross, tops.q * totals.p, tops.p * totals.q)
    of_rest = isd_from_gap(_cross(far_total, rest, is_lower), rest.q * far_total.p, rest.p * far_total.q)
    means = far_top.p * of_tops[-1] + (rest.p * of_rest).sum(0)
    steps = of_tops + cross / tops.p / totals.q * (top.gap / tops.q)
    remainder = stirling_bregman(top.gap, far_top.p, far_top.q) - stirling_bregman(total.gap, far_total.p, far_total.q)
    return means - steps[:-1].sum(0) - steps[-1] / 2 + remainder


def _cross(a: _Pair, b: _Pair, is_lower: Tensor) -> Tensor:
    """Return a_p b_q - a_q b_p from the gaps, times p or q, whichever `is_lower`, so that no term exceeds the two."""
    a_low, b_low = (torch.where(is_lower, pair.p, pair.q) for pair in (a, b))
    return a.gap * b_low - a_low * b.gap
