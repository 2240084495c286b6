"""Divergences of the softmax of logits row by row: the values, and from a few numbers a row the gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_klloss.numerics.elementary import common_dtype
from torch_klloss.numerics.softmax.rows import Computed, compute, write_derivatives
from torch_klloss.numerics.softmax.sides import Dense, Gradient, Side, add_to_tensors, panels
from torch_klloss.numerics.softmax.tiles import Problem

_PARTS = 8  # of the logits of a panel, which are few of all


@dataclass(frozen=True)
class Plan:
    """What is computed, beside the tensors.

    Attributes:
        problem: the divergence.
        kinds: the classes of the two sides, and how many tensors the first one has.
        num_first: how many of the tensors belong to the first side.
        index: on the CPU the rows that count; None for all.
        keep: elsewhere whether a row counts, `[rows, 1]`.
        guess: the gradient that the divergences will probably get, `[rows, 1]`, up to a factor.
    """

    problem: Problem
    kinds: tuple[type, type]
    num_first: int
    index: Tensor | None = None
    keep: Tensor | None = None
    guess: Tensor | None = None

    @classmethod
    def of(cls, q: Side, p: Side, problem: Problem, keep: Tensor | None, guess: Tensor | None = None) -> Plan:
        """Plan a divergence of two sides, of all rows or of those to keep, `[rows, 1]`."""
        index = None
        if not (isinstance(q, Dense) and isinstance(p, Dense)):
            problem = replace(problem, parts=_PARTS)
        if keep is not None and q.tensors[0].is_cpu:
            index, keep = keep.reshape(-1).nonzero().squeeze(-1), None
        return cls(problem, (type(q), type(p)), len(q.tensors), index, keep, guess)

    def sides(self, tensors: Sequence[Tensor]) -> tuple[Side, Side]:
        """Return the two sides of the tensors."""
        return self.kinds[0](*tensors[: self.num_first]), self.kinds[1](*tensors[self.num_first :])


def evaluate(
    plan: Plan, tensors: Sequence[Tensor], sums: Sequence[Gradient] | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the divergences `[rows, 1]`, and the fields of `Computed` for the rows that count, one after the other.

    The gradients of the guess are added to the sums, if there are any.
    """
    q, p = plan.sides(tensors)
    wide = torch.promote_types(common_dtype(tensors[0], tensors[plan.num_first]), torch.float32)
    value = tensors[0].new_zeros(q.shape[0], 1, dtype=wide)
    computed = []
    for place, rows in panels(q, p, plan.index):
        grad = None if sums is None or plan.guess is None else _part_of(plan.guess, plan, place).double()
        found = _evaluate_some(plan, (q, p), rows, grad, sums or ())
        computed.append(found)
        part = found.value(plan.problem.terms).to(wide)
        if plan.index is None:
            value[place] = part
        else:
            value[plan.index[place]] = part
    if plan.keep is not None:
        value = torch.where(plan.keep, value, 0.0)
    kinds = [c.kind for c in computed if c.kind is not None]
    return value, torch.cat([c.rows for c in computed], 1) if computed else value, torch.cat(kinds) if kinds else None


def pull_back(
    plan: Plan, tensors: Sequence[Tensor], needs: Sequence[bool], rows: Tensor, kind: Tensor | None, grad: Tensor
) -> list[Tensor | None]:
    """Return the gradients of the tensors, given what `evaluate` returned and that of the divergences, `[rows, 1]`."""
    q, p = plan.sides(tensors)
    sums = [Gradient(t, need, is_partial=plan.index is not None) for t, need in zip(tensors, needs, strict=True)]
    for place, some in panels(q, p, plan.index):
        part = Computed(rows[:, place], None if kind is None else kind[place])
        g = _part_of(grad, plan, place).to(rows.dtype)
        if plan.keep is not None:
            g = torch.where(plan.keep[place], g, 0.0)
        _add_gradients(plan, (q, p), some, _logits(q, p, some), part, g, sums)
    return [s.result() for s in sums]


