"""Divergences of softmaxes where there is float64, in twice the digits of the logits, by few operations.

It is the only way on an accelerator, and the last one on the CPU. Nothing is looked at, since the host would wait. A
term is Σ q (exp ζ - 1 - ζ) with ζ the logarithm of p, or of a mixture, over q. It is ≥ 0 class by class, and hardly
feels an error of log p/q that all classes share. Beside the logits and gradients, a few tensors of a tile are in use at
a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torch_klloss.numerics.devices import has_float64
from torch_klloss.numerics.softmax.pairs import KL, Rows
from torch_klloss.numerics.softmax.tiles import Problem, Tile, add_to_sums, tiles_of, tops_of

_CPU, _PART = (2**13, 2**15), 2**8  # numbers of a tile on the CPU, at least and at most; in between this part of all
_FEW, _FEWER = 2**19, 2**15  # logits, which make one tile: their memory is no matter; and those of a panel of a head
_PARTS = {4: 112, 2: 144}  # of more logits by their size in bytes, so that the tensors of a tile are a tenth of them
_FAR = 1e300  # log p/q of a class that only one of them has
_LARGEST_EXPONENT = 700.0
_NEAR = 0.03  # of ζ, below which a series takes the place of exp
_SMALL = 1e-14  # a KL, for which log p/q is first taken from the mean of b - a, which it is below by the KL


class _Term(NamedTuple):
    """A term, KL(q‖(1 - mix) q + mix p), in which q and p are exchanged where the sign is -1."""

    weight: float
    mix: float
    sign: int


def can_be_taken(a: Tensor, b: Tensor) -> bool:
    """Return whether float64 has twice the digits of the logits, and the device has it."""
    return torch.float64 not in (a.dtype, b.dtype) and has_float64(a.device)


def compute(a: Tensor, b: Tensor, index: Tensor | None, problem: Problem) -> Rows:
    """Return the rows of logits a and b, `[rows, classes]`; on the CPU those at the index."""
    q_top, p_top = (tops_of(t, index, problem, torch.float64) for t in (a, b))
    (q_total, difference, first), (q_lacks, p_lacks) = _sums(a, b, index, q_top, p_top, problem)
    p_total, log_norm, mean = q_total + difference, torch.log1p(difference / q_total), first / q_total
    is_small = log_norm - mean < _SMALL
    centre = torch.where(is_small, mean, log_norm)
    rows = Rows(q_top, p_top, q_total, p_total, centre, *(torch.zeros_like(centre),) * 7)
    sums = [torch.zeros_like(centre) for _ in range(6)]
    for tile in _tiles(a, index, problem):
        q, p, z = _normalised(tile, a, b, rows, problem)
        for term, some in zip(_terms(problem), (sums[:3], sums[3:]), strict=False):
            sides = (q, p) if term.sign > 0 else (p, q)
            parts = _sums_of_term(*sides, z, term)
            add_to_sums(some[: len(parts)], tile.place, parts)
        del q, p, z  # or they stay in use during the next tile
    by_q, q_gap, q_score, by_p, p_gap, p_score = problem.total(torch.stack(sums))
    centre = torch.where(is_small, centre + by_q, centre) if problem.terms.q_mix == 1 else centre
    if problem.terms.q_mix == 1:
        by_q = torch.where(p_lacks, math.inf, by_q)
    if problem.terms.p_mix == 1:
        by_p = torch.where(q_lacks, math.inf, by_p)
    return Rows(q_top, p_top, q_total, p_total, centre, is_small.double(), by_q, by_p, q_gap, q_score, p_gap, p_score)


def write_derivatives(
    a: Tensor, b: Tensor, index: Tensor | None, rows: Rows, grad: Tensor, problem: Problem,
    by_a: Tensor | None, by_b: Tensor | None,
) -> None:  # fmt: skip
    """Write grad, `[rows, 1]`, times the derivatives into `by_a` and `by_b`; 0 where the divergence is infinite."""
    grad = torch.where(rows.value(problem.terms) == torch.inf, 0.0, grad * problem.scale)
    q_kl, p_kl = (torch.where(t == torch.inf, 0.0, t) for t in (rows.by_q, rows.by_p))
    means = (q_kl, rows.q_gap, rows.q_score), (p_kl, rows.p_gap, rows.p_score)
    for tile in _tiles(a, index, problem):
        q, p, z = _normalised(tile, a, b, rows, problem)
        for out, is_first in ((by_a, True), (by_b, False)):
            found = None
            for term, numbers in zip(_terms(problem), means, strict=False):
                if out is not None:
                    sides = (q, p) if term.sign > 0 else (p, q)
                    slope = _first_slope if is_first == (term.sign > 0) else _second_slope
                    part = slope(*sides, z, term, *(t[tile.place] for t in numbers)).mul_(term.weight)
                    found = part if found is None else found.add_(part)
                    del part
            if found is not None and out is not None:
                tile.put(out, found.mul_(grad[tile.place]))
        del q, p, z, found  # or they stay in use during the next tile


def _terms(problem: Problem) -> Iterator[_Term]:
    by_q, q_mix, by_p, p_mix = problem.terms
    yield _Term(by_q, q_mix, 1)
    if by_p:
        yield _Term(by_p, p_mix, -1)


def _tiles(a: Tensor, index: Tensor | None, problem: Problem) -> Iterator[Tile]:
    """Yield strips of the longer dimension, on the CPU what fits into a cache; none of a shard without a real token."""
    num_rows, num_classes = a.shape
    if a.is_cpu:
        low, high = _CPU
        yield from tiles_of(a, index, max(low, min(high, a.numel() // _PART))) if num_classes else ()
        return
    parts = problem.parts or _PARTS[a.element_size()]
    parts = parts if problem.terms == KL or problem.parts else parts * 5 // 4
    parts = 1 if a.numel() <= (_FEWER if problem.parts else _FEW) else parts
    step = max(1, math.ceil(max(num_rows, num_classes) / parts))
    everything = slice(0, num_rows)
    for start in range(0, max(num_rows, num_classes) if num_classes else 0, step):
        if num_classes >= num_rows:
            yield Tile(everything, everything, slice(start, min(start + step, num_classes)))
        else:
            rows = slice(start, min(start + step, num_rows))
            yield Tile(rows, rows, slice(0, num_classes))


def _sums(
    a: Tensor, b: Tensor, index: Tensor | None, q_top: Tensor, p_top: Tensor, problem: Problem
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the sums of q's exponentials, of how much p's exceed them, and of log p/q under q's; and what is lacking.

    That is whether q and p lack a class that the other one has. The difference of the sums would have lost the digits
    of small classes beside one that is 1 on both sides.
    """
    terms, sums = problem.terms, [torch.zeros_like(q_top) for _ in range(3)]
    lowest, highest = torch.zeros_like(q_top), torch.zeros_like(q_top)
    for tile in _tiles(a, index, problem):
        q, p, gap = _weights(tile, a, b, q_top, p_top, problem)
        if terms.q_mix == 1:
            lowest[tile.place] = torch.minimum(lowest[tile.place], gap.amin(-1, keepdim=True))
        if terms.by_p and terms.p_mix == 1:
            highest[tile.place] = torch.maximum(highest[tile.place], gap.amax(-1, keepdim=True))
        add_to_sums(sums, tile.place, tuple(t.sum(-1, keepdim=True) for t in (q, p.sub_(q), gap.mul_(q))))
        del q, p, gap  # or they stay in use during the next tile
    lacks = problem.largest(highest) > _FAR / 2, problem.largest(-lowest) > _FAR / 2
    return problem.total(torch.stack(sums)), lacks


