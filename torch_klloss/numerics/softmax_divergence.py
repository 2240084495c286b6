"""Divergences of the softmax of logits, for which nothing of the logits' size is kept for the gradient.

The logits are tensors, or products of hidden states and the weight of a head, which are then made a few rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_klloss.numerics.elementary import common_dtype
from torch_klloss.numerics.logit_sides import Dense, Gradient, Reduce, Side, add_to_tensors, panels
from torch_klloss.numerics.softmax_pairs import Arithmetic, Terms, derivatives, rows_of
from torch_klloss.numerics.softmax_rows import Computed, compute, write_derivatives
from torch_klloss.numerics.softmax_tiles import Problem
from torch_klloss.numerics.tracing import in_eager_mode, is_forward_mode, is_traced


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

    def sides(self, tensors: tuple[Tensor, ...]) -> tuple[Side, Side]:
        """Return the two sides of the tensors."""
        return self.kinds[0](*tensors[: self.num_first]), self.kinds[1](*tensors[self.num_first :])


def divergence_of_logits(
    q: Side,
    p: Side,
    terms: Terms,
    *,
    temperature: float = 1.0,
    keep: Tensor | None = None,
    total: Reduce | None = None,
    largest: Reduce | None = None,
) -> Tensor:
    """Return the divergence of softmax(q/T) and softmax(p/T), `[*tokens]`, in at least float32.

    Beside its inputs and gradients, it keeps a few numbers a token.

    Args:
        q: the logits of q.
        p: those of p, of the same shape.
        terms: the divergence.
        temperature: T.
        keep: whether a token counts, `[*tokens]`; the others are 0, and their logits are not looked at.
        total: adds a tensor over the shards of the vocabulary, for logits that are one of them.
        largest: takes the maximum over the shards.
    """
    if not terms.by_q:
        return divergence_of_logits(
            p, q, Terms(terms.by_p, terms.p_mix), temperature=temperature, keep=keep, total=total, largest=largest
        )
    reduces = {} if total is None or largest is None else {"total": total, "largest": largest}
    if reduces and is_traced():
        return in_eager_mode(divergence_of_logits)(q, p, terms, temperature=temperature, keep=keep, **reduces)
    tokens, first = q.shape[:-1], q.tensors[0]
    q, p = q.rows, p.rows
    problem = Problem(terms, temperature, **reduces)
    if is_traced():
        keep = None if keep is None else keep.reshape(-1, 1)
        return _traced(q, p, problem, keep).reshape(tokens)
    index = None
    if keep is not None and first.is_cpu:
        index, keep = keep.reshape(-1).nonzero().squeeze(-1), None
    elif keep is not None:
        keep = keep.reshape(-1, 1)
    plan = Plan(problem, (type(q), type(p)), len(q.tensors), index, keep)
    value: Tensor = _Divergence.apply(plan, *q.tensors, *p.tensors)
    return value.reshape(tokens)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor) -> Tensor:
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
        ctx.save_for_backward(
            torch.cat([c.rows for c in computed], 1) if computed else value,
            torch.cat(kinds) if kinds else None,
            *tensors,
        )
        ctx.plan = plan
        return value.squeeze(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, kind, *tensors = ctx.saved_tensors
        plan, needs = ctx.plan, ctx.needs_input_grad[1:]
        grad = grad.unsqueeze(-1)
        if torch.is_grad_enabled():
            return None, *_again(plan, tuple(tensors), needs, grad)
        q, p = plan.sides(tuple(tensors))
        sums = [Gradient(t, need, is_partial=plan.index is not None) for t, need in zip(tensors, needs, strict=True)]
        by_q, by_p = sums[: plan.num_first], sums[plan.num_first :]
        for place, some in panels(q, p, plan.index):
            part = Computed(rows[:, place], None if kind is None else kind[place])
            g = grad[place if plan.index is None else plan.index[place]].to(rows.dtype)
            if plan.keep is not None:
                part.rows, g = part.rows, torch.where(plan.keep[place], g, 0.0)
            _pull_back(q, p, some, part, g, plan, by_q, by_p)
        return None, *(s.result() for s in sums)


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
            add_to_tensors(side, sums, rows, out if plan.keep is None else torch.where(plan.keep[rows], out, 0.0))


def _drop(plan: Plan, outs: tuple[Tensor | None, ...]) -> None:
    """Set the gradients of rows that do not count to zero, which may be NaN."""
    if plan.keep is not None:
        for out in outs:
            if out is not None:
                out.masked_fill_(~plan.keep, 0.0)


def _plain(q: Side, p: Side, problem: Problem) -> Tensor:
    """Return the divergence `[rows, 1]` by operations that torch can differentiate."""
    a, b, arithmetic = _prepared(q.whole(), p.whole(), problem)
    return rows_of(a, b, arithmetic, problem.terms).value(problem.terms)


def _prepared(a: Tensor, b: Tensor, problem: Problem) -> tuple[Tensor, Tensor, Arithmetic]:
    wide = torch.promote_types(common_dtype(a, b), torch.float32)
    return a.to(wide), b.to(wide), Arithmetic(problem.temperature, is_exact=True)


def _again(plan: Plan, tensors: tuple[Tensor, ...], needs: tuple[bool, ...], grad: Tensor) -> list[Tensor | None]:
    """Return the gradients with a graph of their own."""
    if plan.problem.is_sharded:
        raise NotImplementedError(
            "the gradient of VocabShards cannot be differentiated again, since no process has all logits: compute the "
            "second derivative of whole logits."
        )
    sides, index = plan.sides(tensors), plan.index
    a, b = (side.whole() if index is None else side.whole()[index] for side in sides)
    by_logits = _gradients(a, b, plan.keep, grad if index is None else grad[index], plan.problem)
    if index is not None:
        by_logits = tuple(g.new_zeros(len(grad), g.shape[-1]).index_copy(0, index, g) for g in by_logits)
    found = [g for side, by in zip(sides, by_logits, strict=True) for g in side.pull_back(by)]
    return [g if need else None for g, need in zip(found, needs, strict=True)]


def _gradients(a: Tensor, b: Tensor, keep: Tensor | None, grad: Tensor, problem: Problem) -> tuple[Tensor, ...]:
    """Return grad times the derivatives by logits, by operations that torch can differentiate."""
    if keep is not None:
        a, b, grad = (torch.where(keep, t, 0.0) for t in (a, b, grad))
    x, y, arithmetic = _prepared(a, b, problem)
    rows = rows_of(x, y, arithmetic, problem.terms)
    found = derivatives(x, y, rows, grad, arithmetic, problem.terms)
    return tuple(d.to(t.dtype) for d, t in zip(found, (a, b), strict=True))


def _traced(q: Side, p: Side, problem: Problem, keep: Tensor | None) -> Tensor:
    """Return the divergence under `torch.compile` and `torch.func`."""
    if is_forward_mode():
        value = _plain(q, p, problem)
        return value if keep is None else torch.where(keep, value, 0.0)
    a, b = q.whole(), p.whole()
    keep = a.new_ones((), dtype=torch.bool) if keep is None else keep
    result: Tensor = _Traced.apply(a, b, keep, problem.terms, problem.temperature)
    return result


class _Traced(torch.autograd.Function):
    """The same on whole tensors, with derivatives of the inputs alone, so that a compiler can fuse everything."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, keep: Tensor, terms: Terms, temperature: float) -> Tensor:
        return torch.where(keep, _plain(Dense(a), Dense(b), Problem(terms, temperature)), 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.settings = inputs[3:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, keep = ctx.saved_tensors
        by_a, by_b = _gradients(a, b, keep, grad, Problem(*ctx.settings))
        return by_a, by_b, None, None, None
