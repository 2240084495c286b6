"""KL(q‖p) from the difference of the logits less its mean under q, which keeps its digits however near p is to q.

With δ = (b - a)/T less its mean under q, the KL is log(1 + Σ q (exp δ - 1 - δ)): a sum without cancellation, in which
what rounding leaves of the mean is felt in its square alone. The difference is first taken from that of q's largest
class, so that its δ, which is as small as the mass of all others, has its digits too. So float32 is enough, unless the
logits differ by a number that all classes share and that is much larger than the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from torch_klloss.numerics.elementary import has_float64
from torch_klloss.numerics.exponentials import NEAR, expm1, lead_into, lost_into
from torch_klloss.numerics.softmax.pairs import KL, Rows
from torch_klloss.numerics.softmax.strips import Strip, Strips
from torch_klloss.numerics.softmax.tiles import Problem, shift_of, tiles_of

FEWEST = 256  # classes from which on their roundings average out in float32
_LEAST = 2**18  # bytes of a buffer
# The square of (b - a)/T of q's largest class, relative to the KL over the mass of all others, or to its square.
_SHARED = {torch.float32: 2.0**5, torch.float64: 2.0**60}
_LARGEST = 2.0**2  # δ and the mean relative to the KL or to 1, for which what they round by in float32 is not felt
# The largest exp δ relative to the same: beyond it a class may count whose part of q has underflowed.
_FAR = {torch.float32: 1e30, torch.float64: 1e290}


def can_be_tried(a: Tensor, b: Tensor, problem: Problem, dtype: torch.dtype) -> bool:
    """Return whether there is a form for the divergence and the logits, whose exponents must be exact in the dtype."""
    is_enough = dtype == torch.float64 or (problem.is_exact and a.shape[-1] >= FEWEST)
    has_digits = is_enough and not has_float64(a, b)
    return has_digits and problem.terms == KL and not problem.is_sharded


def by_centring(
    a: Tensor, b: Tensor, index: Tensor | None, problem: Problem, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the rows `[12, rows, 1]` and which of them are right.

    Their `p_top` is the b - a of q's largest class, and their `centre` is what the mean of (b - a)/T exceeds it by.
    """
    strips = Strips(a, b, index, 1.0, dtype, 4, least=_LEAST)
    highest, base = (t.to(dtype) for t in _of_largest(a, b, index, dtype))
    top = shift_of(highest, problem, dtype)
    q_total, mean, excess, largest = torch.zeros(4, *top.shape, dtype=dtype)
    everything, weighed = slice(0, strips.num_rows), _Weighed(a, b, top, base, problem.scale)
    for strip in strips.within(everything):
        place = strip.place
        weights, gap = weighed(strip)
        q_total[place] += weights.sum(-1, keepdim=True)
        mean[place] += torch.linalg.vecdot(weights, gap).unsqueeze(-1)
        if strips.are_whole:
            mean[place] /= q_total[place]
            excess[place], largest[place] = _excess(strip, mean[place])
    if not strips.are_whole:
        mean /= q_total
        for strip in strips.within(everything):
            weighed(strip)
            part, top_gap = _excess(strip, mean[strip.place])
            excess[strip.place] += part
            largest[strip.place] = torch.maximum(largest[strip.place], top_gap)
    q_total, mean, excess, largest, top, highest, base = (
        t.double() for t in (q_total, mean, excess, largest, top, highest, base)
    )
    excess /= q_total
    value, zero = torch.log1p(excess), torch.zeros_like(top)
    others = 1 - torch.exp((highest - top) * problem.scale) / q_total
    is_good = (value < math.inf) & (q_total > torch.finfo(dtype).tiny ** 0.5)
    is_good &= largest <= (_FAR[dtype] * excess).log().clamp_min(0)
    shared = (base * problem.scale).square() / _SHARED[dtype]
    is_good &= shared <= value * value + value / others.clamp(torch.finfo(dtype).eps, 1)
    if dtype == torch.float32:  # where the difference from the top rounds as well
        is_good &= (top == 0) & (torch.maximum(largest, mean.abs()) <= _LARGEST * (1 + value))
    rows = Rows(top, base, q_total, zero, mean, zero, value, *(zero,) * 5)
    return torch.stack(rows), is_good.squeeze(-1)


