"""Rows of many classes, computed tile by tile in dtypes that are wide enough, on the CPU as fast as each row allows.

A difference of two numbers is the fastest form of a divergence, in float32 where the numbers are not much larger than
their difference, else in float64; where the float64 numbers cancel too, `softmax_pairs` computes the row. Off the CPU
no number can be looked at without a wait: `softmax_wide` computes all rows where it can, and `softmax_pairs` elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_klloss.numerics.softmax_blocks import by_blocks, can_be_tried, write_by_blocks
from torch_klloss.numerics.softmax_differences import by_differences, write_by_differences
from torch_klloss.numerics.softmax_pairs import (
    Arithmetic,
    Rows,
    Terms,
    derivatives,
    first_rows,
    passes,
    rows_of_sums,
    sums_of_terms,
    sums_of_weights,
)
from torch_klloss.numerics.softmax_tiles import Problem, add_to_sums, tiles_of, tops_of

_TILE = 2**15  # numbers of a tile elsewhere than on the CPU, at least; otherwise this part of the logits:
_SHARE = 2**8
_CAREFUL_TILE = 2**12  # numbers of a tile of the careful formula, which has many tensors, in float64
_EQUAL = 3
_FEWEST = 256  # classes from which on their roundings average out in float32


@dataclass
class Computed:
    """Rows and how they were computed.

    Attributes:
        rows: `[12, rows, 1]`, in float64 on the CPU, the fields of `Rows`.
        kind: on the CPU 0 for a row of the careful formula, 1 and 2 for a difference in float32 and float64, 3 for one
            that is the same on both sides.
    """

    rows: Tensor
    kind: Tensor | None

    def value(self, terms: Terms) -> Tensor:
        """Return the divergences, `[rows, 1]`."""
        return Rows(*self.rows).value(terms)


def compute(a: Tensor, b: Tensor, index: Tensor | None, problem: Problem) -> Computed:
    """Return the rows of logits a and b, `[rows, classes]`; on the CPU only of those at the index, in its order."""
    if softmax_wide.is_wide(a):
        return Computed(torch.stack(softmax_wide.compute(a, b, problem)), None)
    if not a.is_cpu:
        return Computed(torch.stack(_careful(a, b, None, problem, wide_dtype(a))), None)
    num_rows = len(a) if index is None else len(index)
    rows = torch.zeros(len(Rows._fields), num_rows, 1, dtype=torch.float64)
    kind = torch.zeros(num_rows, dtype=torch.int8)
    if not problem.is_sharded:  # a shard does not see the others
        kind[_equal_rows(a, b, index)] = _EQUAL
    left, in_blocks = (kind == 0).nonzero().squeeze(-1), can_be_tried(a, problem)
    for number, dtype in ((1, torch.float32), (2, torch.float64)):
        if not _is_worth_it(a, dtype, problem):
            continue
        pilot = left[: max(1, len(left) // 8)] if number == 1 and not in_blocks else left
        for some in (pilot, left[len(pilot) :]):
            if len(some) == 0 or (some is not pilot and kind[pilot].sum() * 2 < len(pilot)):
                continue
            where = index if len(some) == num_rows else _at(index, some)
            if number == 1 and in_blocks:
                found, is_good = by_blocks(a, b, where, problem)
            else:
                found, is_good = by_differences(a, b, where, problem, dtype)
            rows[:, some[is_good]], kind[some[is_good]] = found[:, is_good], number
        left = left[kind[left] == 0]
    if len(left):
        rows[:, left] = torch.stack(_careful(a, b, _at(index, left), problem, torch.float64))
    return Computed(rows, kind)


def _equal_rows(a: Tensor, b: Tensor, index: Tensor | None) -> Tensor:
    """Return the places of the rows that are the same on both sides, as those of a copy are, and finite at the top."""
    first = [t[:, :1] if index is None else t[index, :1] for t in (a, b)]
    rows = (first[0] == first[1]).all(-1).nonzero().squeeze(-1)  # hardly a row but the equal ones
    if len(rows) == 0:
        return rows
    is_equal = torch.ones(len(rows), 1, dtype=torch.bool)
    top = torch.full((len(rows), 1), -torch.inf)
    for tile in tiles_of(a, _at(index, rows), _TILE):
        x = tile.of(a)
        is_equal[tile.place] &= (x == tile.of(b)).all(-1, keepdim=True)
        top[tile.place] = torch.maximum(top[tile.place], x.amax(-1, keepdim=True).to(top.dtype))
    return rows[(is_equal & top.isfinite()).squeeze(-1)]


def _is_worth_it(a: Tensor, dtype: torch.dtype, problem: Problem) -> bool:
    """Return whether a difference in the dtype is worth trying."""
    if dtype == torch.float64:
        return a.dtype != torch.float64
    if problem.is_sharded:  # the shards must all try the same, whatever their size
        return False
    is_power = math.frexp(problem.temperature)[0] == 0.5
    return a.dtype != torch.float64 and is_power and a.shape[-1] >= _FEWEST


def write_derivatives(
    a: Tensor, b: Tensor, index: Tensor | None, computed: Computed, grad: Tensor, problem: Problem,
    by_a: Tensor | None, by_b: Tensor | None,
) -> None:  # fmt: skip
    """Write grad, `[rows, 1]`, times the derivatives into `by_a` and `by_b`."""
    rows = Rows(*computed.rows)
    if softmax_wide.is_wide(a):
        softmax_wide.write_derivatives(a, b, rows, grad, problem, by_a, by_b)
        return
    if computed.kind is None:
        _write(a, b, None, rows, grad, problem, wide_dtype(a), by_a, by_b)
        return
    for number, dtype in ((1, torch.float32), (2, torch.float64), (_EQUAL, torch.float64), (0, torch.float64)):
        which = (computed.kind == number).nonzero().squeeze(-1)
        if len(which) == 0:
            continue
        is_all = len(which) == len(computed.kind)
        some = index if is_all else _at(index, which)
        chosen, g = (rows, grad) if is_all else (Rows(*computed.rows[:, which]), grad[which])
        if number == _EQUAL:
            for whole in (by_a, by_b):
                if whole is not None:
                    whole[slice(None) if some is None else some] = 0
            continue
        if number == 1 and can_be_tried(a, problem):
            write_by_blocks(a, b, some, torch.stack(chosen), g, problem, by_a, by_b)
            continue
        write = write_by_differences if number else _write
        write(a, b, some, chosen, g, problem, dtype, by_a, by_b)


def rows_dtype(a: Tensor) -> torch.dtype:
    """Return the dtype of `Computed.rows`."""
    return torch.float64 if a.is_cpu or softmax_wide.is_wide(a) else wide_dtype(a)


def wide_dtype(a: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic where float64 may be missing."""
    return torch.float64 if a.dtype == torch.float64 else torch.float32


