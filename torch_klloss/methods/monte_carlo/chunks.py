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

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from torch_klloss.numerics.arguments import check_integer
from torch_klloss.numerics.dimensions import sum_last
from torch_klloss.numerics.graph import leaves_of, nodes_of
from torch_klloss.numerics.tracing import is_traced
from torch_klloss.numerics.versions import Versions
from torch_klloss.samplers.points import Points, skewness_of_mean

Evaluate = Callable[[int, int], tuple[Points, Tensor]]
_ChunkSum = tuple[Tensor, Tensor, int | None]
_Chunk = Callable[[int, int], _ChunkSum]
_Gradients = Callable[[Tensor], list[Tensor | None]]


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

    def chunk(start: int, stop: int) -> _ChunkSum:
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
    recomputed = _RecomputedChunks(chunk, bounds, device)
    try:
        return _expectation(recomputed.part, bounds, recomputed.joined, with_error)
    except _HiddenHookError:
        return _expectation(chunk, bounds, lambda total: total, with_error)
    except _UnknownInputError:
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
    chunk: _Chunk, bounds: Sequence[tuple[int, int]], joined: Callable[[Tensor], Tensor], with_error: bool
) -> Expectation:
    """Return the sum over the chunks, joined to the graph by `joined`, with its error if it is asked for."""
    value: Any = None
    replicates, spread, num_points = None, None, 0
    for start, stop in bounds:
        part, terms, replicates = chunk(start, stop)
        value = part if value is None else value + part
        num_points += terms.shape[0]
        if with_error and start == 0 and replicates is not None and replicates > 1:
            spread = _Spread(replicates, terms.shape[0] * bounds[-1][1] // stop // replicates)
        if spread is not None:
            spread.add(terms)
        del part, terms  # or their memory stays in use during the next chunk
    value = joined(value)
    if replicates is None or not with_error:
        return Expectation(value, None, None, None, num_points)
    if spread is None:  # a single replicate, which has none
        return Expectation(value, torch.full_like(value, torch.nan), 0, torch.zeros_like(value), num_points)
    return Expectation(value, spread.std_error(), replicates - 1, spread.skewness(), num_points)


def _checkpointed(chunk: _Chunk, start: int, stop: int) -> Any:
    return checkpoint(chunk, start, stop, use_reentrant=False, preserve_rng_state=False)


class _UnknownInputError(Exception):
    """A gradient flows to an earlier result that no operation was given, by way of a custom function."""


class _HiddenHookError(_UnknownInputError):
    """A custom function was given a leaf with a hook, which checkpoints lose in torch 2.8 and before."""


class _RecomputedChunks:
    """Evaluates chunks one by one, with a single node in the graph that evaluates them once more.

    A checkpoint for every chunk would leave small blocks of memory between the large ones, hundreds of megabytes for
    some sixty chunks. While a chunk is evaluated, the tensors that it reads are replaced by aliases, where its gradient
    ends. The gradient of a leaf that only custom functions read, which no mode sees, ends at the leaf itself.
    """

    def __init__(self, chunk: _Chunk, bounds: Sequence[tuple[int, int]], device: torch.device) -> None:
        self._chunk, self._bounds = chunk, bounds
        self._inputs: dict[int, Tensor] = {}
        self._hidden: dict[int, Tensor] = {}
        self._read: dict[int, weakref.ref[Tensor]] = {}
        self._versions = Versions(())
        self._autocast = _autocast_settings(device)

    def part(self, start: int, stop: int) -> _ChunkSum:
        """Return a chunk without its graph, and remember the tensors that it reads.

        Raises:
            _UnknownInputError: if they cannot be determined, or a hook would run for every chunk.
        """
        with _AliasMode({}, older_than=_sequence_number()) as aliased:
            part, terms, replicates = self._chunk(start, stop)
        self._read.update(aliased.read)
        # The hooks of a leaf have to run once in a backward pass, and not for every chunk.
        if any(leaf._backward_hooks for leaf in aliased.hidden_leaves(part)):
            raise _HiddenHookError
        reached = aliased.reached(part)
        if reached is None:
            raise _UnknownInputError
        self._inputs.update(reached[0])
        self._hidden.update(reached[1])
        return part.detach(), terms, replicates

    def joined(self, total: Tensor) -> Tensor:
        """Return the sum of all parts with its gradient.

        Raises:
            _UnknownInputError: if a gradient would pass through an alias on its way to a hidden leaf.
        """
        if self._hidden and any(id(leaf) in self._hidden for leaf in leaves_of(*self._inputs.values())):
            raise _UnknownInputError
        self.remember_versions()
        inputs = [*self._inputs.values(), *self._hidden.values()]
        return cast(Tensor, _Recomputation.apply(total, self._gradients, *inputs)) if inputs else total

    def remember_versions(self) -> None:
        """Remember the versions of all tensors that the chunks read and that are still there."""
        tensors = (reference() for reference in self._read.values())
        self._versions = Versions(tensor for tensor in tensors if tensor is not None)

    def checked(self, start: int, stop: int) -> _ChunkSum:
        """Return a chunk, unless what it reads was changed in place after `remember_versions`."""
        self._versions.check()
        return self._chunk(start, stop)

    def _gradients(self, upstream: Tensor) -> list[Tensor | None]:
        """Return the gradients to all inputs, with a graph if they are to be differentiated again."""
        self._versions.check()
        totals: list[Tensor | None] = [None] * (len(self._inputs) + len(self._hidden))
        for start, stop in self._bounds:
            new = self._gradients_of(start, stop, upstream)
            totals = [b if a is None else a if b is None else a + b for a, b in zip(totals, new, strict=True)]
        self.remember_versions()  # a network may count its calls in place
        return totals

    def _gradients_of(self, start: int, stop: int, upstream: Tensor) -> Sequence[Tensor | None]:
        twice = torch.is_grad_enabled()
        with ExitStack() as stack:
            for settings in self._autocast:
                stack.enter_context(torch.autocast(**settings))
            stack.enter_context(torch.enable_grad())
            aliased = stack.enter_context(_AliasMode(self._inputs))
            part = self._chunk(start, stop)[0]
        reached = aliased.reached(part)
        if reached is None or not reached[1].keys() <= self._hidden.keys():
            raise RuntimeError(
                "the backward pass evaluates every chunk again and must read the same tensors as the forward pass; it "
                "read others. Use chunk_size=None, or parameters that stay the same."
            )
        ends = [*aliased.aliases.values(), *self._hidden.values()]
        if not part.requires_grad:
            return [None] * len(ends)
        return torch.autograd.grad(part, ends, upstream, create_graph=twice, allow_unused=True)


def _autocast_settings(device: torch.device) -> list[dict[str, Any]]:
    """Return the arguments of the active `torch.autocast`, which will have ended by the backward pass."""
    return [
        {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        for kind in sorted({"cpu", device.type})
        if torch.amp.is_autocast_available(kind)
    ]


class _Recomputation(torch.autograd.Function):
    """The identity, with gradients that a function returns."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: _Gradients, *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        ctx.save_for_backward(*inputs)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # raises if they were changed, or the graph freed
        return None, None, *ctx.gradients(upstream)


class _AliasMode(TorchFunctionMode):
    """Replaces tensors that require a gradient by aliases in the arguments of operations.

    Args:
        inputs: the tensors that are replaced, by id.
        older_than: also replaced are all leaves, and the results of nodes with a lower sequence number.
    """

    def __init__(self, inputs: Mapping[int, Tensor], older_than: int = 0) -> None:
        super().__init__()
        self._inputs, self._older_than = dict(inputs), older_than
        self.read: dict[int, weakref.ref[Tensor]] = {}
        with torch.enable_grad():
            self.aliases = {key: tensor.view_as(tensor) for key, tensor in inputs.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, self._alias, (args, kwargs or {}))
        return func(*args, **kwargs)

    def reached(self, part: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor]] | None:
        """Return the inputs, by way of aliases, and the leaves of custom functions that a gradient of `part` reaches.

        None if it reaches anything else.
        """
        ends = {alias.grad_fn: key for key, alias in self.aliases.items()}
        found: dict[int, Tensor] = {}
        hidden: dict[int, Tensor] = {}
        for node in nodes_of(part, until=ends):
            if node in ends:
                found[ends[node]] = self._inputs[ends[node]]
            elif not hasattr(node, "variable"):  # leaves are handled with the nodes that read them
                leaves = _leaves_given_to(node)
                if node._sequence_nr() < self._older_than or (leaves and not isinstance(node, BackwardCFunction)):
                    return None
                hidden.update({id(leaf): leaf for leaf in leaves})
        return found, hidden

    def hidden_leaves(self, part: Tensor) -> Iterator[Tensor]:
        """Yield the leaves that custom functions were given on the way to `part`."""
        for node in nodes_of(part, until={alias.grad_fn for alias in self.aliases.values()}):
            if isinstance(node, BackwardCFunction) and node._sequence_nr() >= self._older_than:
                yield from _leaves_given_to(node)

    def _alias(self, tensor: Tensor) -> Tensor:
        key = id(tensor)
        self.read[key] = weakref.ref(tensor)
        if key not in self.aliases and tensor.requires_grad and self._is_older(tensor):
            with torch.enable_grad():
                self._inputs[key], self.aliases[key] = tensor, tensor.view_as(tensor)
        return self.aliases.get(key, tensor)

    def _is_older(self, tensor: Tensor) -> bool:
        if self._older_than == 0:
            return False
        return tensor.grad_fn is None or tensor.grad_fn._sequence_nr() < self._older_than


def _leaves_given_to(node: Any) -> list[Tensor]:
    return [parent.variable for parent, _ in node.next_functions if hasattr(parent, "variable")]


def _sequence_number() -> int:
    """Return the sequence number of a new node: older nodes of this thread have lower ones."""
    node = torch.zeros((), requires_grad=True).clone().grad_fn
    assert node is not None
    return node._sequence_nr()


def check_chunk_size(chunk_size: int | None) -> None:
    """Raise a ValueError unless `chunk_size` is a positive integer or None."""
    if chunk_size is not None:
        check_integer("chunk_size (None for all draws at once)", chunk_size)


class _Spread:
    """Spread and skewness of two or more replicates, in pieces (Chan, Golub and LeVeque, 1983; Pébay, 2008)."""

    _mean: Tensor
    _squares: Tensor
    _cubes: Tensor
    _started: Tensor  # the sum of the first `_filled` terms of a replicate that the last piece ended in

    def __init__(self, num_replicates: int, points_each: int) -> None:
        self._num_replicates, self._points_each = num_replicates, points_each
        self._count = self._filled = 0

    def add(self, terms: Tensor) -> None:
        """Add the next weighted terms, `[n, *batch]`."""
        num_terms = terms.shape[0]
        head = min(self._points_each - self._filled, num_terms) if self._filled else 0
        if head:
            self._started, self._filled = self._started + terms[:head].sum(0), self._filled + head
        if self._filled == self._points_each:
            self._merge(self._started.unsqueeze(0))
            self._filled = 0
        whole = (num_terms - head) // self._points_each * self._points_each
        if whole:
            self._merge(terms[head : head + whole].unflatten(0, (-1, self._points_each)).sum(1))
        if head + whole < num_terms:
            self._started, self._filled = terms[head + whole :].sum(0), num_terms - head - whole

    def std_error(self) -> Tensor:
        """Return the standard error of the sum of all terms."""
        return (self._squares * self._num_replicates / (self._num_replicates - 1)).sqrt()

    def skewness(self) -> Tensor:
        """Return the skewness of that error; 0 for two replicates, which do not determine it."""
        if self._num_replicates < 3:
            return torch.zeros_like(self._mean)
        return skewness_of_mean(self._squares, self._cubes)

    def _merge(self, sums: Tensor) -> None:
        old, new, total = self._count, sums.shape[0], self._count + sums.shape[0]
        mean = sums.mean(0)
        centred = sums - mean
        powers = centred**2
        squares, cubes = powers.sum(0), (powers * centred).sum(0)
        if old:
            shift = mean - self._mean
            cubes = cubes + self._cubes + shift**3 * (old * new * (old - new) / total**2)
            cubes = cubes + 3 * shift * (old * squares - new * self._squares) / total
            squares = squares + self._squares + shift**2 * (old * new / total)
            mean = self._mean + shift * (new / total)
        self._mean, self._squares, self._cubes, self._count = mean, squares, cubes, total
