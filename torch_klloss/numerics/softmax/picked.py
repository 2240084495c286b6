"""Log-weights of a few classes among many, and of all or the others together; nothing of the logits' size is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torch_klloss.numerics.softmax import picked_opaque
from torch_klloss.numerics.softmax.opaque import is_opaque
from torch_klloss.numerics.softmax.pairs import KL
from torch_klloss.numerics.softmax.picking import Picking, dtype_of, evaluate, pull_back
from torch_klloss.numerics.softmax.sides import Reduce, Side
from torch_klloss.numerics.softmax.tiles import Problem
from torch_klloss.numerics.tracing import in_eager_mode, is_traced


def picked_log_weights(
    side: Side,
    ids: Tensor,
    *,
    is_rest: bool,
    temperature: float = 1.0,
    start: int = 0,
    valid: Tensor | None = None,
    keep: Tensor | None = None,
    total: Reduce | None = None,
    largest: Reduce | None = None,
) -> Tensor:
    """Return logits/T of some classes, and the logarithm of the sum of exp(logits/T) over all or the other classes.

    They are taken less the largest, which does not change their differences: `[*tokens, k + 1]`, in float64 on the CPU,
    in at least float32 elsewhere.

    Args:
        side: the logits, `[*tokens, classes]`.
        ids: the classes, `[*tokens, k]`.
        is_rest: whether the last number is of the classes that are not picked.
        temperature: T.
        start: the first class, for logits that are a shard of the vocabulary.
        valid: whether an id is one, `[*tokens, k]`; the others are -inf.
        keep: whether a token counts, `[*tokens]`; the others are 0, and their logits are not looked at.
        total: adds a tensor over the shards.
        largest: takes the maximum over the shards.
    """
    reduces: dict[str, Any] = {} if total is None or largest is None else {"total": total, "largest": largest}
    if reduces and is_traced():
        return in_eager_mode(picked_log_weights)(
            side, ids, is_rest=is_rest, temperature=temperature, start=start, valid=valid, keep=keep, **reduces
        )
    tokens, num_picked, first = ids.shape[:-1], ids.shape[-1], side.tensors[0]
    rows = side.rows
    ids = ids.reshape(-1, num_picked)
    valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid.reshape(-1, num_picked)
    keep = None if keep is None else keep.reshape(-1, 1)
    picking = Picking(Problem(KL, temperature, **reduces), start, is_rest, type(rows), keep=keep)
    if is_traced():
        if is_opaque(rows):
            return picked_opaque.call(picking, rows, ids, valid).reshape(*tokens, num_picked + 1)
        return _plain(rows.whole(), ids, valid, picking).reshape(*tokens, num_picked + 1)
    result: Tensor = _Picked.apply(picking.by_index(first), ids, valid, *rows.tensors)
    return result.reshape(*tokens, num_picked + 1)


class _Picked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, picking: Picking, ids: Tensor, valid: Tensor, *tensors: Tensor) -> Tensor:
        result, rows = evaluate(picking, ids, valid, tensors)
        ctx.save_for_backward(rows, ids, valid, *tensors)
        ctx.picking = picking
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, ids, valid, *tensors = ctx.saved_tensors
        picking, needs = ctx.picking, ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():
            return None, None, None, *_again(picking, ids, valid, tensors, needs, grad)
        return None, None, None, *pull_back(picking, ids, valid, tensors, needs, rows, grad)


def _plain(a: Tensor, ids: Tensor, valid: Tensor, picking: Picking) -> Tensor:
    """Return the picked numbers of logits by operations that torch can differentiate."""
    a = a.to(dtype_of(a))
    if picking.keep is not None:
        a = torch.where(picking.keep, a, 0.0)
    x = (a - a.amax(-1, keepdim=True).detach()) * picking.problem.scale
    local = torch.where(valid, ids - picking.start, 0).clamp(0, x.shape[-1] - 1)
    picked = torch.where(valid, x.gather(-1, local), -torch.inf)
    if picking.is_rest:
        spare = torch.nn.functional.pad(x, (0, 1))
        x = spare.scatter(-1, torch.where(valid, local, x.shape[-1]), -torch.inf)[:, :-1]
    result = torch.cat((picked, x.logsumexp(-1, keepdim=True)), -1)
    return result if picking.keep is None else torch.where(picking.keep, result, 0.0)


def _again(
    picking: Picking, ids: Tensor, valid: Tensor, tensors: list[Tensor], needs: tuple[bool, ...], grad: Tensor
) -> list[Tensor | None]:
    """Return the gradients with a graph of their own."""
    if picking.problem.is_sharded:
        raise NotImplementedError(
            "the gradient of VocabShards cannot be differentiated again, since no process has all logits: compute the "
            "second derivative of whole logits."
        )
    if picking.index is not None:
        keep = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
        keep[picking.index] = True
        picking = replace(picking, keep=keep, index=None)
    side = picking.kind(*tensors)
    logits = side.whole()
    result = _plain(logits, ids, valid, picking)
    (by_logits,) = torch.autograd.grad(result, logits, grad.to(result.dtype), create_graph=True)
    return [g if need else None for g, need in zip(side.pull_back(by_logits), needs, strict=True)]
