"""Log-weights of classes of many logits as one operation of torch's own, which `torch.compile` calls as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_klloss.numerics.softmax.pairs import KL
from torch_klloss.numerics.softmax.picking import Picking, dtype_of, evaluate, pull_back
from torch_klloss.numerics.softmax.sides import Dense, Head, Side
from torch_klloss.numerics.softmax.tiles import Problem


def call(picking: Picking, side: Side, ids: Tensor, valid: Tensor) -> Tensor:
    """Return the log-weights of one side, `[rows, k + 1]`."""
    settings = isinstance(side, Head), picking.is_rest, picking.problem.temperature, picking.start
    value: Tensor = _forward([*side.tensors], ids, valid, picking.keep, *settings)[0]
    return value


def _picking(
    tensors: Sequence[Tensor], keep: Tensor | None, is_head: bool, is_rest: bool, temperature: float, start: int
) -> Picking:
    picking = Picking(Problem(KL, temperature), start, is_rest, Head if is_head else Dense, keep=keep)
    return picking.by_index(tensors[0])


@torch.library.custom_op("torch_klloss::picked", mutates_args=())
def _forward(
    tensors: Sequence[Tensor], ids: Tensor, valid: Tensor, keep: Tensor | None, is_head: bool, is_rest: bool,
    temperature: float, start: int,
) -> list[Tensor]:  # fmt: skip
    """Return the log-weights, and the numbers of every row, zeros for one that is left out."""
    picking = _picking(tensors, keep, is_head, is_rest, temperature, start)
    with torch.no_grad():
        result, rows = evaluate(picking, ids, valid, tensors)
    if picking.index is None:
        return [result, rows]
    return [result, rows.new_zeros(2, len(ids), 1).index_copy_(1, picking.index, rows)]


@_forward.register_fake
def _(
    tensors: Sequence[Tensor], ids: Tensor, valid: Tensor, keep: Tensor | None, is_head: bool, is_rest: bool,
    temperature: float, start: int,
) -> list[Tensor]:  # fmt: skip
    dtype = torch.float64 if tensors[0].device.type == "cpu" else dtype_of(tensors[0])
    return [
        tensors[0].new_empty(ids.shape[0], ids.shape[1] + 1, dtype=dtype),
        tensors[0].new_empty(2, ids.shape[0], 1, dtype=dtype),
    ]


@torch.library.custom_op("torch_klloss::picked_backward", mutates_args=())
def _pull_back(
    grad: Tensor, rows: Tensor, needs: Sequence[bool], tensors: Sequence[Tensor], ids: Tensor, valid: Tensor,
    keep: Tensor | None, is_head: bool, is_rest: bool, temperature: float, start: int,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of the tensors that need one."""
    picking = _picking(tensors, keep, is_head, is_rest, temperature, start)
    some = rows if picking.index is None else rows[:, picking.index]
    with torch.no_grad():
        found = pull_back(picking, ids, valid, tensors, needs, some, grad)
    return [g for g in found if g is not None]


@_pull_back.register_fake
def _(
    grad: Tensor, rows: Tensor, needs: Sequence[bool], tensors: Sequence[Tensor], ids: Tensor, valid: Tensor,
    keep: Tensor | None, is_head: bool, is_rest: bool, temperature: float, start: int,
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(t) for t, need in zip(tensors, needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    tensors, ids, valid, keep, *ctx.settings = inputs
    ctx.needs, ctx.has_keep = [t.requires_grad for t in tensors], keep is not None
    ctx.save_for_backward(output[1], ids, valid, *tensors, *([keep] if ctx.has_keep else []))


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    rows, ids, valid, *tensors = ctx.saved_tensors
    keep = tensors.pop() if ctx.has_keep else None
    found = iter(_pull_back(grads[0], rows, ctx.needs, tensors, ids, valid, keep, *ctx.settings))
    return [next(found) if need else None for need in ctx.needs], *(None,) * 7


_forward.register_autograd(_backward, setup_context=_setup_context)
