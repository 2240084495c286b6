"""Strips of logits in float32: a few whole rows, or a part of one, as views where they can be, and buffers beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 2**7  # classes that are added up by themselves
_SHARE = {4: 0.07, 2: 0.10}  # of the logits, that all buffers take, by the bytes of a number
_NUMBERS = 2**14, 3 * 2**15  # of a strip, at least and at most: so many stay in the cache


class Strip(NamedTuple):
    """Some rows and classes.

    Attributes:
        place: the rows in the list of rows.
        rows: the same in the tensors.
        classes: the classes.
        x, y: the logits over the temperature, in float32; not to be written to.
        work: buffers of their shape.
    """

    place: slice
    rows: slice
    classes: slice
    x: Tensor
    y: Tensor
    work: tuple[Tensor, ...]

    def of(self, t: Tensor) -> Tensor:
        """Return a view of a tensor of the logits' shape."""
        return t[self.rows, self.classes]

    @property
    def blocks(self) -> slice:
        """The blocks of the classes."""
        return slice(self.classes.start // BLOCK, -(-self.classes.stop // BLOCK))


def strips_of(a: Tensor, b: Tensor, index: Tensor | None, place: slice, scale: float, num_work: int) -> Iterator[Strip]:
    """Yield the strips of logits times a scale, of the rows in a slice of the index, or of all rows."""
    is_given = [t.dtype == torch.float32 and scale == 1 for t in (a, b)]
    num_copies = 2 - sum(is_given)
    num_classes = a.shape[-1]
    low, high = _NUMBERS
    share = _SHARE[a.element_size()] * a.numel() * a.element_size()
    size = int(min(high, max(low, share / (4 * (num_work + num_copies)))))
    num_rows, width = max(1, size // num_classes), num_classes
    if width > size:
        width = math.ceil(width / math.ceil(width / size) / BLOCK) * BLOCK
    num_rows = min(num_rows, place.stop - place.start)
    memory = torch.empty(num_work + num_copies, num_rows * width)
    for where, rows in _runs(index, place, num_rows):
        for first in range(0, num_classes, width):
            classes = slice(first, min(first + width, num_classes))
            shape = where.stop - where.start, classes.stop - first
            buffers = [m[: shape[0] * shape[1]].view(shape) for m in memory.unbind()]
            x, y = (
                t[rows, classes] if given else _scaled(t[rows, classes], scale, buffers.pop())
                for t, given in zip((a, b), is_given, strict=True)
            )
            yield Strip(where, rows, classes, x, y, tuple(buffers))


def _scaled(x: Tensor, scale: float, out: Tensor) -> Tensor:
    out.copy_(x)
    return out if scale == 1 else out.mul_(scale)


def _runs(index: Tensor | None, place: slice, most: int) -> Iterator[tuple[slice, slice]]:
    """Yield runs of consecutive rows: their places from the start of the slice on, and the rows."""
    start, count = place.start, place.stop - place.start
    if index is None:
        for first in range(0, count, most):
            stop = min(first + most, count)
            yield slice(first, stop), slice(start + first, start + stop)
        return
    rows = index[place].tolist()
    first = 0
    while first < count:
        stop = first + 1
        while stop < count and stop - first < most and rows[stop] == rows[stop - 1] + 1:
            stop += 1
        yield slice(first, stop), slice(rows[first], rows[first] + stop - first)
        first = stop