def _evaluate_some(
    plan: Plan, sides: tuple[Side, Side], rows: slice | Tensor | None, grad: Tensor | None, sums: Sequence[Gradient]
) -> Computed:
    """Return what is computed of some rows, whose logits are gone afterwards, and add their gradients for a grad."""
    logits = _logits(*sides, rows)
    found = compute(*logits, plan.problem)
    if grad is not None:
        _add_gradients(plan, sides, rows, logits, found, grad, sums)
    return found


def guessed(plan: Plan, tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[Gradient] | None:
    """Return where the gradients of the guess are added up, or None where they had better not be.

    They are taken beside the values where the logits are made for it, which saves to make them again, and all of them
    belong to heads, whose gradients are small. A guess is compared with what comes, which waits for an accelerator.
    """
    sides = plan.sides(tensors)
    if plan.guess is None or not any(needs) or not tensors[0].is_cpu or plan.problem.is_sharded:
        return None
    needed = [any(needs[: plan.num_first]), any(needs[plan.num_first :])]
    if any(isinstance(side, Dense) and need for side, need in zip(sides, needed, strict=True)):
        return None
    return [Gradient(t, need, is_partial=plan.index is not None) for t, need in zip(tensors, needs, strict=True)]


def factor_of(grad: Tensor, plan: Plan, is_half: bool) -> float | None:
    """Return the factor of the guess that a gradient is, up to its roundings; None where it is no multiple of it.

    It is exact for half precision, where a product rounds too much.
    """
    assert plan.guess is not None
    guess, found = (t.double() if plan.index is None else t[plan.index].double() for t in (plan.guess, grad))
    if guess.numel() == 0:
        return 1.0
    largest, eps = guess.abs().argmax(), 4 * torch.finfo(grad.dtype).eps
    factor = (found.flatten()[largest] / guess.flatten()[largest]).item()
    factor = 1.0 if abs(factor - 1) <= eps else factor
    if not bool(((found - factor * guess).abs() <= eps * found.abs()).all()):
        return None
    return None if is_half and abs(math.frexp(factor)[0]) != 0.5 else factor


def _part_of(rows: Tensor, plan: Plan, place: slice) -> Tensor:
    """Return what belongs to some of the rows that count."""
    return rows[place if plan.index is None else plan.index[place]]


def _logits(q: Side, p: Side, rows: slice | Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return two tensors of logits, and the index of the rows in them."""
    if isinstance(q, Dense) and isinstance(p, Dense):
        return q.logits, p.logits, rows  # type: ignore[return-value]
    assert rows is not None
    return q.panel(rows), p.panel(rows), None


def _add_gradients(
    plan: Plan, sides: tuple[Side, Side], rows: slice | Tensor | None, found: tuple[Tensor, Tensor, Tensor | None],
    computed: Computed, grad: Tensor, sums: Sequence[Gradient],
) -> None:  # fmt: skip
    """Write, or add, the gradients of some rows, given what `_logits` returned."""
    logits, index = found[:2], found[2]
    parts = sums[: plan.num_first], sums[plan.num_first :]
    if all(isinstance(side, Dense) for side in sides):
        outs = parts[0][0].of_rows(), parts[1][0].of_rows()
        write_derivatives(*logits, index, computed, grad, plan.problem, *outs)
        _drop(plan, outs)
        return
    assert rows is not None
    needed = [any(s.is_needed for s in of) for of in parts]
    by = [
        None if not need else t if sum(needed) == 1 and not isinstance(side, Dense) else torch.empty_like(t)
        for need, t, side in zip(needed, logits, sides, strict=True)
    ]  # the logits of a head are its own, and each of them is read before one gradient is written to its place
    write_derivatives(*logits, None, computed, grad, plan.problem, *by)
    for side, of, out in zip(sides, parts, by, strict=True):
        if out is not None:
            add_to_tensors(side, list(of), rows, out if plan.keep is None else out.masked_fill_(~plan.keep[rows], 0.0))


def _drop(plan: Plan, outs: tuple[Tensor | None, ...]) -> None:
    """Set the gradients of rows that do not count to zero, which may be NaN."""
    if plan.keep is not None:
        for out in outs:
            if out is not None:
                out.masked_fill_(~plan.keep, 0.0)