def _at(index: Tensor | None, some: Tensor) -> Tensor:
    return some if index is None else index[some]


# --- the careful formula ------------------------------------------------------------------------------------------


def _size(a: Tensor) -> int:
    return _CAREFUL_TILE if a.is_cpu else max(_TILE, a.numel() // _SHARE)


def _arithmetic(a: Tensor, problem: Problem, dtype: torch.dtype) -> Arithmetic:
    return Arithmetic(problem.temperature, is_exact=dtype == torch.float32 or a.dtype == torch.float64)


def _careful(a: Tensor, b: Tensor, index: Tensor | None, problem: Problem, dtype: torch.dtype) -> Rows:
    """Return the rows by `softmax_pairs`."""
    q_top, p_top = (tops_of(t, index, problem, dtype) for t in (a, b))
    arithmetic, terms = _arithmetic(a, problem, dtype), problem.terms
    sums = [torch.zeros_like(q_top) for _ in range(3)]
    for tile in tiles_of(a, index, _size(a)):
        x, y = tile.of(a).to(dtype), tile.of(b).to(dtype)
        add_to_sums(sums, tile.place, sums_of_weights(arithmetic.weights(x, y, q_top[tile.place], p_top[tile.place])))
    rows = first_rows(q_top, p_top, tuple(problem.total(torch.stack(sums))))
    for some in passes(terms):
        sums = [torch.zeros_like(q_top) for _ in range(8)]
        for tile in tiles_of(a, index, _size(a)):
            x, y, part = tile.of(a).to(dtype), tile.of(b).to(dtype), _part(rows, tile.place)
            weights = arithmetic.weights(x, y, part.q_top, part.p_top)
            add_to_sums(sums, tile.place, sums_of_terms(weights, x, y, part, some))
        rows = rows_of_sums(tuple(problem.total(torch.stack(sums))), rows, some)
    return rows


def _write(
    a: Tensor, b: Tensor, index: Tensor | None, rows: Rows, grad: Tensor, problem: Problem, dtype: torch.dtype,
    by_a: Tensor | None, by_b: Tensor | None,
) -> None:  # fmt: skip
    """Write the derivatives by `softmax_pairs`."""
    arithmetic = _arithmetic(a, problem, dtype)
    for tile in tiles_of(a, index, _size(a)):
        x, y, some = tile.of(a).to(dtype), tile.of(b).to(dtype), _part(rows, tile.place)
        found = derivatives(x, y, some, grad[tile.place].to(dtype), arithmetic, problem.terms)
        for whole, part in zip((by_a, by_b), found, strict=True):
            if whole is not None:
                tile.put(whole, part)


def _part(rows: Rows, place: slice) -> Rows:
    return Rows(*(t[place] for t in rows))
