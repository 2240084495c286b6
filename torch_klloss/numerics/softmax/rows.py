"""Rows of many classes, computed tile by tile in dtypes that are wide enough, on the CPU as fast as each row allows.

There every row is tried by faster ways first, which tell whether it has kept its digits: `blocks` and `centred` in
float32 and then in float64, and `differences`. What is left is computed with care, as is everything elsewhere, where no
number can be looked at without a wait: by `wide` if float64 has digits to spare, else by `pairs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from torch_klloss.numerics.elementary import has_float64
from torch_klloss.numerics.softmax import blocks, centred, wide
from torch_klloss.numerics.softmax.block_terms import write_by_blocks
from torch_klloss.numerics.softmax.blocks import by_blocks
from torch_klloss.numerics.softmax.centred import by_centring, write_by_centring
from torch_klloss.numerics.softmax.differences import by_differences, write_by_differences
from torch_klloss.numerics.softmax.pairs import (
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
from torch_klloss.numerics.softmax.tiles import Problem, add_to_sums, tiles_of, tops_of

_TILE, _MANY = 2**15, 2**21  # numbers of a tile elsewhere than on the CPU; and of logits that are many
_PARTS = {8: 256, 4: 216, 2: 310}  # of many logits by their size in bytes, for the sake of memory
_CAREFUL_TILE = 2**12  # numbers of a tile of the careful formula, which has many tensors, in float64
_CAREFUL, _EQUAL = 0, 1  # kinds of rows
_DIFFERENCES = 2
_CENTRED = {torch.float32: 3, torch.float64: 4}
_BLOCKS = 5  # another, more by 1 if float32 is enough for the derivative by a, and by 2 if it is for that by b


@dataclass
class Computed:
    """Rows and how they were computed.

    Attributes:
        rows: `[12, rows, 1]`, in float64 on the CPU, the fields of `Rows`.
        kind: on the CPU how each was computed.
    """

    rows: Tensor
    kind: Tensor | None

    def value(self, terms: Terms) -> Tensor:
        """Return the divergences, `[rows, 1]`."""
        return Rows(*self.rows).value(terms)

    def take(self, left: Tensor, rows: Tensor, kinds: Tensor | int, is_good: Tensor) -> Tensor:
        """Keep the good ones of rows that were tried, and return the places of the others."""
        assert self.kind is not None
        some = left[is_good]
        self.rows[:, some] = rows[:, is_good]
        self.kind[some] = kinds[is_good] if isinstance(kinds, Tensor) else kinds
        return left[~is_good]


def compute(a: Tensor, b: Tensor, index: Tensor | None, problem: Problem) -> Computed:
    """Return the rows of logits a and b, `[rows, classes]`; on the CPU only of those at the index, in its order."""
    if not a.is_cpu:
        return Computed(torch.stack(_careful(a, b, None, problem)), None)
    num_rows = len(a) if index is None else len(index)
    rows = torch.zeros(len(Rows._fields), num_rows, 1, dtype=torch.float64)
    computed = Computed(rows, kind := torch.zeros(num_rows, dtype=torch.int8))
    if not problem.is_sharded:  # a shard does not see the others
        kind[_equal_rows(a, b, index)] = _EQUAL
    left = (kind == _CAREFUL).nonzero().squeeze(-1)
    for try_some, dtype in _ways(a, b, problem):
        if len(left):
            left = try_some(a, b, index, left, problem, dtype, computed)
    if len(left):
        rows[:, left] = torch.stack(_careful(a, b, _at(index, left), problem))
    return computed


Way: TypeAlias = Callable[[Tensor, Tensor, "Tensor | None", Tensor, Problem, torch.dtype, Computed], Tensor]


def _ways(a: Tensor, b: Tensor, problem: Problem) -> Iterator[tuple[Way, torch.dtype]]:
    """Yield how rows are computed on the CPU before `_careful` takes what is left: the fastest way first."""
    has_blocks = blocks.can_be_tried(a, b, problem)
    if has_blocks and problem.is_exact:
        yield _try_blocks, torch.float32
    if centred.can_be_tried(a, b, problem, torch.float64):
        for dtype in (torch.float32, torch.float64):
            if centred.can_be_tried(a, b, problem, dtype):
                yield _try_centring, dtype
        return
    if has_blocks:
        yield _try_blocks, torch.float64
    if not has_float64(a, b):  # the exponentials may not have been within the range of blocks
        yield _try_differences, torch.float64


def _try_centring(
    a: Tensor, b: Tensor, index: Tensor | None, left: Tensor, problem: Problem, dtype: torch.dtype, computed: Computed
) -> Tensor:
    """Compute rows from the difference less its mean, and return what is left."""
    rows, is_good = by_centring(a, b, _at(index, left), problem, dtype)
    return computed.take(left, rows, _CENTRED[dtype], is_good)


def _try_blocks(
    a: Tensor, b: Tensor, index: Tensor | None, left: Tensor, problem: Problem, dtype: torch.dtype, computed: Computed
) -> Tensor:
    """Compute rows by sums of blocks, and return what is left."""
    where = index if len(left) == computed.rows.shape[1] else _at(index, left)
    found = by_blocks(a, b, where, problem, dtype)
    first, second = found.is_single
    return computed.take(left, found.rows, _BLOCKS + first.to(torch.int8) + 2 * second.to(torch.int8), found.is_good)


def _try_differences(
    a: Tensor, b: Tensor, index: Tensor | None, left: Tensor, problem: Problem, dtype: torch.dtype, computed: Computed
) -> Tensor:
    """Compute rows by differences, and return what is left."""
    rows, is_good = by_differences(a, b, _at(index, left), problem, dtype)
    return computed.take(left, rows, _DIFFERENCES, is_good)


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


def write_derivatives(
    a: Tensor, b: Tensor, index: Tensor | None, computed: Computed, grad: Tensor, problem: Problem,
    by_a: Tensor | None, by_b: Tensor | None,
) -> None:  # fmt: skip
    """Write grad, `[rows, 1]`, times the derivatives into `by_a` and `by_b`."""
    rows = Rows(*computed.rows)
    if computed.kind is None:
        _write(a, b, None, rows, grad, problem, _wide_dtype(a, b), by_a, by_b)
        return
    for kind in computed.kind.unique().tolist():
        which = (computed.kind == kind).nonzero().squeeze(-1)
        is_all = len(which) == len(computed.kind)
        some = index if is_all else _at(index, which)
        if kind == _EQUAL:
            for whole in (by_a, by_b):
                if whole is not None:
                    whole[slice(None) if some is None else some] = 0
            continue
        chosen, g = (rows, grad) if is_all else (Rows(*computed.rows[:, which]), grad[which])
        if kind < _BLOCKS:
            write, dtype = _WRITERS[kind]
            write(a, b, some, chosen, g, problem, dtype, by_a, by_b)
            continue
        is_single = [(kind - _BLOCKS) & bit or out is None for bit, out in ((1, by_a), (2, by_b))]
        dtype = torch.float32 if all(is_single) else torch.float64
        write_by_blocks(a, b, some, chosen, g, problem, dtype, by_a, by_b)


def rows_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """Return the dtype of `Computed.rows`."""
    return torch.float64 if a.is_cpu or wide.can_be_taken(a, b) else _wide_dtype(a, b)


def _wide_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic where float64 may be missing."""
    return torch.float64 if has_float64(a, b) else torch.float32


