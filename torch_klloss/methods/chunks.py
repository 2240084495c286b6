"""An expectation over many draws with the memory of a few: chunk by chunk, recomputed in the backward pass.

    draws = prepare(sampler, q, S, differentiable=True)       # samplers.draws; all randomness is decided here

    def evaluate(start, stop):                                # draws start … stop - 1, as often as it is asked
        points = draws.part(start, stop)
        return points, q.log_prob(points.x) - p.log_prob(points.x)

    result = expectation_in_chunks(evaluate, S, chunk_size)   # .value, .std_error, .dof, .num_points

The points of a draw depend on nothing but its number, so that the chunk size changes no more than the order of a sum.
A mixture is drawn from by `samplers.components.prepare_by_component`, whose parts hold their `points` as well.
What needs a mean over all draws first (the baseline of a score function) takes two passes, the first under `no_grad`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torch_klloss.samplers.points import Points, sum_last
from torch_klloss.tracing import is_traced

Evaluate = Callable[[int, int], tuple[Points, Tensor]]


@dataclass(frozen=True)
class ChunkedExpectation:
    """Hold an expectation with its error.

    Attributes:
        value: Σ wᵢ fᵢ, `[*batch]`.
        std_error: its standard error from the spread of the replicates; None where nothing is random, NaN where a
            single replicate cannot tell.
        dof: degrees of freedom of the error, one fewer than replicates; None where nothing is random.
        num_points: how many points f was evaluated at, per batch element.
    """

    value: Tensor
    std_error: Tensor | None
    dof: int | None
    num_points: int


def expectation_in_chunks(
    evaluate: Evaluate, num_draws: int, chunk_size: int | None, summed: int = 0
) -> ChunkedExpectation:
    """Return Σ wᵢ fᵢ over all draws with its standard error, holding the intermediate results of one chunk at a time.

    The value and its gradients, to whatever `evaluate` reads, are those of a single chunk but for rounding: each chunk
    is evaluated once more when the backward pass comes to it. Under `torch.compile` and `torch.func`, which
    cannot recompute, all draws are one chunk.

    Args:
        evaluate: called with the numbers of the first draw of a chunk and of the one after its last; returns their
            points, which weigh what they do among all draws, and f there, `[n, *batch]`. The same call has
            to return the same numbers each time: whatever is random is drawn before. Before several chunks it is
            called for the first draw alone.
        num_draws: S.
        chunk_size: how many draws are evaluated at once; None for all.
        summed: how many of the last dimensions of the batch are summed, point by point before the error is taken.

    Raises:
        ValueError: if `chunk_size` is not a positive integer or None.

    Example:
        >>> import torch
        >>> from torch_klloss.methods.chunks import expectation_in_chunks
        >>> from torch_klloss.samplers import Points
        >>> x = torch.arange(6.0, requires_grad=True)
        >>> evaluate = lambda start, stop: (Points(x[start:stop], torch.tensor(1 / 6), num_replicates=6), x[start:stop])
        >>> result = expectation_in_chunks(evaluate, 6, chunk_size=4)
        >>> result.value, result.std_error, result.dof
        (tensor(2.5000, grad_fn=<AddBackward0>), tensor(0.7638), 5)
    """
    check_chunk_size(chunk_size)
    step = num_draws if chunk_size is None or is_traced() else min(chunk_size, num_draws)

    def chunk(start: int, stop: int) -> tuple[Tensor, Tensor, int | None]:
        points, f = evaluate(start, stop)
        terms = sum_last(points.weights * f, summed)
        return terms.sum(0), terms.detach(), points.num_replicates

    if step < num_draws:
        evaluate(0, 1)  # what distributions compute on first use they keep: a chunk would, and its repetition would not
    value, spread, num_points = torch.zeros(()), None, 0
    for start in range(0, num_draws, step):
        stop = min(start + step, num_draws)
        part, terms, replicates = chunk(start, stop) if step == num_draws else _recomputed(chunk, start, stop)
        value = part if start == 0 else value + part
        num_points += len(terms)
        if start == 0 and replicates is not None:
            spread = _Spread(replicates, len(terms) * num_draws // stop // replicates)
        if spread is not None:
            spread.add(terms)
    if spread is None:
        return ChunkedExpectation(value, None, None, num_points)
    return ChunkedExpectation(value, spread.std_error(), spread.num_replicates - 1, num_points)


def _recomputed(chunk: Callable[..., tuple[Tensor, Tensor, int | None]], start: int, stop: int) -> Any:
    return checkpoint(chunk, start, stop, use_reentrant=False, preserve_rng_state=False)


def check_chunk_size(chunk_size: int | None) -> None:
    """Raise a ValueError unless `chunk_size` is a positive integer or None."""
    if chunk_size is None:
        return
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive integer, or None for all draws at once, got {chunk_size!r}.")


class _Spread:
    """The spread of replicates that arrive in pieces (Welford, 1962; Chan, Golub and LeVeque, 1983)."""

    def __init__(self, num_replicates: int, points_each: int) -> None:
        self.num_replicates, self._points_each = num_replicates, points_each
        self._count, self._mean, self._squares = 0, torch.zeros(()), torch.zeros(())
        self._started, self._filled = torch.zeros(()), 0  # the replicate that the last piece broke off in

    def add(self, terms: Tensor) -> None:
        """Take the next weighted terms, `[n, *batch]`."""
        head = min(self._points_each - self._filled, len(terms)) if self._filled else 0
        if head:
            self._started, self._filled = self._started.to(terms) + terms[:head].sum(0), self._filled + head
        if self._filled == self._points_each:
            self._merge(self._started.unsqueeze(0))
            self._filled = 0
        whole = (len(terms) - head) // self._points_each * self._points_each
        if whole:
            self._merge(terms[head : head + whole].unflatten(0, (-1, self._points_each)).sum(1))
        if head + whole < len(terms):
            self._started, self._filled = terms[head + whole :].sum(0), len(terms) - head - whole

    def std_error(self) -> Tensor:
        """Return the standard error of the sum of all terms; NaN for a single replicate."""
        if self.num_replicates == 1:
            return torch.full_like(self._mean, torch.nan)
        return (self._squares * self.num_replicates / (self.num_replicates - 1)).sqrt()

    def _merge(self, sums: Tensor) -> None:
        new, total = len(sums), self._count + len(sums)
        mean = sums.mean(0)
        shift = mean - self._mean.to(mean)
        squares = ((sums - mean) ** 2).sum(0) + shift**2 * (self._count * new / total)
        self._mean, self._squares = self._mean.to(mean) + shift * (new / total), self._squares.to(mean) + squares
        self._count = total
