"""Divergences of the softmax of logits row by row: the values, and from a few numbers a row the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_klloss.numerics.elementary import common_dtype
from torch_klloss.numerics.logit_sides import Dense, Gradient, Side, add_to_tensors, panels
from torch_klloss.numerics.softmax_rows import Computed, compute, write_derivatives
from torch_klloss.numerics.softmax_tiles import Problem

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
    """

    problem: Problem
    kinds: tuple[type, type]
    num_first: int
    index: Tensor | None = None
    keep: Tensor | None = None

    @classmethod
    def of(cls, q: Side, p: Side, problem: Problem, keep: Tensor | None) -> Plan:
        """Plan a divergence of two sides, of all rows or of those to keep, `[rows, 1]`."""
        index = None
        if not (isinstance(q, Dense) and isinstance(p, Dense)):
            problem = replace(problem, parts=_PARTS)
        if keep is not None and q.tensors[0].is_cpu:
            index, keep = keep.reshape(-1).nonzero().squeeze(-1), None
        return cls(problem, (type(q), type(p)), len(q.tensors), index, keep)

    def sides(self, tensors: Sequence[Tensor]) -> tuple[Side, Side]:
        """Return the two sides of the tensors."""
        return self.kinds[0](*tensors[: self.num_first]), self.kinds[1](*tensors[self.num_first :])


def evaluate(plan: Plan, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the divergences `[rows, 1]`, and the fields of `Computed` for the rows that count, one after the other."""
    q, p = plan.sides(tensors)
    wide = torch.promote_types(common_dtype(tensors[0], tensors[plan.num_first]), torch.float32)
    value = tensors[0].new_zeros(q.shape[0], 1, dtype=wide)
    computed = []
    for place, rows in panels(q, p, plan.index):
        found = _computed(q, p, rows, plan.problem)
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
    by_q, by_p = sums[: plan.num_first], sums[plan.num_first :]
    for place, some in panels(q, p, plan.index):
        part = Computed(rows[:, place], None if kind is None else kind[place])
        g = grad[place if plan.index is None else plan.index[place]].to(rows.dtype)
        if plan.keep is not None:
            g = torch.where(plan.keep[place], g, 0.0)
        _pull_back(q, p, some, part, g, plan, by_q, by_p)
    return [s.result() for s in sums]


def _computed(q: Side, p: Side, rows: slice | Tensor | None, problem: Problem) -> Computed:
    if isinstance(q, Dense) and isinstance(p, Dense):
        return compute(q.logits, p.logits, rows, problem)  # type: ignore[arg-type]
    assert rows is not None
    return compute(q.panel(rows), p.panel(rows), None, problem)


def _pull_back(
    q: Side, p: Side, rows: slice | Tensor | None, computed: Computed, grad: Tensor, plan: Plan,
    by_q: list[Gradient], by_p: list[Gradient],
) -> None:  # fmt: skip
    """Write, or add, the gradients of some rows."""
    if isinstance(q, Dense) and isinstance(p, Dense):
        outs = by_q[0].of_rows(), by_p[0].of_rows()
        write_derivatives(q.logits, p.logits, rows, computed, grad, plan.problem, *outs)  # type: ignore[arg-type]
        _drop(plan, outs)
        return
    assert rows is not None
    a, b = q.panel(rows), p.panel(rows)
    needed = [any(s.is_needed for s in sums) for sums in (by_q, by_p)]
    by_a, by_b = (torch.empty_like(t) if need else None for t, need in zip((a, b), needed, strict=True))
    write_derivatives(a, b, None, computed, grad, plan.problem, by_a, by_b)
    for side, sums, out in zip((q, p), (by_q, by_p), (by_a, by_b), strict=True):
        if out is not None:
            add_to_tensors(side, sums, rows, out if plan.keep is None else out.masked_fill_(~plan.keep[rows], 0.0))


def _drop(plan: Plan, outs: tuple[Tensor | None, ...]) -> None:
    """Set the gradients of rows that do not count to zero, which may be NaN."""
    if plan.keep is not None:
        for out in outs:
            if out is not None:
                out.masked_fill_(~plan.keep, 0.0)
