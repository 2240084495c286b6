"""Divergences of the softmax of logits, for which nothing of the logits' size is kept for the gradient.

The logits are tensors, or products of hidden states and the weight of a head, which are then made a few rows at a time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_klloss.numerics.elementary import common_dtype
from torch_klloss.numerics.softmax import fused, opaque
from torch_klloss.numerics.softmax.pairs import KL, Arithmetic, Terms, derivatives, rows_of
from torch_klloss.numerics.softmax.plan import Plan, evaluate, factor_of, guessed, pull_back
from torch_klloss.numerics.softmax.sides import Dense, Reduce, Side
from torch_klloss.numerics.softmax.tiles import Problem
from torch_klloss.numerics.tracing import distinct, in_eager_mode, is_forward_mode, is_func_transformed, is_traced


def divergence_of_logits(
    q: Side,
    p: Side,
    terms: Terms,
    *,
    temperature: float = 1.0,
    keep: Tensor | None = None,
    total: Reduce | None = None,
    largest: Reduce | None = None,
    guess: Tensor | None = None,
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
        guess: the gradient that the result will probably get, `[*tokens]`, up to a factor. Where it is right, the
            logits of a head are made once.
    """
    if not terms.by_q:
        return divergence_of_logits(
            p, q, Terms(terms.by_p, terms.p_mix), temperature=temperature, keep=keep, total=total, largest=largest,
            guess=guess,
        )  # fmt: skip
    reduces: dict[str, Any] = {} if total is None or largest is None else {"total": total, "largest": largest}
    if reduces and is_traced():
        return in_eager_mode(divergence_of_logits)(q, p, terms, temperature=temperature, keep=keep, **reduces)
    tokens = q.shape[:-1]
    q, p = q.rows, p.rows
    problem = Problem(terms, temperature, **reduces)
    keep = None if keep is None else keep.reshape(-1, 1)
    if is_traced():
        if _is_fused(q, p, problem):
            return fused.kl(q.whole(), p.whole(), keep, problem.scale).reshape(tokens)
        if opaque.is_opaque(q):
            return opaque.call(q, p, problem, keep).reshape(tokens)
        return _traced(q, p, problem, keep).reshape(tokens)
    plan = Plan.of(q, p, problem, keep, None if guess is None else guess.detach().reshape(-1, 1))
    value: Tensor = _Divergence.apply(plan, *q.tensors, *p.tensors)
    return value.reshape(tokens)


def _is_fused(q: Side, p: Side, problem: Problem) -> bool:
    """Return whether the compiler shall trace `fused`."""
    if not torch.compiler.is_compiling() or is_func_transformed() or is_forward_mode():
        return False
    are_dense = isinstance(q, Dense) and isinstance(p, Dense)
    return are_dense and problem.terms == KL and math.frexp(problem.temperature)[0] == 0.5


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor) -> Tensor:
        sums = guessed(plan, tensors, ctx.needs_input_grad[1:])
        value, rows, kind = evaluate(plan, tensors, sums)
        ctx.save_for_backward(rows, kind, *tensors)
        ctx.plan, ctx.sums = plan, sums
        return value.squeeze(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, kind, *tensors = ctx.saved_tensors
        plan, needs = ctx.plan, ctx.needs_input_grad[1:]
        grad = grad.unsqueeze(-1)
        if torch.is_grad_enabled():
            return None, *_again(plan, tuple(tensors), needs, grad)
        sums, ctx.sums = ctx.sums, None  # used once, since what is returned may be written to
        factor = None if sums is None else factor_of(grad, plan, any(t.element_size() == 2 for t in tensors))
        if sums is not None and factor is not None:
            return None, *(s.result(factor) for s in sums)
        return None, *pull_back(plan, tuple(tensors), needs, rows, kind, grad)


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
    result: Tensor = _Traced.apply(*distinct(a, b), keep, problem.terms, problem.temperature)
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
