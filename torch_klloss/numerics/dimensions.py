"""Sums over the last dimensions of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_last(t: Tensor, dims: int) -> Tensor:
    """Return t summed over its last `dims` dimensions; t itself for 0."""
    return t.sum(tuple(range(-dims, 0))) if dims > 0 else t


def sum_after(t: Tensor, dims: int) -> Tensor:
    """Return t summed over all dimensions after the first `dims`; t itself where it has no others."""
    return sum_last(t, t.dim() - dims)


def common_shape(*shapes: torch.Size) -> torch.Size:
    """Return the shape that the shapes broadcast to; `torch.broadcast_shapes` takes its time even for equal ones."""
    first = shapes[0]
    return first if all(shape == first for shape in shapes) else torch.broadcast_shapes(*shapes)
