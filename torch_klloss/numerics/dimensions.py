"""Sums over the last dimensions of a tensor."""

from __future__ import annotations

from torch import Tensor


def sum_last(t: Tensor, dims: int) -> Tensor:
    """Return t summed over its last `dims` dimensions; t itself for 0."""
    return t.sum(tuple(range(-dims, 0))) if dims > 0 else t


def sum_after(t: Tensor, dims: int) -> Tensor:
    """Return t summed over all dimensions after the first `dims`; t itself where it has no others."""
    return sum_last(t, t.dim() - dims)
