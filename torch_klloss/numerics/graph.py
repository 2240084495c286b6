"""Walks through the autograd graph behind tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

Edge = tuple[Any, int]  # a node, and which of its results


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


def edge_of(t: Tensor) -> Edge:
    """Return the edge by which a gradient reaches t, which requires one."""
    if t.grad_fn is not None:
        return t.grad_fn, t.output_nr
    with torch.enable_grad():
        node = t.view_as(t).grad_fn
    assert node is not None
    return node.next_functions[0]


def edges_below(edge: Edge, until: Collection[Edge] = ()) -> set[Edge]:
    """Return the edges that a gradient passes after this one, without those that only `until` leads to."""
    waiting, seen = list(edge[0].next_functions), set[Edge]()
    while waiting:
        edge = waiting.pop()
        if edge[0] is not None and edge not in seen:
            seen.add(edge)
            if edge not in until:
                waiting += edge[0].next_functions
    return seen


def with_gradient_if(condition: Tensor, t: Tensor) -> Tensor:
    """Return t, with zero in place of its gradient, NaN included, where a condition on its device does not hold."""
    return torch.where(condition, t, t.detach())
