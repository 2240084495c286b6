"""Logits as a tensor or as a head, taken a few rows at a time, and the gradients that are added up on the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Reduce: TypeAlias = Callable[[Tensor], Tensor]

_PANEL = 2**19  # logits of a head that exist at once on the CPU, at least; there and elsewhere these parts of them:
_PARTS = 4, 16


@dataclass(frozen=True)
class Dense:
    """Logits `[*tokens, classes]`."""

    logits: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that gradients go to."""
        return (self.logits,)

    @property
    def rows(self) -> Dense:
        """The same with one dimension of tokens."""
        return Dense(self.logits.reshape(-1, self.logits.shape[-1]))

    @property
    def shape(self) -> torch.Size:
        """The shape of the logits."""
        return self.logits.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the logits."""
        return self.logits.dtype

    def cut(self, num_classes: int) -> Dense:
        """Return the first classes alone."""
        return self if num_classes == self.shape[-1] else Dense(self.logits[..., :num_classes])

    def whole(self) -> Tensor:
        """Return all logits."""
        return self.logits

    def panel(self, rows: Tensor | slice) -> Tensor:
        """Return the logits of some rows."""
        return self.logits[rows]

    def pull_back(self, grad: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of the tensors, given that of all logits."""
        return (grad,)


@dataclass(frozen=True)
class Head:
    """The logits hidden · weightᵀ + bias of hidden states `[*tokens, hidden]` and a weight `[classes, hidden]`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that gradients go to."""
        return (self.hidden, self.weight) if self.bias is None else (self.hidden, self.weight, self.bias)

    @property
    def rows(self) -> Head:
        """The same with one dimension of tokens."""
        return Head(self.hidden.reshape(-1, self.hidden.shape[-1]), self.weight, self.bias)

    @property
    def shape(self) -> torch.Size:
        """The shape of the logits."""
        return self.hidden.shape[:-1] + self.weight.shape[:1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the logits."""
        return self.hidden.dtype

    def cut(self, num_classes: int) -> Head:
        """Return the first classes alone."""
        bias = None if self.bias is None else self.bias[:num_classes]
        return Head(self.hidden, self.weight[:num_classes], bias)

    def whole(self) -> Tensor:
        """Return all logits."""
        return torch.nn.functional.linear(self.hidden, self.weight, self.bias)

    def panel(self, rows: Tensor | slice) -> Tensor:
        """Return the logits of some rows."""
        return torch.nn.functional.linear(self.hidden[rows], self.weight, self.bias)

    def pull_back(self, grad: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of the tensors, given that of all logits."""
        found = grad @ self.weight, grad.mT @ self.hidden
        return found if self.bias is None else (*found, grad.sum(0))


Side: TypeAlias = Dense | Head


def panels(q: Side, p: Side, index: Tensor | None) -> Iterator[tuple[slice, slice | Tensor | None]]:
    """Yield the places of the rows that are computed together, and the rows; None for all of them at once."""
    num_rows = q.shape[0] if index is None else len(index)
    if isinstance(q, Dense) and isinstance(p, Dense):
        if num_rows:
            yield slice(0, num_rows), index
        return
    are_heads, is_cpu = isinstance(q, Head) and isinstance(p, Head), q.tensors[0].is_cpu
    step = -(-num_rows // _PARTS[are_heads or not is_cpu])
    step = max(step, _PANEL // q.shape[-1], 1) if is_cpu else max(step, 1)
    for start in range(0, num_rows, step):
        place = slice(start, min(start + step, num_rows))
        yield place, place if index is None else index[place]


class Gradient:
    """The gradient of one tensor while it is added up: in at least float32 where many rows add to the same numbers."""

    def __init__(self, of: Tensor, is_needed: bool, *, is_partial: bool) -> None:
        self.of, self.is_needed = of, is_needed
        self.rows: Tensor | None = None
        self.total: Tensor | None = None
        self.is_partial = is_partial

    def of_rows(self) -> Tensor | None:
        """Return a tensor of the same shape to write into, with zeros in rows that are not computed."""
        if self.is_needed and self.rows is None:
            self.rows = (torch.zeros_like if self.is_partial else torch.empty_like)(self.of)
        return self.rows

    def of_all(self) -> Tensor | None:
        """Return a tensor to add to."""
        if self.is_needed and self.total is None:
            wide = torch.promote_types(self.of.dtype, torch.float32)
            self.total = torch.zeros_like(self.of, dtype=wide)
        return self.total

    def result(self, factor: float = 1.0) -> Tensor | None:
        """Return the gradient times a factor in the dtype of the tensor; None where none is needed."""
        if not self.is_needed:
            return None
        found = self.total if self.total is not None else self.rows
        if found is None:
            return torch.zeros_like(self.of)
        return (found if factor == 1 else found.mul_(factor)).to(self.of.dtype)


def add_to_tensors(side: Side, sums: list[Gradient], rows: slice | Tensor, grad: Tensor) -> None:
    """Add the gradient of some logits to the gradients of the tensors that they are made of."""
    if isinstance(side, Dense):
        whole = sums[0].of_rows()
        if whole is not None:
            whole[rows] = grad
        return
    hidden = sums[0].of_rows()
    if hidden is not None:
        hidden[rows] = grad @ side.weight
    weight, bias = sums[1].of_all(), sums[2].of_all() if side.bias is not None else None
    if weight is not None:
        weight.addmm_(grad.to(weight.dtype).mT, side.hidden[rows].to(weight.dtype))
    if bias is not None:
        bias += grad.sum(0, dtype=bias.dtype)
