"""What is picked of the classes of logits: the numbers, row by row, and from two numbers a row the gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_klloss.numerics.softmax.sides import Dense, Gradient, Side, add_to_tensors, panels
from torch_klloss.numerics.softmax.tiles import Problem, Tile, tiles_of, tops_of

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

    def by_index(self, like: Tensor) -> Picking:
        """Return the same with the index of the rows to keep, on the CPU."""
        if self.keep is None or not like.is_cpu:
            return self
        return replace(self, index=self.keep.squeeze(-1).nonzero().squeeze(-1), keep=None)


def dtype_of(a: Tensor) -> torch.dtype:
    """Return the dtype of what is picked of logits."""
    return torch.float64 if a.is_cpu else torch.promote_types(a.dtype, torch.float32)


def evaluate(picking: Picking, ids: Tensor, valid: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the log-weights `[rows, k + 1]`, and of every row that counts what the gradient needs, `[2, rows, 1]`."""
    side = picking.kind(*tensors)
    result = torch.zeros(len(ids), ids.shape[-1] + 1, dtype=dtype_of(tensors[0]), device=ids.device)
    rows = []
    for chosen, a, index, _ in _parts(side, picking):
        found, top, rest = _pick(a, index, ids[chosen], valid[chosen], picking)
        result[chosen] = found
        rows.append(torch.stack((top, rest)))
    if picking.keep is not None:
        result = torch.where(picking.keep, result, 0.0)
    return result, torch.cat(rows, 1) if rows else result.new_zeros(2, 0, 1)


def pull_back(
    picking: Picking, ids: Tensor, valid: Tensor, tensors: Sequence[Tensor], needs: Sequence[bool], rows: Tensor,
    grad: Tensor,
) -> list[Tensor | None]:  # fmt: skip
    """Return the gradients of the tensors, given what `evaluate` returned and that of the log-weights."""
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
    return [s.result() for s in sums]


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
    problem, dtype = picking.problem, dtype_of(a)
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