def _weights(
    tile: Tile, a: Tensor, b: Tensor, q_top: Tensor, p_top: Tensor, problem: Problem
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the exponentials, at most 1, and log p/q up to a constant, which is 0 where both are largest."""
    x, y = tile.of(a).double().sub_(q_top[tile.place]), tile.of(b).double().sub_(p_top[tile.place])
    gap = y - x
    if problem.scale != 1:
        for t in (gap, x, y):
            t.mul_(problem.scale)
    return x.exp_(), y.exp_(), gap.nan_to_num_(nan=0.0, posinf=_FAR, neginf=-_FAR)


def _normalised(tile: Tile, a: Tensor, b: Tensor, rows: Rows, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, p and z = log p/q."""
    q, p, gap = _weights(tile, a, b, rows.q_top, rows.p_top, problem)
    place = tile.place
    return q.div_(rows.q_total[place]), p.div_(rows.p_total[place]), gap.sub_(rows.centre[place])


def _sums_of_term(q: Tensor, p: Tensor, z: Tensor, term: _Term) -> tuple[Tensor, ...]:
    """Return the sums of q (exp ζ - 1 - ζ), and for a mixture of p (q/m - 1) and q times the score."""
    _, mix, sign = term
    is_kl = mix == 1
    log_ratio, s = (z, sign) if is_kl else (_log_mixture(z, term), 1)
    near = (log_ratio + 5.0 * s).mul_(log_ratio).add_(20.0).mul_(log_ratio).add_(60.0 * s)
    near.mul_(log_ratio).mul_(log_ratio).mul_(q).mul_(s / 120)
    far = p - q if is_kl else (p - q).mul_(mix)
    far.addcmul_(q, log_ratio, value=-s)  # with p itself in place of q exp ζ
    value = torch.where(log_ratio.abs() < _NEAR, near, far, out=near).sum(-1, keepdim=True)
    if is_kl:
        return (value,)
    del near, far
    gap = _gap(log_ratio)
    mean_gap = (p * gap).sum(-1, keepdim=True)
    return value, mean_gap, _score(log_ratio, gap, mix).mul_(q).sum(-1, keepdim=True)


def _first_slope(
    q: Tensor, p: Tensor, z: Tensor, term: _Term, value: Tensor, mean_gap: Tensor, mean_score: Tensor
) -> Tensor:
    """Return the derivative of a term by the logits of its q."""
    if term.mix == 1:
        return torch.add(z, value, alpha=term.sign).mul_(q).mul_(-term.sign)
    log_ratio = _log_mixture(z, term)
    return _score(log_ratio, _gap(log_ratio), term.mix).sub_(mean_score).mul_(q)


def _second_slope(
    q: Tensor, p: Tensor, z: Tensor, term: _Term, value: Tensor, mean_gap: Tensor, mean_score: Tensor
) -> Tensor:
    """Return the derivative of a term by the logits of its p."""
    if term.mix != 1:
        return _gap(_log_mixture(z, term)).sub_(mean_gap).mul_(p).mul_(-term.mix)
    near = (z if term.sign > 0 else -z).clamp(max=1.0)
    is_near = near < 1.0
    return torch.where(is_near, near.expm1_().mul_(q), p - q, out=near)


def _log_mixture(z: Tensor, term: _Term) -> Tensor:
    """Return the logarithm of the mixture m over q."""
    z = z.clamp(max=_LARGEST_EXPONENT) if term.sign > 0 else z.neg().clamp_(max=_LARGEST_EXPONENT)
    return z.expm1_().mul_(term.mix).log1p_()


def _gap(log_mixture: Tensor) -> Tensor:
    """Return q/m - 1."""
    return log_mixture.neg().expm1_()


def _score(log_mixture: Tensor, gap: Tensor, mix: float) -> Tensor:
    """Return the derivative of q log q/m by q, up to a constant; the logarithm is written over."""
    return log_mixture.add_(gap, alpha=1 - mix).neg_()
