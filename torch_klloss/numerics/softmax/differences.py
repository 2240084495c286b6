"""Divergences as differences of two numbers in float64, of which they have lost no more than half of the digits."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torch_klloss.numerics.softmax.pairs import Rows, Terms
from torch_klloss.numerics.softmax.tiles import Problem, Tile, add_to_sums, shift_of, tiles_of, tops_of

_BYTES = 2**17, 2**19  # of one tensor of a tile, at least and at most; in between this part of the logits in float32:
_PART = 2**7
_DOUBLE = 2.0**-24  # a divergence in float64, relative to the numbers that it is the difference of
_LEAST_LOG = {torch.float32: -80.0, torch.float64: -700.0}  # of a probability
_FAR = 1e30


def _bytes(a: Tensor) -> int:
    """Return the size of a tensor of a tile: a step of torch takes as long as some thousand numbers."""
    low, high = _BYTES
    return min(high, max(low, 4 * a.numel() // _PART))


def by_differences(
    a: Tensor, b: Tensor, index: Tensor | None, problem: Problem, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the rows `[12, rows, 1]` from differences of sums, and which of them have kept their digits."""
    terms = problem.terms
    tops = [tops_of(t, index, problem, torch.float64) for t in (a, b)]
    q_top, p_top = (shift_of(top, problem, dtype) for top in tops)
    shifts = _needed(q_top), _needed(p_top)
    for with_gaps in (False, True):  # classes that one side lacks are rare
        sums = [torch.zeros_like(q_top) for _ in range(4)]
        for tile in tiles_of(a, index, _bytes(a) // dtype.itemsize):
            add_to_sums(sums, tile.place, _sums(tile, a, b, shifts, problem, dtype, with_gaps=with_gaps))
        if bool(torch.stack(sums).isfinite().all()):
            break
    q_total, p_total, q_first, p_first = problem.total(torch.stack(sums))
    log_norm, offset = torch.log(p_total / q_total), p_top - q_top
    q_mean, p_mean = ((t / total - offset) * problem.scale for t, total in ((q_first, q_total), (p_first, p_total)))
    zero = torch.zeros_like(log_norm)
    rows = Rows(q_top, p_top, q_total, p_total, log_norm, zero, log_norm - q_mean, p_mean - log_norm, *(zero,) * 4)
    size = 1 + log_norm.abs() + q_mean.abs() + (p_mean.abs() if terms.by_p else 0)
    if terms.is_mixed:
        rows, size = _add_mixed_terms(a, b, index, rows, problem, dtype), torch.ones_like(size)
    smallest = torch.minimum(rows.by_q, rows.by_p) if terms.by_p else rows.by_q
    is_good = torch.minimum(q_total, p_total) > torch.finfo(dtype).tiny ** 0.5
    return torch.stack(rows), (is_good & (smallest > _DOUBLE * size)).squeeze(-1)


def _sums(
    tile: Tile,
    a: Tensor,
    b: Tensor,
    shifts: Shifts,
    problem: Problem,
    dtype: torch.dtype,
    *,
    with_gaps: bool,
) -> tuple[Tensor, ...]:
    """Return the sums of the exponentials, and of b - a under both of them, each of these only where it is needed."""
    terms = problem.terms
    q, p, ratio = _weights(tile, a, b, shifts, problem, dtype, with_ratio=not terms.is_mixed, with_gaps=with_gaps)
    q_total, p_total = q.sum(-1, keepdim=True), p.sum(-1, keepdim=True)
    if ratio is None:
        return q_total, p_total, q_total, p_total
    second = p.mul_(ratio).sum(-1, keepdim=True) if terms.by_p else p_total
    return q_total, p_total, q.mul_(ratio).sum(-1, keepdim=True), second


Shifts: TypeAlias = tuple[Tensor | None, Tensor | None]


def _needed(top: Tensor) -> Tensor | None:
    """Return what is taken off the logits, or None where that is nothing."""
    return top if bool(top.any()) else None


def _placed(top: Tensor | None, tile: Tile) -> Tensor | None:
    return None if top is None else top[tile.place]


def _weights(
    tile: Tile,
    a: Tensor,
    b: Tensor,
    shifts: Shifts,
    problem: Problem,
    dtype: torch.dtype,
    *,
    with_ratio: bool = True,
    with_gaps: bool | None = None,
) -> tuple[Tensor, Tensor, Any]:
    """Return the exponentials, and b - a or None, all new tensors.

    Where there may be gaps (None for where there are), classes that both lack count as equal, and those that q lacks do
    not count.
    """
    x, y = tile.of(a).to(dtype), tile.of(b).to(dtype)
    ratio = y - x if with_ratio else None
    if ratio is not None and with_gaps is None:
        with_gaps = not bool(ratio.sum().isfinite())
    if ratio is not None and with_gaps:
        ratio.nan_to_num_(nan=0.0, posinf=_FAR, neginf=-math.inf)
    q_top, p_top = (_placed(top, tile) for top in shifts)
    return _exp(x, q_top, problem, a), _exp(y, p_top, problem, b), ratio


def _exp(x: Tensor, top: Tensor | None, problem: Problem, given: Tensor) -> Tensor:
    logs = _logs(x, top, problem)
    return torch.exp(logs) if logs is x and x.dtype == given.dtype else logs.exp_()  # the logits themselves stay


def _logs(x: Tensor, top: Tensor | None, problem: Problem) -> Tensor:
    """Return (x - top)/T; x itself where it is that."""
    if top is not None:
        x = x - top.to(x.dtype)
    return x * problem.scale if problem.scale != 1 else x


def write_by_differences(
    a: Tensor, b: Tensor, index: Tensor | None, rows: Rows, grad: Tensor, problem: Problem, dtype: torch.dtype,
    by_a: Tensor | None, by_b: Tensor | None,
) -> None:  # fmt: skip
    """Write the derivatives of `by_differences`."""
    terms = problem.terms
    if terms.is_mixed:
        _write_mixed(a, b, index, rows, grad, problem, dtype, by_a, by_b)
        return
    offset, g = rows.p_top - rows.q_top, grad * problem.scale
    q_mean, p_mean = ((rows.centre + t) / problem.scale + offset for t in (-rows.by_q, rows.by_p))
    q_share, p_share = g / rows.q_total, g / rows.p_total
    factors, shifts = (
        torch.stack((q_mean, p_mean, q_share, p_share)).to(dtype),
        (_needed(rows.q_top), _needed(rows.p_top)),
    )
    for tile in tiles_of(a, index, _bytes(a) // dtype.itemsize):
        q, p, ratio = _weights(tile, a, b, shifts, problem, dtype)
        q_mean, p_mean, q_share, p_share = factors[:, tile.place]
        q.mul_(q_share)
        p.mul_(p_share)
        scale = problem.scale
        if by_a is not None:
            found = torch.sub(q_mean, ratio).mul_(q).mul_(terms.by_q * scale)
            tile.put(by_a, found.add_(q - p, alpha=terms.by_p) if terms.by_p else found)
        if by_b is not None:
            other = ratio.sub_(p_mean).mul_(p).mul_(terms.by_p * scale) if terms.by_p else None
            gap = p.sub_(q)
            if other is not None:
                gap.mul_(terms.by_q).add_(other)
            elif terms.by_q != 1:
                gap.mul_(terms.by_q)
            tile.put(by_b, gap)


# --- mixtures -----------------------------------------------------------------------------------------------------


def _add_mixed_terms(
    a: Tensor, b: Tensor, index: Tensor | None, rows: Rows, problem: Problem, dtype: torch.dtype
) -> Rows:
    """Return the rows with the terms, and with the means of the scores in `q_score` and `p_score`."""
    terms, offsets, is_simple = problem.terms, _offsets(rows, dtype), problem.terms.is_jensens
    sums = [torch.zeros_like(rows.q_top) for _ in range(2 if is_simple else 4)]
    for tile in tiles_of(a, index, _bytes(a) // dtype.itemsize // 2):
        q, p, q_ratio, p_ratio, *mixtures = _ratios(tile, a, b, offsets, problem, dtype)
        pairs = [(q, q_ratio), (p, p_ratio)]
        if not is_simple:
            pairs += zip((q, p), _scores(q, p, q_ratio, p_ratio, mixtures, terms), strict=True)
        add_to_sums(sums, tile.place, tuple((w * t).sum(-1, keepdim=True) for w, t in pairs))
    by_q, by_p, *scores = problem.total(torch.stack(sums))
    q_score, p_score = (by_q * terms.by_q, by_p * terms.by_p) if is_simple else scores
    return rows._replace(by_q=by_q, by_p=by_p, q_score=q_score, p_score=p_score)


Offsets: TypeAlias = tuple[tuple[Tensor | None, Tensor], tuple[Tensor | None, Tensor]]


def _offsets(rows: Rows, dtype: torch.dtype) -> Offsets:
    """Return what is taken off the logits of both sides, and the logarithms of the sums."""
    q, p = (
        (_needed(top), total.log().to(dtype)) for top, total in ((rows.q_top, rows.q_total), (rows.p_top, rows.p_total))
    )
    return q, p


def _ratios(
    tile: Tile, a: Tensor, b: Tensor, offsets: Offsets, problem: Problem, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return q, p, log q/m, log p/m, and their mixtures m."""
    terms = problem.terms
    log_q, log_p = (
        _log_weights(tile.of(t).to(dtype), _placed(top, tile), log_total[tile.place], problem)
        for t, (top, log_total) in zip((a, b), offsets, strict=True)
    )
    q, p = log_q.exp(), log_p.exp()
    mixture = torch.lerp(q, p, terms.q_mix)
    other = mixture if math.isclose(terms.q_mix + terms.p_mix, 1) else torch.lerp(p, q, terms.p_mix)
    log_mixture = mixture.log()
    q_ratio = log_q.sub_(log_mixture)
    p_ratio = log_p.sub_(log_mixture if other is mixture else other.log()) if terms.by_p else log_p
    return q, p, q_ratio, p_ratio, mixture, other


def _scores(
    q: Tensor, p: Tensor, q_ratio: Tensor, p_ratio: Tensor, mixtures: list[Tensor], terms: Terms
) -> tuple[Tensor, Tensor]:
    """Return the derivatives of the divergence by q and by p."""
    mixture, other = mixtures
    q_share = q / mixture
    q_score, p_score = (q_ratio - (1 - terms.q_mix) * q_share) * terms.by_q, q_share * (-terms.by_q * terms.q_mix)
    if terms.by_p:
        p_share = p / other
        q_score -= terms.by_p * terms.p_mix * p_share
        p_score += terms.by_p * (p_ratio - (1 - terms.p_mix) * p_share)
    return q_score, p_score


def _log_weights(x: Tensor, top: Tensor | None, log_total: Tensor, problem: Problem) -> Tensor:
    """Return the log-probabilities, bounded below so that no class is missing."""
    logs = _logs(x, top, problem)
    return (logs - log_total).clamp_(min=_LEAST_LOG[x.dtype])


def _write_mixed(
    a: Tensor, b: Tensor, index: Tensor | None, rows: Rows, grad: Tensor, problem: Problem, dtype: torch.dtype,
    by_a: Tensor | None, by_b: Tensor | None,
) -> None:  # fmt: skip
    terms, offsets, is_simple = problem.terms, _offsets(rows, dtype), problem.terms.is_jensens
    by_q, by_p = (terms.by_q, terms.by_p) if is_simple else (1.0, 1.0)
    scale = grad * problem.scale
    factors = torch.stack((rows.q_score / by_q, rows.p_score / by_p, scale * by_q, scale * by_p)).to(dtype)
    for tile in tiles_of(a, index, _bytes(a) // dtype.itemsize // 2):
        q, p, q_ratio, p_ratio, *mixtures = _ratios(tile, a, b, offsets, problem, dtype)
        q_score, p_score = (q_ratio, p_ratio) if is_simple else _scores(q, p, q_ratio, p_ratio, mixtures, terms)
        q_mean, p_mean, q_factor, p_factor = factors[:, tile.place]
        if by_a is not None:
            tile.put(by_a, q_score.sub_(q_mean).mul_(q).mul_(q_factor))
        if by_b is not None:
            tile.put(by_b, p_score.sub_(p_mean).mul_(p).mul_(p_factor))
