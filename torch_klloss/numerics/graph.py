"""Walks through the autograd graph behind tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor


def nodes_of(*tensors: Tensor, until: Collection[Any] = ()) -> Iterator[Any]:
    """Yield the nodes that the tensors were computed by, each once, without those that only `until` leads to."""
    waiting: list[Any] = [t.grad_fn for t in tensors]
    seen: set[Any] = {None}
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            if node not in until:
                waiting += [parent for parent, _ in node.next_functions]


def leaves_of(*tensors: Tensor) -> Iterator[Tensor]:
    """Yield the leaves that require a gradient and that the tensors are, or were computed from."""
    yield from (t for t in tensors if t.requires_grad and t.grad_fn is None)
    yield from (node.variable for node in nodes_of(*tensors) if hasattr(node, "variable"))
