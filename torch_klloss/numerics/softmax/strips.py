"""Strips of logits: a few whole rows, or a part of one, as views where they can be, and buffers beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 2**7  # classes that are added up by themselves
_SHARE = {4: 0.072, 2: 0.11}  # of the logits, that all buffers take, by the bytes of a number
_BYTES = 2**16, 2**19  # of a buffer, at least and at most: a few of them stay in the cache


class Strip(NamedTuple):
    """Some rows and classes.

    Attributes:
        place: the rows in the list of rows.
        where: the rows and classes in the logits.
        blocks: the same rows and the blocks of the classes.
        x, y: the logits over the temperature, in the dtype that is computed in; not to be written to.
        work: buffers of their shape.
    """

    place: slice
    where: tuple[slice, ...]
    blocks: tuple[slice, ...]
    x: Tensor
    y: Tensor
    work: tuple[Tensor, ...]

    @property
    def is_first(self) -> bool:
        """Whether it holds the first classes."""
        return len(self.where) == 1 or self.where[1].start == 0


class Strips:
    """The strips of logits times a scale, whose buffers they share, at the rows of an index, or at all."""

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        index: Tensor | None,
        scale: float,
        dtype: torch.dtype,
        num_work: int,
        *,
        least: int = _BYTES[0],
    ) -> None:
        self.sides, self.scale, self.dtype, self.num_work = (a, b), scale, dtype, num_work
        self.num_rows, num_classes = a.shape
        self.rows = None if index is None else index.tolist()
        if index is not None:
            self.num_rows = len(index)
        self.are_given = [t.dtype == dtype and scale == 1 for t in self.sides]
        num_buffers = num_work + 2 - sum(self.are_given)
        share = _SHARE[a.element_size()] * a.numel() * a.element_size()
        size = int(min(_BYTES[1], max(least, share / num_buffers))) // dtype.itemsize
        self.step, self.width = max(1, size // num_classes), num_classes
        if num_classes > size:
            self.width = math.ceil(num_classes / math.ceil(num_classes / size) / BLOCK) * BLOCK
        self.step, self.are_whole = min(self.step, self.num_rows), self.width == num_classes
        self.memory = torch.empty(num_buffers, self.step * self.width, dtype=dtype).unbind()
        self.buffers: dict[tuple[int, int], list[Tensor]] = {}

    def within(self, place: slice) -> Iterator[Strip]:
        """Yield the strips of the rows of a slice, whose places count from its start on."""
        num_classes = self.sides[0].shape[-1]
        for rows, found in self._runs(place):
            if self.are_whole:
                yield self._strip(rows, (found,), (rows,), (found.stop - found.start, num_classes))
                continue
            for first in range(0, num_classes, self.width):
                stop = min(first + self.width, num_classes)
                blocks = slice(first // BLOCK, -(-stop // BLOCK))
                shape = found.stop - found.start, stop - first
                yield self._strip(rows, (found, slice(first, stop)), (rows, blocks), shape)

    def _strip(self, rows: slice, where: tuple[slice, ...], blocks: tuple[slice, ...], shape: tuple[int, int]) -> Strip:
        if shape not in self.buffers:
            self.buffers[shape] = [m[: shape[0] * shape[1]].view(shape) for m in self.memory]
        buffers = self.buffers[shape]
        spare = iter(buffers[self.num_work :])
        x, y = (
            t[where] if given else self._copied(t[where], next(spare))
            for t, given in zip(self.sides, self.are_given, strict=True)
        )
        return Strip(rows, where, blocks, x, y, tuple(buffers[: self.num_work]))

    def _copied(self, x: Tensor, out: Tensor) -> Tensor:
        out.copy_(x)
        return out if self.scale == 1 else out.mul_(self.scale)

    def _runs(self, place: slice) -> Iterator[tuple[slice, slice]]:
        """Yield runs of consecutive rows: their places from the start of the slice on, and the rows."""
        start, count = place.start, place.stop - place.start
        if self.rows is None:
            for first in range(0, count, self.step):
                stop = min(first + self.step, count)
                yield slice(first, stop), slice(start + first, start + stop)
            return
        rows, first = self.rows[place], 0
        while first < count:
            stop = first + 1
            while stop < count and stop - first < self.step and rows[stop] == rows[stop - 1] + 1:
                stop += 1
            yield slice(first, stop), slice(rows[first], rows[first] + stop - first)
            first = stop
