"""Divergences of many classes as sums over blocks, in float32 or float64.

In float32 the roundings of many small terms average out. Those of a class that holds much of the mass do not: the few
blocks that hold one are computed again in float64. What is left rounds as its share of the mass says, so that a row can
be refused.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torch_klloss.numerics.elementary import has_float64
from torch_klloss.numerics.softmax.block_terms import FAR, Sums, first_sums, rest_of, second_sums
from torch_klloss.numerics.softmax.pairs import Rows
from torch_klloss.numerics.softmax.strips import BLOCK, Strip, Strips
from torch_klloss.numerics.softmax.tiles import Problem

FEWEST = 2**13  # classes; a block of fewer would often be heavy
_HEAVY = 2.0**-5  # of the mass of q or p
_AT_ONCE = 2**6  # heavy blocks
_BAND = 2**22  # numbers of the rows that are looked at together
_MIXED_LEAST = 0.3  # a mixture's divergence in float32 relative to what a KL has to be
_LEAST_DOUBLE = 2.0**-24  # one in float64, relative to its terms
# A gradient in float32 is the difference of much larger numbers if one of these is less:
_SMALL, _MIXED_SMALL = 2.0**-6, 2.0**-9  # the divergence; that of a mixture, where no block is heavy
_SAME, _MIXED_SAME = 2.0**-4, 2.0**-2  # the largest change of a block beside a heavy one, relative to it
_OTHERS = 2.0**-4  # the mass outside of the heaviest block
_ROOM = 2.0**-4  # what a term of a mixture is below its bound
_WITHIN = 2.0**-60, 2.0**100  # sums of exponentials with all digits


class Totals(NamedTuple):
    """Sums over the classes of some rows.

    Attributes:
        of: the sums, `[sums, rows]`, in float64.
        light: those of the blocks in float32, `[sums, rows, blocks]`, zeros where a block is heavy.
        factor: what the second sums were taken with.
        change: the largest difference of a block in q and p, relative to the heaviest; inf where none is heavy.
        others: what the heaviest block of q, and that of p, leaves to the others, `[2, rows]`.
    """

    of: Tensor
    light: Tensor
    factor: Tensor
    change: Tensor
    others: Tensor


def can_be_tried(a: Tensor, b: Tensor, problem: Problem) -> bool:
    """Return whether there are enough classes, and a form for the divergence."""
    if a.shape[-1] < FEWEST or has_float64(a, b) or problem.is_sharded:
        return False
    return not problem.terms.is_mixed or problem.terms.is_single or problem.terms.is_jensens


class Found(NamedTuple):
    """Rows and what is known of them.

    Attributes:
        rows: `[12, rows, 1]`, the fields of `Rows`, with whether there were infinite logits as `q_score`, and with what
            log p/q was off by in the sums for mixtures as `p_gap`.
        is_good: whether the value has kept its digits.
        is_single: whether the gradients to q and to p keep their own in float32, `[2, rows]`.
    """

    rows: Tensor
    is_good: Tensor
    is_single: Tensor


def by_blocks(a: Tensor, b: Tensor, index: Tensor | None, problem: Problem, dtype: torch.dtype) -> Found:
    """Return the rows; in float32 the first few say whether the others are tried."""
    strips = Strips(a, b, index, problem.scale, dtype, 3 if problem.terms.is_mixed else 2)
    num_rows, at_once = strips.num_rows, max(1, _BAND // a.shape[-1])
    rows = torch.zeros(len(Rows._fields), num_rows, 1, dtype=torch.float64)
    is_good, is_single = torch.zeros(num_rows, dtype=torch.bool), torch.zeros(2, num_rows, dtype=torch.bool)
    start, stop, with_gaps = 0, max(1, num_rows // 8) if num_rows > at_once // 4 else num_rows, False
    while start < num_rows:
        band = _Band(a, b, index, slice(start, stop), problem, strips)
        found = band.rows(with_gaps)
        if not with_gaps and not bool(found.rows.isfinite().all()):
            found, with_gaps = band.rows(True), True  # classes that one side lacks are rare, and then in every row
        rows[:, start:stop], is_good[start:stop], is_single[:, start:stop] = found
        if dtype == torch.float32 and int(found.is_good.sum()) * 2 < stop - start:
            break
        start, stop = stop, min(stop + at_once, num_rows)
    return Found(rows, is_good, is_single)


class _Band(NamedTuple):
    """Some rows: those of a slice of the index, or of all."""

    a: Tensor
    b: Tensor
    among: Tensor | None
    place: slice
    problem: Problem
    strips: Strips

    def rows(self, with_gaps: bool) -> Found:
        """Return the rows."""
        terms = self.problem.terms
        first = self.totals(with_gaps)
        q_total, p_total = first.of[:2]
        log_norm, zero = torch.log(p_total / q_total), torch.zeros_like(q_total)
        if terms.is_mixed:
            by_q, by_p, share, lost = self.mixed(first)
            size = _MIXED_LEAST * (1 + log_norm.abs())
        else:
            q_mean, p_mean = first.of[2] / q_total, first.of[-1] / p_total if terms.by_p else zero
            by_q, by_p, share, lost = log_norm - q_mean, p_mean - log_norm, zero, zero
            size = 1 + log_norm.abs() + q_mean.abs() + p_mean.abs()
        gaps = torch.full_like(zero, with_gaps)
        rows = torch.stack((zero, zero, q_total, p_total, log_norm, zero, by_q, by_p, share, gaps, lost, zero))
        smallest = torch.minimum(by_q, by_p) if terms.by_p else by_q
        is_within = size < FAR**0.5
        for total in (q_total, p_total):
            is_within &= (total > _WITHIN[0]) & (total < _WITHIN[1])
        is_single = is_within & self.are_single(first, by_q, by_p, smallest)
        is_good = is_within & (smallest > _LEAST_DOUBLE * size)
        if self.strips.dtype == torch.float32:
            value = (terms.by_q * by_q + terms.by_p * by_p) / (terms.by_q + terms.by_p)
            is_good &= value > _rounding(first) * size
            if terms.is_mixed:  # a gradient in float64 needs sums in float64
                is_good &= is_single.all(0)
        return Found(rows.unsqueeze(-1), is_good, is_single)

    def are_single(self, first: Totals, by_q: Tensor, by_p: Tensor, smallest: Tensor) -> Tensor:
        """Return whether the gradients to q and to p keep their digits in float32, `[2, rows]`."""
        terms, is_flat = self.problem.terms, first.change == torch.inf
        is_open = first.others > _OTHERS
        if not terms.is_mixed:
            is_open[1] |= terms.by_p == 0  # it is p - q
            return is_open & (smallest > _SMALL) & (first.change > _SAME) & self.problem.is_exact
        small = torch.where(is_flat, _MIXED_SMALL, _SMALL)
        is_single = is_open & (smallest > small) & (first.change > _MIXED_SAME) & self.problem.is_exact
        is_single &= -math.log1p(-terms.q_mix) - by_q > _ROOM
        return is_single & (-math.log1p(-terms.p_mix) - by_p > _ROOM) if terms.by_p else is_single

    def mixed(self, found: Totals) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the two terms, for a single one the mean of q/m under p, and what log p/q was off by."""
        terms = self.problem.terms
        q_total, p_total, *sums = found.of
        under_p, under_q = sums if terms.is_single else reversed(sums)
        _, scale = rest_of(terms.q_mix)
        log_norm, zero = torch.log(p_total / q_total), torch.zeros_like(q_total)
        by_q = math.log(scale) - under_q / q_total
        lost = torch.log(found.factor.squeeze(-1) / (terms.q_mix * scale)) + log_norm
        if not terms.is_single:
            return by_q, under_p / p_total - log_norm + lost + math.log(scale), zero, lost
        share = scale * under_p / p_total
        return by_q + lost * terms.q_mix * share, zero, share, lost

    def totals(self, with_gaps: bool) -> Totals:
        """Return the sums over the classes."""
        terms, num_rows = self.problem.terms, self.place.stop - self.place.start
        stages: tuple[Sums, ...] = (first_sums(terms),)
        if terms.is_mixed:
            stages = *stages, second_sums(terms, after_first=self.strips.are_whole)
        numbers = [stage.number for stage in stages]
        light = torch.empty(sum(numbers), num_rows, -(-self.a.shape[-1] // BLOCK), dtype=self.strips.dtype)
        parts, factor = light.split(numbers), light.new_ones(num_rows, 1)
        groups = [stages] if self.strips.are_whole else [(stage,) for stage in stages]
        for group in groups:  # a strip of whole rows is read once for both stages
            for strip in self.strips.within(self.place):
                for stage in group:
                    fields = parts[stages.index(stage)]
                    if stage is not stages[0] and strip.is_first:
                        factor[strip.place] = self.factor_of(light[:2, strip.place])
                    self.add(stage, strip, factor[strip.place], fields, with_gaps)
        rows, blocks, change, others = _heavy_of(light)
        is_heavy = len(rows) > 0 and light.dtype == torch.float32
        if is_heavy:
            light[:, rows, blocks] = 0.0
        of = light.sum(-1, dtype=torch.float64)
        if is_heavy:
            of.index_add_(1, rows, self.heavy(stages, rows, blocks, factor, with_gaps))
        return Totals(of, light, factor.double(), change, others)

    def add(self, stage: Sums, strip: Strip, factor: Tensor, fields: Tensor, with_gaps: bool) -> None:
        """Write the sums of the blocks of a strip to their fields."""
        each = stage.terms(strip.x, strip.y, factor, strip.work, with_gaps)
        for out, terms in zip(fields[(slice(None), *strip.blocks)].unbind(), each, strict=True):
            _add_up_blocks(terms, out)

    def factor_of(self, light: Tensor) -> Tensor:
        """Return mix · p/q of unnormalised weights, given the sums of their blocks, `[2, rows, blocks]`."""
        q_total, p_total = light.sum(-1, keepdim=True)
        mix = self.problem.terms.q_mix
        return q_total / p_total * (mix * rest_of(mix)[1])

    def heavy(self, stages: tuple[Sums, ...], rows: Tensor, blocks: Tensor, factor: Tensor, with_gaps: bool) -> Tensor:
        """Return the sums of some blocks in float64, `[sums, heavy]`."""
        found = []
        for some, which in zip(rows.split(_AT_ONCE), blocks.split(_AT_ONCE), strict=True):
            classes = which.unsqueeze(-1) * BLOCK + torch.arange(BLOCK)
            is_none, where = classes >= self.a.shape[-1], some + self.place.start
            where = (where if self.among is None else self.among[where]).unsqueeze(-1)
            x, y = (t[where, classes.clamp(max=t.shape[-1] - 1)].double() for t in (self.a, self.b))
            x, y = (t.mul_(self.problem.scale).masked_fill_(is_none, -1e4) for t in (x, y))
            each = (stage.terms(x, y, factor[some].double(), (None,) * 3, with_gaps) for stage in stages)
            found.append(torch.stack([t.sum(-1) for terms in each for t in terms]))
        return torch.cat(found, 1)


def _add_up_blocks(t: Tensor, out: Tensor) -> None:
    """Write the sums of the blocks of t, `[rows, classes]`, to `[rows, blocks]`; the last one may be a part."""
    num_rows, num_classes = t.shape
    whole = num_classes // BLOCK
    if whole * BLOCK == num_classes:
        torch.sum(t.view(num_rows, whole, BLOCK), -1, out=out)
        return
    torch.sum(t[:, : whole * BLOCK].unflatten(-1, (whole, BLOCK)), -1, out=out[:, :whole])
    torch.sum(t[:, whole * BLOCK :], -1, out=out[:, whole])


def _rounding(first: Totals) -> Tensor:
    """Return how much the sums round by relative to their terms: the root of the sum of squares of what is light."""
    return (torch.linalg.vector_norm(first.light[:2], dim=-1).double() / first.of[:2]).amax(0)


def _heavy_of(light: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the rows and numbers of the blocks that hold much of the mass, and the last two of `Totals`."""
    shares = light[:2] / light[:2].sum(-1, keepdim=True)
    rows, blocks = (shares.amax(0) > _HEAVY).nonzero().unbind(-1)
    tops = shares.amax(-1)
    heaviest, change = tops.amax(0), shares[0].sub_(shares[1]).abs_().amax(-1)
    return rows, blocks, torch.where(heaviest > _HEAVY, change / heaviest, torch.inf), 1 - tops
