"""Tiles of logits: parts of some rows and classes, so that what is computed of them stays in the cache of a core."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_klloss.numerics.softmax.pairs import Terms

_TILE = 2**15  # numbers of one tensor of a tile, so that a handful of its tensors fit into the cache of a core

_UNSHIFTED = {torch.float32: (-20.0, 60.0), torch.float64: (-300.0, 300.0)}  # largest logits, whose exp is within range


def _same(t: Tensor) -> Tensor:
    return t


@dataclass(frozen=True)
class Problem:
    """What is computed of the rows.

    Attributes:
        terms: the divergence.
        temperature: both logits are divided by it.
        parts: the number of tiles of logits that are a panel of a head, on an accelerator.
        total: adds a tensor over the shards of the vocabulary.
        largest: takes the maximum over them.
    """

    terms: Terms
    temperature: float = 1.0
    parts: int | None = None
    total: Callable[[Tensor], Tensor] = _same
    largest: Callable[[Tensor], Tensor] = _same

    @property
    def is_sharded(self) -> bool:
        """Whether the logits are a shard of the vocabulary."""
        return self.total is not _same

    @property
    def is_exact(self) -> bool:
        """Whether the logits over the temperature, a power of two, are numbers of their own dtype."""
        return math.frexp(self.temperature)[0] == 0.5

    @property
    def scale(self) -> float:
        """The factor of the logits."""
        return 1 / self.temperature


@dataclass(frozen=True)
class Tile:
    """A part of the rows and classes: where it is in the list of rows, in the tensors, and which classes it has."""

    place: slice
    rows: slice | Tensor
    classes: slice

    def of(self, t: Tensor) -> Tensor:
        """Return the tile of a tensor, a copy only where its rows are scattered."""
        if isinstance(self.rows, slice):
            return t[self.rows, self.classes]
        return t.index_select(0, self.rows)[:, self.classes]

    def put(self, whole: Tensor, part: Tensor) -> None:
        """Write the tile of a tensor."""
        if isinstance(self.rows, slice):
            whole[self.rows, self.classes].copy_(part)
        else:
            whole[self.rows, self.classes] = part.to(whole.dtype)


def tiles_of(a: Tensor, index: Tensor | None, size: int) -> Iterator[Tile]:
    """Yield the tiles of the rows at the index, of about so many numbers each."""
    num_rows, num_classes = len(a) if index is None else len(index), a.shape[-1]
    step = max(1, size // max(1, num_classes))
    parts = max(1, math.ceil(num_classes / size))
    width = max(1, math.ceil(num_classes / parts))
    for start in range(0, num_rows, step):
        place = slice(start, min(start + step, num_rows))
        rows = place if index is None else _run(index[place])
        for first in range(0, max(1, num_classes), width):
            yield Tile(place, rows, slice(first, min(first + width, num_classes)))


def _run(index: Tensor) -> slice | Tensor:
    """Return the slice that an ascending index is, or the index."""
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == len(index) else index


def add_to_sums(sums: list[Tensor], place: slice, parts: tuple[Tensor, ...]) -> None:
    """Add the parts of a tile to the sums of its rows."""
    for total, part in zip(sums, parts, strict=True):
        total[place].add_(part)


def tops_of(a: Tensor, index: Tensor | None, problem: Problem, dtype: torch.dtype) -> Tensor:
    """Return the largest logit of every row, over all shards."""
    if a.shape[-1] == 0:  # a shard without a real token
        top = a.new_full((len(a) if index is None else len(index), 1), -torch.inf)
    elif index is None:
        top = a.amax(-1, keepdim=True)
    else:
        top = a.new_full((len(index), 1), -torch.inf)
        for tile in tiles_of(a, index, _TILE):
            part = tile.of(a).amax(-1, keepdim=True)
            top[tile.place] = torch.maximum(top[tile.place], part)
    return problem.largest(top.to(dtype))


def shift_of(top: Tensor, problem: Problem, dtype: torch.dtype) -> Tensor:
    """Return what is taken off the logits: nothing where exp neither over- nor underflows, for so they are exact."""
    low, high = (bound / problem.scale for bound in _UNSHIFTED[dtype])
    return torch.where((top > low) & (top < high), 0.0, top)
