"""Divergences of many classes in float32, as sums over blocks of which the heavy ones are computed again in float64.

The roundings of many small terms average out. Those of a class that holds much of the mass do not: the few blocks that
hold one are computed again. What is left rounds as its share of the mass says, so that a row can be refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from torch_klloss.numerics.softmax_pairs import Rows, Terms
from torch_klloss.numerics.softmax_strips import BLOCK, Strips
from torch_klloss.numerics.softmax_tiles import Problem

FEWEST = 2**13  # classes; a block of fewer would often be heavy
_HEAVY = 2.0**-5  # of the mass of q or p
_AT_ONCE = 2**6  # heavy blocks
_BAND = 2**21  # numbers of the rows that are looked at together
_LEAST, _LEAST_MIXED = 1.0, 0.2  # a divergence, relative to what its terms round to
_SMALL, _SMALL_MIXED = 2.0**-6, 2.0**-9  # below it the gradient is the difference of numbers that are much larger
_SAME = 2.0**-5  # the same for the largest change of a block, relative to the heaviest one, where one is heavy
_WITHIN = 2.0**-60, 2.0**100  # sums of exponentials with all digits
_FAR, _FAR_MIXED = 1e30, 80.0  # log p/q of a class that only one of them has

Work: TypeAlias = "tuple[Tensor | None, ...]"


class Sums(NamedTuple):
    """Sums over the classes.

    Attributes:
        count: how many they are.
        terms: called with x, y, a shift a row, buffers or Nones, and whether there may be infinite logits, it yields the
            terms of one sum after the other, in the same memory.
    """

    count: int
    terms: Callable[[Tensor, Tensor, Tensor | None, Work, bool], Iterator[Tensor]]


class Totals(NamedTuple):
    """Sums over the classes of some rows.

    Attributes:
        of: the sums, `[sums, rows]`, in float64.
        light: those of the blocks in float32, `[sums, rows, blocks]`, zeros where a block is heavy.
        rows, blocks: where the heavy blocks are.
        are_alike: whether a row has a heavy block and hardly one that changes, so that its gradient would round.
    """

    of: Tensor
    light: Tensor
    rows: Tensor
    blocks: Tensor
    are_alike: Tensor


def can_be_tried(a: Tensor, problem: Problem) -> bool:
    """Return whether there are enough classes, and a form for the divergence."""
    if a.shape[-1] < FEWEST or a.dtype == torch.float64 or problem.is_sharded:
        return False
    is_exact, terms = math.frexp(problem.temperature)[0] == 0.5, problem.terms
    return is_exact and (not terms.is_mixed or _is_single(terms) or is_jensens(terms))


def is_jensens(terms: Terms) -> bool:
    """Return whether the derivatives are by_q log q/m and by_p log p/m: both mixtures are one, and the rest cancels."""
    is_one = math.isclose(terms.q_mix + terms.p_mix, 1)
    return is_one and math.isclose(terms.by_q * terms.q_mix, terms.by_p * terms.p_mix)


def _is_single(terms: Terms) -> bool:
    return terms.by_p == 0


def by_blocks(a: Tensor, b: Tensor, index: Tensor | None, problem: Problem) -> tuple[Tensor, Tensor]:
    """Return the rows `[12, rows, 1]`, and which of them have kept their digits; the first few say whether to go on."""
    strips = Strips(a, b, index, problem.scale, 3 if problem.terms.is_mixed else 2)
    num_rows, at_once = strips.num_rows, max(1, _BAND // a.shape[-1])
    rows = torch.zeros(len(Rows._fields), num_rows, 1, dtype=torch.float64)
    is_good = torch.zeros(num_rows, dtype=torch.bool)
    start, stop, with_gaps = 0, max(1, num_rows // 8) if num_rows > at_once // 4 else num_rows, False
    while start < num_rows:
        band = _Band(a, b, index, slice(start, stop), problem, strips)
        found, are_good = band.rows(with_gaps)
        if not with_gaps and not bool(found.isfinite().all()):
            found, are_good = band.rows(True)
            with_gaps = True  # classes that one side lacks are rare, and then in every row
        rows[:, start:stop], is_good[start:stop] = found, are_good
        if int(are_good.sum()) * 2 < stop - start:
            break
        start, stop = stop, min(stop + at_once, num_rows)
    return rows, is_good


class _Band(NamedTuple):
    """Some rows: those of a slice of the index, or of all."""

    a: Tensor
    b: Tensor
    index: Tensor | None
    place: slice
    problem: Problem
    strips: Strips

    def rows(self, with_gaps: bool) -> tuple[Tensor, Tensor]:
        """Return the rows, and which of them have kept their digits."""
        terms = self.problem.terms
        first = self.totals(_first(terms), None, None, with_gaps)
        q_total, p_total = first.of[:2]
        log_norm, zero = torch.log(p_total / q_total), torch.zeros_like(q_total)
        if terms.is_mixed:
            by_q, by_p, share = self.mixed(first, log_norm, with_gaps)
            size, least = _LEAST_MIXED * (1 + log_norm.abs()), _SMALL_MIXED
        else:
            q_mean, p_mean = first.of[2] / q_total, first.of[-1] / p_total if terms.by_p else zero
            by_q, by_p, share, least = log_norm - q_mean, p_mean - log_norm, zero, _SMALL
            size = _LEAST * (1 + log_norm.abs() + q_mean.abs() + p_mean.abs())
        rows = torch.stack((zero, zero, q_total, p_total, log_norm, zero, by_q, by_p, share, zero, zero, zero))
        value = (terms.by_q * by_q + terms.by_p * by_p) / (terms.by_q + terms.by_p)
        is_good = (value > _rounding(first) * size) & (size < _FAR**0.5) & ~first.are_alike
        for term in (by_q, by_p) if terms.by_p else (by_q,):
            is_good &= term > least
        for total in (q_total, p_total):
            is_good &= (total > _WITHIN[0]) & (total < _WITHIN[1])
        return rows.unsqueeze(-1), is_good

    def mixed(self, first: Totals, log_norm: Tensor, with_gaps: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the two terms, and for a single one the mean of q/m under q."""
        terms = self.problem.terms
        rest, scale = _rest(terms.q_mix)
        exact = terms.q_mix * scale * torch.exp(-log_norm)
        factor = exact.float()
        q_total, p_total = first.of[:2]
        sums = self.totals(_second(terms), first, factor.unsqueeze(-1), with_gaps).of
        by_q, zero = math.log(scale) - sums[0] / q_total, torch.zeros_like(log_norm)
        lost = torch.log(factor / exact)  # it shifts log p/q of all classes
        if not _is_single(terms):
            return by_q, sums[1] / p_total - log_norm + lost + math.log(scale), zero
        share = scale * sums[1] / q_total
        return by_q + lost * (1 - (1 - terms.q_mix) * share), zero, share

    def totals(self, sums: Sums, like: Totals | None, factor: Tensor | None, with_gaps: bool) -> Totals:
        """Return sums, with the heavy blocks of others, or those that are found."""
        num_rows = self.place.stop - self.place.start
        light = torch.empty(sums.count, num_rows, -(-self.a.shape[-1] // BLOCK))
        fields = light.unbind()
        for strip in self.strips.within(self.place):
            factors = None if factor is None else factor[strip.place]
            each = sums.terms(strip.x, strip.y, factors, strip.work, with_gaps)
            for field, terms in zip(fields, each, strict=True):
                _add_up_blocks(terms, field[strip.blocks])
        rows, blocks, are_alike = _heavy_of(light) if like is None else like[2:]
        heavy = self.heavy(sums, (rows, blocks), factor, with_gaps)
        light[:, rows, blocks] = 0.0
        of = light.sum(-1, dtype=torch.float64).index_add_(1, rows, heavy)
        return Totals(of, light, rows, blocks, are_alike)

    def heavy(self, sums: Sums, places: tuple[Tensor, Tensor], factor: Tensor | None, with_gaps: bool) -> Tensor:
        """Return the sums of the blocks at the places in float64, `[sums, heavy]`."""
        found = [torch.empty(sums.count, 0, dtype=torch.float64)]
        for rows, blocks in zip(*(t.split(_AT_ONCE) for t in places), strict=True):
            classes = blocks.unsqueeze(-1) * BLOCK + torch.arange(BLOCK)
            is_none, where = classes >= self.a.shape[-1], rows + self.place.start
            where = (where if self.index is None else self.index[where]).unsqueeze(-1)
            x, y = (t[where, classes.clamp(max=t.shape[-1] - 1)].double() for t in (self.a, self.b))
            x, y = (t.mul_(self.problem.scale).masked_fill_(is_none, -1e4) for t in (x, y))
            factors = None if factor is None else factor[rows].double()
            terms = sums.terms(x, y, factors, (None, None, None), with_gaps)
            found.append(torch.stack([t.sum(-1) for t in terms]))
        return torch.cat(found, 1)


def _add_up_blocks(t: Tensor, out: Tensor) -> None:
    """Write the sums of the blocks of t, `[rows, classes]`, to `[rows, blocks]`; the last block may be a part of one."""
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


def _heavy_of(light: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows and numbers of the blocks that hold much of the mass, and whether these and all others stay."""
    q, p = light[:2] / light[:2].sum(-1, keepdim=True)
    larger = torch.maximum(q, p)
    rows, blocks = (larger > _HEAVY).nonzero().unbind(-1)
    heaviest, change = larger.amax(-1), q.sub_(p).abs_().amax(-1)
    return rows, blocks, (heaviest > _HEAVY) & (change < _SAME * heaviest)


# --- the terms of the sums ----------------------------------------------------------------------------------------


def _first(terms: Terms) -> Sums:
    """Return the sums of both exponentials; for plain KLs also those of b - a under both."""

    def parts(x: Tensor, y: Tensor, shift: Tensor | None, work: Work, with_gaps: bool) -> Iterator[Tensor]:
        q = torch.exp(x, out=work[0])
        yield q
        if terms.is_mixed:
            yield torch.exp(y, out=work[0])
            return
        first = _ratio(x, y, work[1], with_gaps).mul_(q)
        p = torch.exp(y, out=work[0])
        yield p
        yield first
        if terms.by_p:
            yield _ratio(x, y, work[1], with_gaps).mul_(p)

    return Sums(2 if terms.is_mixed else 4 if terms.by_p else 3, parts)


def _ratio(x: Tensor, y: Tensor, out: Tensor | None, with_gaps: bool) -> Tensor:
    ratio = torch.sub(y, x, out=out)
    return ratio.nan_to_num_(0.0, _FAR, -math.inf) if with_gaps else ratio


def _second(terms: Terms) -> Sums:
    """Return the sums of log v under q, and of log p/q - log v under p, or for one term of 1/v under q, with v ∝ m/q."""
    rest, _ = _rest(terms.q_mix)

    def parts(x: Tensor, y: Tensor, factor: Tensor | None, work: Work, with_gaps: bool) -> Iterator[Tensor]:
        assert factor is not None
        ratio = torch.sub(y, x, out=work[0])
        if with_gaps:
            ratio.nan_to_num_(0.0, _FAR_MIXED, -_FAR_MIXED)
        if _is_single(terms):
            mixture = ratio.exp_().mul_(factor).add_(rest)
            log = torch.log(mixture, out=work[1])
            q = torch.exp(x, out=work[2])
            yield log.mul_(q)
            yield q.div_(mixture)
            return
        log = torch.exp(ratio, out=work[1]).mul_(factor).add_(rest).log_()
        ratio.sub_(log)
        yield log.mul_(torch.exp(x, out=work[2]))
        yield ratio.mul_(torch.exp(y, out=work[2]))

    return Sums(2, parts)


def _rest(mix: float) -> tuple[float, float]:
    """Return a power of two next to 1 - mix, and its ratio to that.

    Added to a number of float32, another one would round the same way class after class.
    """
    rest = 2.0 ** round(math.log2(1 - mix))
    return rest, rest / (1 - mix)


# --- the derivatives ----------------------------------------------------------------------------------------------


def write_by_blocks(
    a: Tensor, b: Tensor, index: Tensor | None, rows: Tensor, grad: Tensor, problem: Problem,
    by_a: Tensor | None, by_b: Tensor | None,
) -> None:  # fmt: skip
    """Write the derivatives of `by_blocks`, given its rows and grad, `[rows, 1]`."""
    form = _mixed_forms if problem.terms.is_mixed else _plain_forms
    write = _write_mixed if problem.terms.is_mixed else _write_plain
    forms = form(rows, grad * problem.scale, problem.terms)
    wanted = [
        (out, [None if f is None else f.float() for f in form], is_first)
        for out, form, is_first in zip((by_a, by_b), forms, (True, False), strict=True)
        if out is not None
    ]
    num_work = 2 + any(out.dtype != torch.float32 for out, *_ in wanted)
    for strip in Strips(a, b, index, problem.scale, num_work).within(slice(0, rows.shape[1])):
        for out, factors, is_first in wanted:
            target = out[strip.where]
            into = target if out.dtype == torch.float32 else strip.work[2]
            some = [None if f is None else f[strip.place] for f in factors]
            write(strip.x, strip.y, is_first, some, problem.terms, strip.work, into)
            if into is not target:
                target.copy_(into)


Form: TypeAlias = "tuple[Tensor | None, ...]"


def _plain_forms(rows: Tensor, g: Tensor, terms: Terms) -> tuple[Form, Form]:
    """Return α, β and γ of both derivatives: own (α + β (b - a)) + γ other, of unnormalised weights."""
    _, _, q_total, p_total, log_norm, _, by_q, by_p, *_ = rows
    q_mean, p_mean = log_norm - by_q, log_norm + by_p
    q_share, p_share = g / q_total, g / p_total
    first = q_share * (terms.by_q * q_mean + terms.by_p), -terms.by_q * q_share, -terms.by_p * p_share
    second = p_share * (terms.by_q - terms.by_p * p_mean), terms.by_p * p_share, -terms.by_q * q_share
    return (
        (first[0], first[1], first[2] if terms.by_p else None),
        (second[0], second[1] if terms.by_p else None, second[2]),
    )


def _write_plain(
    x: Tensor, y: Tensor, is_first: bool, factors: list[Tensor | None], terms: Terms, work: Work, out: Tensor
) -> None:
    own, other = (x, y) if is_first else (y, x)
    alpha, beta, gamma = factors
    assert alpha is not None
    if beta is None:
        torch.exp(own, out=out).mul_(alpha)
    else:
        ratio = torch.sub(y, x, out=work[0])
        if not bool(ratio.sum().isfinite()):
            ratio.nan_to_num_(0.0, _FAR, -_FAR)
        torch.exp(own, out=out).mul_(ratio.mul_(beta).add_(alpha))
    if gamma is not None:
        torch.addcmul(out, torch.exp(other, out=work[0]), gamma, out=out)


def _mixed_forms(rows: Tensor, g: Tensor, terms: Terms) -> tuple[Form, Form]:
    """Return a factor, α, β and γ of both derivatives: own (α + β log v + γ/v), with v ∝ m/q, or m/p for two terms."""
    _, _, q_total, p_total, log_norm, _, by_q, by_p, share, *_ = rows
    q_share, p_share = g / q_total, g / p_total
    rest, (_, scale) = 1 - terms.q_mix, _rest(terms.q_mix)
    factor, log_scale = terms.q_mix * scale * torch.exp(-log_norm), math.log(scale)
    if not _is_single(terms):
        _, p_scale = _rest(terms.p_mix)
        q_share, p_share = terms.by_q * q_share, terms.by_p * p_share
        first = factor, q_share * (log_scale - by_q), -q_share, None
        p_factor = terms.p_mix * p_scale * torch.exp(log_norm)
        return first, (p_factor, p_share * (math.log(p_scale) - by_p), -p_share, None)
    q_share, p_share = terms.by_q * q_share, terms.by_q * p_share
    first = factor, q_share * (log_scale - by_q + rest * share), -q_share, -rest * scale * q_share
    return first, (factor, p_share * (1 - rest * share), None, -terms.q_mix * scale * p_share)


def _write_mixed(
    x: Tensor, y: Tensor, is_first: bool, factors: list[Tensor | None], terms: Terms, work: Work, out: Tensor
) -> None:
    is_turned = not is_first and not _is_single(terms)
    factor, alpha, beta, gamma = factors
    assert factor is not None and alpha is not None
    ratio = torch.sub(x, y, out=work[0]) if is_turned else torch.sub(y, x, out=work[0])
    if not bool(ratio.sum().isfinite()):
        ratio.nan_to_num_(0.0, _FAR_MIXED, -_FAR_MIXED)
    mixture = ratio.exp_().mul_(factor).add_(_rest(terms.p_mix if is_turned else terms.q_mix)[0])
    result = alpha
    if beta is not None:
        result = torch.log(mixture, out=work[1]).mul_(beta).add_(alpha)
    if gamma is not None:
        result = mixture.reciprocal_().mul_(gamma).add_(result)
    torch.exp(x if is_first else y, out=out).mul_(result)
