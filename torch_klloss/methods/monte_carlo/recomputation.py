"""Chunks of an expectation that the backward pass evaluates once more, behind one node of the graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from torch_klloss.numerics.graph import leaves_of, nodes_of
from torch_klloss.numerics.versions import Versions

ChunkSum = tuple[Tensor, Tensor, int | None]
"""The sum of a chunk's weighted terms, the terms `[n, *batch]` without a gradient, and the number of replicates."""

Chunk = Callable[[int, int], ChunkSum]
_Gradients = Callable[[Tensor], list[Tensor | None]]


class UnknownInputError(Exception):
    """A gradient flows to an earlier result that no operation was given, by way of a custom function."""


class HiddenHookError(UnknownInputError):
    """A custom function was given a leaf with a hook, which checkpoints lose in torch 2.8 and before."""


class RecomputedChunks:
    """Evaluates chunks one by one, with a single node in the graph that evaluates them once more.

    A checkpoint for every chunk would leave small blocks of memory between the large ones, hundreds of megabytes for
    some sixty chunks. While a chunk is evaluated, the tensors that it reads are replaced by aliases, where its gradient
    ends. The gradient of a leaf that only custom functions read, which no mode sees, ends at the leaf itself.
    """

    def __init__(self, chunk: Chunk, bounds: Sequence[tuple[int, int]], device: torch.device) -> None:
        self._chunk, self._bounds = chunk, bounds
        self._inputs: dict[int, Tensor] = {}
        self._hidden: dict[int, Tensor] = {}
        self._read: dict[int, weakref.ref[Tensor]] = {}
        self._versions = Versions(())
        self._autocast = _autocast_settings(device)

    def part(self, start: int, stop: int) -> ChunkSum:
        """Return a chunk without its graph, and remember the tensors that it reads.

        Raises:
            UnknownInputError: if they cannot be determined, or a hook would run for every chunk.
        """
        with _AliasMode({}, older_than=_sequence_number()) as aliased:
            part, terms, replicates = self._chunk(start, stop)
        self._read.update(aliased.read)
        # The hooks of a leaf have to run once in a backward pass, and not for every chunk.
        if any(leaf._backward_hooks for leaf in aliased.hidden_leaves(part)):
            raise HiddenHookError
        reached = aliased.reached(part)
        if reached is None:
            raise UnknownInputError
        self._inputs.update(reached[0])
        self._hidden.update(reached[1])
        return part.detach(), terms, replicates

    def joined(self, total: Tensor) -> Tensor:
        """Return the sum of all parts with its gradient.

        Raises:
            UnknownInputError: if a gradient would pass through an alias on its way to a hidden leaf.
        """
        if self._hidden and any(id(leaf) in self._hidden for leaf in leaves_of(*self._inputs.values())):
            raise UnknownInputError
        self.remember_versions()
        inputs = [*self._inputs.values(), *self._hidden.values()]
        return cast(Tensor, _Recomputation.apply(total, self._gradients, *inputs)) if inputs else total

    def remember_versions(self) -> None:
        """Remember the versions of all tensors that the chunks read and that are still there."""
        tensors = (reference() for reference in self._read.values())
        self._versions = Versions(tensor for tensor in tensors if tensor is not None)

    def checked(self, start: int, stop: int) -> ChunkSum:
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