def _at(index: Tensor | None, some: Tensor) -> Tensor:
    return some if index is None else index[some]


# --- the careful formula ------------------------------------------------------------------------------------------


def _size(a: Tensor) -> int:
    if a.is_cpu:
        return _CAREFUL_TILE
    return _TILE if a.numel() < _MANY else a.numel() // _PARTS[a.element_size()]


def _arithmetic(a: Tensor, b: Tensor, problem: Problem, dtype: torch.dtype) -> Arithmetic:
    return Arithmetic(problem.temperature, is_exact=dtype == torch.float32 or has_float64(a, b))


def _careful(a: Tensor, b: Tensor, index: Tensor | None, problem: Problem) -> Rows:
    """Return the rows by `wide` where it can, else by `pairs`."""
    if wide.can_be_taken(a, b):
        return wide.compute(a, b, index, problem)
    dtype = _wide_dtype(a, b)
    q_top, p_top = (tops_of(t, index, problem, dtype) for t in (a, b))
    arithmetic, terms = _arithmetic(a, b, problem, dtype), problem.terms
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
    """Write the derivatives of `_careful`."""
    if wide.can_be_taken(a, b):
        wide.write_derivatives(a, b, index, rows, grad, problem, by_a, by_b)
        return
    arithmetic = _arithmetic(a, b, problem, dtype)
    for tile in tiles_of(a, index, _size(a)):
        x, y, some = tile.of(a).to(dtype), tile.of(b).to(dtype), _part(rows, tile.place)
        found = derivatives(x, y, some, grad[tile.place].to(dtype), arithmetic, problem.terms)
        for whole, part in zip((by_a, by_b), found, strict=True):
            if whole is not None:
                tile.put(whole, part)


def _part(rows: Rows, place: slice) -> Rows:
    return Rows(*(t[place] for t in rows))


_WRITERS = {
    _CAREFUL: (_write, torch.float64),
    **{kind: (write_by_centring, dtype) for dtype, kind in _CENTRED.items()},
    _DIFFERENCES: (write_by_differences, torch.float64),
}
