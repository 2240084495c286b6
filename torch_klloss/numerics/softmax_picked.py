"""Log-weights of a few classes among many, and of all or the others together; nothing of the logits' size is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch_klloss.numerics.logit_sides import Dense, Gradient, Reduce, Side, add_to_tensors, panels
from torch_klloss.numerics.softmax_pairs import KL
from torch_klloss.numerics.softmax_tiles import Problem, Tile, tiles_of, tops_of
from torch_klloss.numerics.tracing import in_eager_mode, is_traced

_TILE = 2**15  # numbers of a tile on the CPU; elsewhere this part of the logits:
_SHARE = 2**6


@dataclass(frozen=True)
class Picking:
    """What is picked of the classes.

    Attributes:
        problem: the temperature, and the sums over shards.
        start: the first class of this shard.
        is_rest: whether the last number is of the classes that are not picked, instead of all.
        kind: the class of the side.
        index: on the CPU the rows that count; None for all.
        keep: elsewhere whether a row counts, `[rows, 1]`.
    """

    problem: Problem
    start: int
    is_rest: bool
    kind: type
    index: Tensor | None = None
    keep: Tensor | None = None


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
    picking = Picking(Problem(KL, temperature, **reduces), start, is_rest, type(rows))
    if keep is not None and first.is_cpu and not is_traced():
        picking = replace(picking, index=keep.reshape(-1).nonzero().squeeze(-1))
    elif keep is not None:
        picking = replace(picking, keep=keep.reshape(-1, 1))
    if is_traced():
        return _plain(rows.whole(), ids, valid, picking).reshape(*tokens, num_picked + 1)
    result: Tensor = _Picked.apply(picking, ids, valid, *rows.tensors)
    return result.reshape(*tokens, num_picked + 1)


def _wide(a: Tensor) -> torch.dtype:
    return torch.float64 if a.is_cpu else torch.promote_types(a.dtype, torch.float32)


class _Picked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, picking: Picking, ids: Tensor, valid: Tensor, *tensors: Tensor) -> Tensor:
        side = picking.kind(*tensors)
        result = torch.zeros(len(ids), ids.shape[-1] + 1, dtype=_wide(tensors[0]), device=ids.device)
        rows = []
        for chosen, a, index, _ in _parts(side, picking):
            found, top, rest = _pick(a, index, ids[chosen], valid[chosen], picking)
            result[chosen] = found
            rows.append(torch.stack((top, rest)))
        if picking.keep is not None:
            result = torch.where(picking.keep, result, 0.0)
        ctx.save_for_backward(torch.cat(rows, 1) if rows else result, ids, valid, *tensors)
        ctx.picking = picking
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, ids, valid, *tensors = ctx.saved_tensors
        picking, needs = ctx.picking, ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():
            return None, None, None, *_again(picking, ids, valid, tensors, needs, grad)
        side = picking.kind(*tensors)
        sums = [Gradient(t, need, is_partial=picking.index is not None) for t, need in zip(tensors, needs, strict=True)]
        first = 0
        for chosen, a, index, head_rows in _parts(side, picking):
            out = sums[0].of_rows() if head_rows is None else torch.empty_like(a)
            assert out is not None
            g = grad[chosen] if picking.keep is None else torch.where(picking.keep[chosen], grad[chosen], 0.0)
            some = rows[:, first : first + len(g)]
            first += len(g)
            _spread(a, index, ids[chosen], valid[chosen], some, g, picking, out)
            if picking.keep is not None:
                out.masked_fill_(~picking.keep[chosen], 0.0)
            if head_rows is not None:
                add_to_tensors(side, sums, head_rows, out)
        return None, None, None, *(s.result() for s in sums)


def _parts(
    side: Side, picking: Picking
) -> Iterator[tuple[slice | Tensor, Tensor, Tensor | None, slice | Tensor | None]]:
    """Yield the rows among all, their logits with the rows in these, and for a head the rows again."""
    for place, rows in panels(side, side, picking.index):
        chosen = place if picking.index is None else picking.index[place]
        if isinstance(side, Dense):
            yield chosen, side.logits, picking.index, None
        else:
            yield chosen, side.panel(chosen), None, rows


def _size(a: Tensor) -> int:
    return _TILE if a.is_cpu else max(_TILE, a.numel() // _SHARE)


def _pick(
    a: Tensor, index: Tensor | None, ids: Tensor, valid: Tensor, picking: Picking
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the picked numbers of the rows at the index, their largest logits and their sums of exponentials."""
    problem, dtype = picking.problem, _wide(a)
    top = tops_of(a, index, problem, dtype)
    total = torch.zeros_like(top)
    picked = torch.zeros(ids.shape, dtype=dtype, device=a.device)
    for tile in tiles_of(a, index, _size(a)):
        x = (tile.of(a).to(dtype) - top[tile.place]) * problem.scale
        local, is_inside = _local(ids[tile.place], valid[tile.place], tile, picking)
        if x.shape[-1]:
            picked[tile.place] += torch.where(is_inside, x.gather(-1, local), 0.0)
        weights = x.exp_()
        if picking.is_rest:
            weights = _without(weights, local, is_inside)
        total[tile.place] += weights.sum(-1, keepdim=True)
    picked, total = problem.total(picked), problem.total(total)
    return torch.cat((torch.where(valid, picked, -torch.inf), total.log()), -1), top, total


def _local(ids: Tensor, valid: Tensor, tile: Tile, picking: Picking) -> tuple[Tensor, Tensor]:
    """Return the columns of the ids within a tile, and whether they lie in it."""
    width = tile.classes.stop - tile.classes.start
    local = ids - (picking.start + tile.classes.start)
    is_inside = valid & (local >= 0) & (local < width)
    return torch.where(is_inside, local, 0), is_inside


def _without(weights: Tensor, local: Tensor, is_inside: Tensor) -> Tensor:
    """Return the weights with zeros at the columns that are inside."""
    spare = torch.nn.functional.pad(weights, (0, 1))
    return spare.scatter_(-1, torch.where(is_inside, local, weights.shape[-1]), 0.0)[:, :-1]


def _spread(
    a: Tensor,
    index: Tensor | None,
    ids: Tensor,
    valid: Tensor,
    rows: Tensor,
    grad: Tensor,
    picking: Picking,
    out: Tensor,
) -> None:
    """Write the derivatives by the logits, at the rows of the index."""
    problem, (top, total) = picking.problem, rows
    grad = grad * problem.scale
    factor = torch.where(total > 0, grad[:, -1:] / torch.where(total > 0, total, 1.0), 0.0)
    for tile in tiles_of(a, index, _size(a)):
        weights = ((tile.of(a).to(rows.dtype) - top[tile.place]) * problem.scale).exp_()
        local, is_inside = _local(ids[tile.place], valid[tile.place], tile, picking)
        if picking.is_rest:
            weights = _without(weights, local, is_inside)
        weights = weights * factor[tile.place]
        if weights.shape[-1]:
            weights.scatter_add_(-1, local, torch.where(is_inside, grad[tile.place, :-1], 0.0))
        tile.put(out, weights)


def _plain(a: Tensor, ids: Tensor, valid: Tensor, picking: Picking) -> Tensor:
    """Return the picked numbers of logits by operations that torch can differentiate."""
    a = a.to(_wide(a))
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