def _of_largest(a: Tensor, b: Tensor, index: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return q's largest logits and by how much p's exceed them, `[rows, 1]`."""
    rows = torch.arange(len(a)) if index is None else index
    where = rows, torch.cat([t.argmax(-1) for t in _whole_rows(a, index)])
    largest = a[where].to(dtype)
    return largest.unsqueeze(-1), (b[where].to(dtype) - largest).unsqueeze(-1)


def _whole_rows(a: Tensor, index: Tensor | None) -> Iterator[Tensor]:
    """Yield a, or its rows at the index few at a time."""
    if index is None:
        yield a
        return
    for tile in tiles_of(a[:, :1], index, max(1, _LEAST // a.shape[-1])):
        yield a[tile.rows]


def write_by_centring(
    a: Tensor, b: Tensor, index: Tensor | None, rows: Rows, grad: Tensor, problem: Problem, dtype: torch.dtype,
    by_a: Tensor | None, by_b: Tensor | None,
) -> None:  # fmt: skip
    """Write the derivatives -q δ and p - q of `by_centring`, given its rows and grad, `[rows, 1]`."""
    share, mean = (grad * problem.scale / rows.q_total).to(dtype), rows.centre.to(dtype)
    ratio, rest = (f(-rows.by_q).to(dtype) for f in (torch.exp, expm1))  # p/q - 1 is (exp δ - 1) ratio + rest
    strips = Strips(a, b, index, 1.0, dtype, 2 if by_b is None else 3, least=_LEAST)
    weighed = _Weighed(a, b, rows.q_top.to(dtype), rows.p_top.to(dtype), problem.scale)
    for strip in strips.within(slice(0, len(grad))):
        place = strip.place
        weights, gap = weighed(strip)
        weights, gap = weights.mul_(share[place]), gap.sub_(mean[place])
        if by_b is not None:
            by_b[strip.where] = lost_into(gap, strip.work[2]).mul_(ratio[place]).add_(rest[place]).mul_(weights)
        if by_a is not None:
            by_a[strip.where] = gap.mul_(weights.neg_())


class _Weighed:
    """Writes the exponentials of a/T and (b - a)/T, less that of the largest class, to a strip's first buffers."""

    def __init__(self, a: Tensor, b: Tensor, top: Tensor, base: Tensor, scale: float) -> None:
        self.a, self.b, self.base, self.scale = a, b, base, scale
        self.top = top if bool(top.any()) else None

    def __call__(self, strip: Strip) -> tuple[Tensor, Tensor]:
        weights, gap, *_ = strip.work
        torch.sub(strip.y, strip.x, out=gap)
        if not math.isfinite(gap.sum().item()):  # which is rare; a class that both lack is the same on both sides
            both_lack = (self.a[strip.where] == -math.inf) & (self.b[strip.where] == -math.inf)
            torch.where(both_lack, self.base[strip.place], gap, out=gap)
        gap.sub_(self.base[strip.place])
        below = strip.x if self.top is None else torch.sub(strip.x, self.top[strip.place], out=weights)
        if self.scale != 1:
            gap.mul_(self.scale)
            below = torch.mul(below, self.scale, out=weights)
        return torch.exp(below, out=weights), gap


def _excess(strip: Strip, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ w (exp δ - 1 - δ) and the largest δ of the rows, from the buffers' weights and gap, which is centred."""
    weights, gap, *others = strip.work
    gap.sub_(mean)
    largest = gap.amax(-1, keepdim=True)
    is_near = bool((torch.maximum(largest, -gap.amin(-1, keepdim=True)) <= NEAR[gap.dtype]).all())
    return torch.linalg.vecdot(weights, lead_into(gap, *others, is_near=is_near)).unsqueeze(-1), largest
