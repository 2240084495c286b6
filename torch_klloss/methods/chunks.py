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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from torch_klloss.samplers.points import Points, sum_last
from torch_klloss.tracing import is_traced

Evaluate = Callable[[int, int], tuple[Points, Tensor]]
_Part = tuple[Tensor, Tensor, int | None]
_Chunk = Callable[[int, int], _Part]
_Gradients = Callable[[Tensor], list[Tensor | None]]


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
    is evaluated once more when the backward pass comes to it, and all of them are held then under `create_graph`. Under
    `torch.compile` and `torch.func`, which cannot recompute, all draws are one chunk.

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
        (tensor(2.5000, grad_fn=<_RecomputationBackward>), tensor(0.7638), 5)
    """
    check_chunk_size(chunk_size)
    step = num_draws if chunk_size is None or is_traced() else min(chunk_size, num_draws)
    bounds = [(start, min(start + step, num_draws)) for start in range(0, num_draws, step)]

    def chunk(start: int, stop: int) -> _Part:
        points, f = evaluate(start, stop)
        terms = sum_last(points.weights * f, summed)
        return terms.sum(0), terms.detach(), points.num_replicates

    if len(bounds) == 1:
        return _expectation(chunk, bounds, lambda total: total)
    chunk(0, 1)  # what distributions compute on first use they keep: a chunk would, and its repetition would not
    if not torch.is_grad_enabled():
        return _expectation(chunk, bounds, lambda total: total)
    try:
        recomputed = _Recomputed(chunk, bounds)
        return _expectation(recomputed.part, bounds, recomputed.joined)
    except _UnknownInputError:
        return _expectation(partial(_checkpointed, chunk), bounds, lambda total: total)


def _expectation(
    chunk: _Chunk, bounds: Sequence[tuple[int, int]], joined: Callable[[Tensor], Tensor]
) -> ChunkedExpectation:
    """Add up the parts, and join the sum to the graph."""
    value, spread, num_points = torch.zeros(()), None, 0
    for start, stop in bounds:
        part, terms, replicates = chunk(start, stop)
        value = part if start == 0 else value + part
        num_points += len(terms)
        if start == 0 and replicates is not None:
            spread = _Spread(replicates, len(terms) * bounds[-1][1] // stop // replicates)
        if spread is not None:
            spread.add(terms)
    value = joined(value)
    if spread is None:
        return ChunkedExpectation(value, None, None, num_points)
    return ChunkedExpectation(value, spread.std_error(), spread.num_replicates - 1, num_points)


def _checkpointed(chunk: _Chunk, start: int, stop: int) -> Any:
    return checkpoint(chunk, start, stop, use_reentrant=False, preserve_rng_state=False)


class _UnknownInputError(Exception):
    """A gradient flows past the tensors that operations were given: to one hidden in a custom function, say."""


class _Recomputed:
    """Evaluate chunks one by one, and leave a single node in the graph, which evaluates them once more.

    A checkpoint for every chunk would leave small blocks of memory behind between the large ones, hundreds of megabytes
    for some sixty chunks. While a chunk is evaluated, what it reads is replaced by aliases, where its gradient ends.
    """

    def __init__(self, chunk: _Chunk, bounds: Sequence[tuple[int, int]]) -> None:
        if torch._C._is_any_autocast_enabled():  # it will have ended by the backward pass
            raise _UnknownInputError
        self._chunk, self._bounds = chunk, bounds
        self._inputs: dict[int, Tensor] = {}

    def part(self, start: int, stop: int) -> _Part:
        """Return a chunk without its graph, having seen what it reads.

        Raises:
            _UnknownInputError: if that cannot be told.
        """
        with _Aliased({}, older_than=_sequence_number()) as aliased:
            part, terms, replicates = self._chunk(start, stop)
        reached = aliased.reached(part)
        if reached is None:
            raise _UnknownInputError
        self._inputs.update(reached)
        return part.detach(), terms, replicates

    def joined(self, total: Tensor) -> Tensor:
        """Return the sum of all parts with its gradient."""
        if not self._inputs:
            return total
        return cast(Tensor, _Recomputation.apply(total, self._gradients, *self._inputs.values()))

    def _gradients(self, upstream: Tensor) -> list[Tensor | None]:
        """Return the gradients to all inputs, with a graph of their own if they are to be differentiated again."""
        totals: list[Tensor | None] = [None] * len(self._inputs)
        for start, stop in self._bounds:
            new = self._gradients_of(start, stop, upstream)
            totals = [b if a is None else a if b is None else a + b for a, b in zip(totals, new, strict=True)]
        return totals

    def _gradients_of(self, start: int, stop: int, upstream: Tensor) -> Sequence[Tensor | None]:
        twice = torch.is_grad_enabled()
        with torch.enable_grad(), _Aliased(self._inputs) as aliased:
            part = self._chunk(start, stop)[0]
        if aliased.reached(part) is None:
            raise RuntimeError(
                "the backward pass evaluates every chunk again, and expected it to read the tensors that it read in "
                "the forward pass; it read others. Use chunk_size=None, or parameters that stay the same."
            )
        if not part.requires_grad:
            return [None] * len(self._inputs)
        aliases = list(aliased.aliases.values())
        return torch.autograd.grad(part, aliases, upstream, create_graph=twice, allow_unused=True)


class _Recomputation(torch.autograd.Function):
    """Give a number the gradients that a function returns."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: _Gradients, *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        ctx.save_for_backward(*inputs)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # raises where they have been changed, or the graph has been freed
        return None, None, *ctx.gradients(upstream)


class _Aliased(TorchFunctionMode):
    """Replaces tensors that require a gradient by aliases, in whatever operations are given.

    Args:
        inputs: what is replaced, by id.
        older_than: also replaced are all leaves, and the results of nodes with a lower sequence number.
    """

    def __init__(self, inputs: Mapping[int, Tensor], older_than: int = 0) -> None:
        super().__init__()
        self._inputs, self._older_than = dict(inputs), older_than
        with torch.enable_grad():
            self.aliases = {key: tensor.view_as(tensor) for key, tensor in inputs.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, self._alias, (args, kwargs or {}))
        return func(*args, **kwargs)

    def reached(self, part: Tensor) -> dict[int, Tensor] | None:
        """Return the inputs that a gradient of `part` reaches through their aliases; None if it reaches others."""
        ends = {alias.grad_fn: key for key, alias in self.aliases.items()}
        found: dict[int, Tensor] = {}
        seen, todo = {part.grad_fn}, [part.grad_fn]
        while todo:
            node = todo.pop()
            if node in ends and node is not None:
                found[ends[node]] = self._inputs[ends[node]]
            elif hasattr(node, "variable"):
                return None
            elif node is not None:
                new = {parent for parent, _ in node.next_functions} - seen
                seen |= new
                todo += new
        return found

    def _alias(self, tensor: Tensor) -> Tensor:
        key = id(tensor)
        if key not in self.aliases and tensor.requires_grad and self._is_older(tensor):
            with torch.enable_grad():
                self._inputs[key], self.aliases[key] = tensor, tensor.view_as(tensor)
        return self.aliases.get(key, tensor)

    def _is_older(self, tensor: Tensor) -> bool:
        if self._older_than == 0:
            return False
        return tensor.grad_fn is None or tensor.grad_fn._sequence_nr() < self._older_than


def _sequence_number() -> int:
    """Return the sequence number of a node made now: those of older nodes of this thread are lower."""
    node = torch.zeros((), requires_grad=True).clone().grad_fn
    assert node is not None
    return node._sequence_nr()


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
