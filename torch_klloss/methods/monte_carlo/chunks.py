"""An expectation over many draws with the memory of a few: in chunks, recomputed in the backward pass.

    draws = prepare(sampler, q, S, differentiable=True)       # samplers.draws; all randomness is fixed here

    def evaluate(start, stop):                                # draws start … stop - 1, at every call the same
        points = draws.part(start, stop)
        return points, q.log_prob(points.x) - p.log_prob(points.x)

    result = expectation_in_chunks(evaluate, S, chunk_size)   # .value, .std_error, .dof, .skewness, .num_points

The points of a draw depend on its number alone, so that the chunk size changes only the order of a sum.
`samplers.components.prepare_by_component` draws from a mixture; its parts have `points` as well.
The baseline of a score function, a mean over all draws, takes a pass of its own before, under `no_grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torch_klloss.methods.monte_carlo.recomputation import (
    Chunk,
    ChunkSum,
    HiddenHookError,
    RecomputedChunks,
    UnknownInputError,
)
from torch_klloss.methods.monte_carlo.spread import Spread
from torch_klloss.numerics.arguments import check_integer
from torch_klloss.numerics.dimensions import sum_last
from torch_klloss.numerics.tracing import is_traced
from torch_klloss.samplers.points import Points

Evaluate = Callable[[int, int], tuple[Points, Tensor]]


@dataclass(frozen=True)
class Expectation:
    """An expectation with its error.

    Attributes:
        value: Σ wᵢ fᵢ, `[*batch]`.
        std_error: its standard error from the spread of the replicates; None if nothing is random, NaN for a single
            replicate.
        dof: degrees of freedom of the error, one fewer than replicates; None if nothing is random.
        skewness: the skewness of the error, from the replicates; None if nothing is random.
        num_points: the number of points at which f was evaluated, per batch element.
    """

    value: Tensor
    std_error: Tensor | None
    dof: int | None
    skewness: Tensor | None
    num_points: int


def expectation_in_chunks(
    evaluate: Evaluate, num_draws: int, chunk_size: int | None, summed: int = 0, *, with_error: bool = True
) -> Expectation:
    """Return Σ wᵢ fᵢ over all draws with its standard error, with the intermediate results of one chunk at a time.

    The value and its gradients, to whatever `evaluate` reads, agree with a single chunk's up to rounding. The backward
    pass evaluates each chunk once more, and keeps all of them under `create_graph`. Under `torch.compile` and
    `torch.func`, which cannot recompute, all draws are one chunk. On the CPU, half a chunk is evaluated at a time: the
    system's allocator keeps about twice the memory in use.

    Args:
        evaluate: (start, stop) -> the points of draws start … stop - 1, with their weights among all draws, and f
            there, `[n, *batch]`. The same call has to return the same numbers each time: all randomness is drawn
            before. Before several chunks it is called for the first draw alone.
        num_draws: S.
        chunk_size: the largest number of draws that are evaluated at once; None for all.
        summed: how many of the last dimensions of the batch are summed, point by point, before the error is computed.
        with_error: whether the error is computed.

    Raises:
        ValueError: if `chunk_size` is not a positive integer or None.

    Examples:
        >>> import torch
        >>> from torch_klloss.methods.monte_carlo.chunks import expectation_in_chunks
        >>> from torch_klloss.samplers import Points
        >>> x = torch.arange(6.0, requires_grad=True)
        >>> evaluate = lambda start, stop: (Points(x[start:stop], torch.tensor(1 / 6), num_replicates=6), x[start:stop])
        >>> result = expectation_in_chunks(evaluate, 6, chunk_size=4)
        >>> result.value, result.std_error, result.dof
        (tensor(2.5000, grad_fn=<_RecomputationBackward>), tensor(0.7638), 5)
    """
    check_chunk_size(chunk_size)

    def chunk(start: int, stop: int) -> ChunkSum:
        points, f = evaluate(start, stop)
        terms = sum_last(points.weights * f, summed)
        return terms.sum(0), terms.detach(), points.num_replicates

    if chunk_size is None or chunk_size >= num_draws or is_traced():
        return _expectation(chunk, [(0, num_draws)], lambda total: total, with_error)
    device = chunk(0, 1)[0].device  # distributions compute and keep some tensors on first use
    step = _at_once(chunk_size, device)
    bounds = [(start, min(start + step, num_draws)) for start in range(0, num_draws, step)]
    if not torch.is_grad_enabled():
        return _expectation(chunk, bounds, lambda total: total, with_error)
    recomputed = RecomputedChunks(chunk, bounds, device)
    try:
        return _expectation(recomputed.part, bounds, recomputed.joined, with_error)
    except HiddenHookError:
        return _expectation(chunk, bounds, lambda total: total, with_error)
    except UnknownInputError:
        result = _expectation(partial(_checkpointed, recomputed.checked), bounds, lambda total: total, with_error)
        recomputed.remember_versions()
        return result


def _at_once(chunk_size: int, device: torch.device) -> int:
    """Return how many draws are evaluated at once, so that all chunks need the memory of one with `chunk_size` draws.

    glibc before 2.38 cannot put an aligned block where one of its size has been, and its caches of small blocks keep
    the gaps from merging: after some chunks it holds twice the memory in use. Other devices reuse their blocks.
    """
    return -(-chunk_size // 2) if device.type == "cpu" else chunk_size


def _expectation(
    chunk: Chunk, bounds: Sequence[tuple[int, int]], joined: Callable[[Tensor], Tensor], with_error: bool
) -> Expectation:
    """Return the sum over the chunks, joined to the graph by `joined`, with its error if it is asked for."""
    value: Any = None
    replicates, spread, num_points = None, None, 0
    for start, stop in bounds:
        part, terms, replicates = chunk(start, stop)
        value = part if value is None else value + part
        num_points += terms.shape[0]
        if with_error and start == 0 and replicates is not None and replicates > 1:
            spread = Spread(replicates, terms.shape[0] * bounds[-1][1] // stop // replicates)
        if spread is not None:
            spread.add(terms)
        del part, terms  # or their memory stays in use during the next chunk
    value = joined(value)
    if replicates is None or not with_error:
        return Expectation(value, None, None, None, num_points)
    if spread is None:  # a single replicate, which has none
        return Expectation(value, torch.full_like(value, torch.nan), 0, torch.zeros_like(value), num_points)
    return Expectation(value, spread.std_error(), replicates - 1, spread.skewness(), num_points)


def _checkpointed(chunk: Chunk, start: int, stop: int) -> Any:
    return checkpoint(chunk, start, stop, use_reentrant=False, preserve_rng_state=False)


def check_chunk_size(chunk_size: int | None) -> None:
    """Raise a ValueError unless `chunk_size` is a positive integer or None."""
    if chunk_size is not None:
        check_integer("chunk_size (None for all draws at once)", chunk_size)
