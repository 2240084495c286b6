"""Logits as a tensor or as a head, taken a few rows at a time, and the gradients that are added up on the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Reduce: TypeAlias = Callable[[Tensor], Tensor]

_PANEL = 2**19  # logits of a head that exist at once on the CPU; elsewhere this part of them:
_PARTS = 16


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
    is_cpu = q.tensors[0].is_cpu
    step = max(1, _PANEL // q.shape[-1] if is_cpu else -(-num_rows // _PARTS))
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

    def add(self, part: Callable[[], Tensor]) -> None:
        """Add to the total."""
        if not self.is_needed:
            return
        if self.total is None:
            wide = torch.promote_types(self.of.dtype, torch.float32)
            self.total = torch.zeros_like(self.of, dtype=wide)
        self.total += part()

    def result(self) -> Tensor | None:
        """Return the gradient in the dtype of the tensor; None where none is needed."""
        if not self.is_needed:
            return None
        if self.total is not None:
            return self.total.to(self.of.dtype)
        return self.rows if self.rows is not None else torch.zeros_like(self.of)


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
    wide = torch.promote_types(grad.dtype, torch.float32)
    sums[1].add(lambda: grad.to(wide).mT @ side.hidden[rows].to(wide))
    if side.bias is not None:
        sums[2].add(lambda: grad.sum(0, dtype=wide))
