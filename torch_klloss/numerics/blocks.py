"""Blocks of tensors that broadcast: an elementwise formula computed in parts whose intermediates stay in the cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from torch_klloss.numerics.dimensions import common_shape, sum_last
from torch_klloss.numerics.elementary import narrowed

Derivatives = Sequence["Tensor | None"]

BLOCK = 2**15  # elements a thread: a handful of tensors of so many stay in the second cache of a core


def are_large(tensors: Sequence[Tensor]) -> bool:
    """Return whether blocks pay: one of the tensors is large, and all are on the CPU."""
    for t in tensors:
        if t.numel() > 2 * BLOCK:
            return all(t.is_cpu for t in tensors)
    return False


def evaluate(
    kernel: Callable[..., tuple[Tensor, Derivatives]],
    needs: Sequence[bool],
    tensors: Sequence[Tensor],
    event_dims: int,
    num_summed: int,
) -> tuple[Tensor, Derivatives]:
    """Return the values of a formula, summed, and its partial derivatives in each element, in the tensors' dtype.

    Args:
        kernel: called with the flags and tensors, it returns values and derivatives; elementwise but for the event. It
            may say in `most_elsewhere` how many elements of a tensor it takes at once on an accelerator.
        needs: which derivatives are needed.
        tensors: `[*dims, *event]` each, or broadcasting to it.
        event_dims: the number of event dimensions.
        num_summed: how many of the last dimensions of `[*dims]` the values are summed over.
    """
    dtype, size = tensors[0].dtype, _block_size(kernel, tensors)
    if size is None:
        value, partials = kernel(needs, *tensors)
        value = value if num_summed == 0 else sum_last(value, num_summed)
        return narrowed(value, tensors[0]), [None if d is None else narrowed(d, tensors[0]) for d in partials]
    shape = common_shape(*[t.shape for t in tensors])
    dims = shape[: len(shape) - event_dims]
    size = max(1, size // max(1, shape[len(dims) :].numel()))
    num_kept = len(dims) - num_summed
    cuts_sum = dims[num_kept:].numel() > size
    blocks = _cut([t[(None,) * (len(shape) - t.dim())] if t.dim() < len(shape) else t for t in tensors], dims, size)
    first = next(blocks)
    value, partials = kernel(needs, *first)
    total = value.new_zeros(dims[:num_kept]) if cuts_sum else tensors[0].new_empty(dims[:num_kept])
    whole = total[(..., *(None,) * num_summed)] if num_summed else total
    # A derivative that is the parameter itself needs no copy.
    is_kept = [d is part and d.dtype is dtype for d, part in zip(partials, first, strict=True)]
    results = [
        None if d is None else t if kept else t.new_empty(shape)
        for d, t, kept in zip(partials, tensors, is_kept, strict=True)
    ]
    written = {i: result for i, result in enumerate(results) if result is not None and not is_kept[i]}
    outputs = _cut([whole, *written.values()], dims, size)
    for block, (total_part, *result_parts) in zip(chain([first], blocks), outputs, strict=True):
        if block is not first:
            value, partials = kernel(needs, *block)
        value = value.sum(tuple(range(-num_summed, 0)), keepdim=True) if num_summed else value
        if cuts_sum:
            total_part += value
        else:
            total_part.copy_(value)
        for derivative, result_part in zip([partials[i] for i in written], result_parts, strict=True):
            if derivative is not None:
                result_part.copy_(derivative)
    return narrowed(total, tensors[0]), results


def _block_size(kernel: Callable[..., object], tensors: Sequence[Tensor]) -> int | None:
    """Return how many elements are computed at once; None for all of them."""
    if are_large(tensors):
        return BLOCK * torch.get_num_threads()
    most: int | None = getattr(kernel, "most_elsewhere", None)
    if most is None or all(t.numel() <= most or t.is_cpu for t in tensors):
        return None
    return most


def _cut(tensors: Sequence[Tensor], dims: Sequence[int], size: int) -> Iterator[Sequence[Tensor]]:
    """Yield the tensors' parts, in blocks of at most `size` elements of the leading dimensions if these can be cut.

    A tensor broadcasts to all of `dims`, and is handed on whole along the dimensions in which it has one entry.
    """
    if not dims:
        yield tensors
        return
    yield from _cut_from(0, tensors, dims, size)


def _cut_from(dim: int, tensors: Sequence[Tensor], dims: Sequence[int], size: int) -> Iterator[Sequence[Tensor]]:
    rest = math.prod(dims[dim + 1 :])
    is_last = rest <= size or dim == len(dims) - 1
    step = max(1, size // max(1, rest)) if is_last else 1
    count = -(-dims[dim] // step)
    columns = [t.split(step, dim) if t.shape[dim] > 1 else (t,) * count for t in tensors]
    for parts in zip(*columns, strict=True):
        if is_last:
            yield parts
        else:
            yield from _cut_from(dim + 1, parts, dims, size)
