"""Blocks of tensors that broadcast: an elementwise formula computed in parts whose intermediates stay in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from torch_klloss.numerics.dimensions import common_shape, sum_last
from torch_klloss.numerics.elementary import narrowed

Derivatives = Sequence["Tensor | None"]
Index = tuple[slice, ...]

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
    num_kept, total, cuts_sum = len(dims) - num_summed, None, False
    results: list[Tensor | None] = [None for _ in tensors]
    for index in _blocks(dims, max(1, size // max(1, shape[len(dims) :].numel()))):
        parts = [_part(t, index, len(shape)) for t in tensors]
        value, partials = kernel(needs, *parts)
        value = sum_last(value, num_summed)
        if total is None:
            cuts_sum = len(index) > num_kept
            total = value.new_zeros(dims[:num_kept]) if cuts_sum else tensors[0].new_empty(dims[:num_kept])
            results = [None if d is None else tensors[0].new_empty(shape) for d in partials]
            for i, (d, part) in enumerate(zip(partials, parts, strict=True)):
                if d is part and part.dtype is dtype:  # the parameter itself needs no copy
                    results[i] = tensors[i]
        if cuts_sum:
            total[index[:num_kept]] += value
        else:
            total[index].copy_(value)
        for result, d, part in zip(results, partials, parts, strict=True):
            if result is not None and d is not None and d is not part:
                result[index].copy_(d)
    return torch.as_tensor(total, dtype=dtype), results


def _block_size(kernel: Callable[..., object], tensors: Sequence[Tensor]) -> int | None:
    """Return how many elements are computed at once; None for all of them."""
    if are_large(tensors):
        return BLOCK * torch.get_num_threads()
    most: int | None = getattr(kernel, "most_elsewhere", None)
    if most is None or all(t.numel() <= most or t.is_cpu for t in tensors):
        return None
    return most


def _part(t: Tensor, index: Index, num_dims: int) -> Tensor:
    """Return what a block of leading dimensions holds of a tensor that broadcasts to `num_dims` dimensions."""
    missing = num_dims - t.dim()
    if missing == 0 and len(index) == 1 and len(t) > 1:
        return t[index[0]]
    return t[tuple(s if t.shape[i] > 1 else slice(None) for i, s in enumerate(index[missing:]))]


def _blocks(dims: Sequence[int], size: int) -> Iterator[Index]:
    """Yield slices that cut a shape into blocks of at most `size` elements, if its dimensions can be cut so small."""
    if not dims:
        yield ()
        return
    rest = 1
    for n in dims[1:]:
        rest *= n
    if rest <= size or len(dims) == 1:
        step = max(1, size // max(1, rest))
        yield from ((slice(start, start + step),) for start in range(0, dims[0], step))
        return
    for i in range(dims[0]):
        yield from ((slice(i, i + 1), *tail) for tail in _blocks(dims[1:], size))
