"""Divergences of many logits as one operation of torch's own, which `torch.compile` calls as it is.

What the compiler makes of whole tensors keeps several of the size of the logits. Called as it is, the operation takes
a few rows at a time, as outside of a graph, and keeps a few numbers a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_klloss.numerics.elementary import common_dtype
from torch_klloss.numerics.softmax.pairs import Rows, Terms
from torch_klloss.numerics.softmax.plan import Plan, evaluate, pull_back
from torch_klloss.numerics.softmax.rows import rows_dtype
from torch_klloss.numerics.softmax.sides import Dense, Head, Side
from torch_klloss.numerics.softmax.tiles import Problem
from torch_klloss.numerics.tracing import is_forward_mode, is_func_transformed

FEWEST = 2**20  # logits: fewer are traced, so that the compiler can join them with what is around


def is_opaque(q: Side) -> bool:
    """Return whether the compiler shall call the divergence as it is, which it cannot export."""
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting() or is_func_transformed() or is_forward_mode():
        return False
    return q.shape[0] * q.shape[1] >= FEWEST


def call(q: Side, p: Side, problem: Problem, keep: Tensor | None) -> Tensor:
    """Return the divergences of two sides, `[rows]`; the rows to keep are `[rows, 1]`."""
    are_heads = [isinstance(side, Head) for side in (q, p)]
    value: Tensor = _forward([*q.tensors], [*p.tensors], are_heads, [*problem.terms], problem.temperature, keep)[0]
    return value


def _plan(
    q: Sequence[Tensor], p: Sequence[Tensor], are_heads: Sequence[bool], terms: Sequence[float], temperature: float,
    keep: Tensor | None,
) -> Plan:  # fmt: skip
    first, second = ((Head if is_head else Dense)(*t) for is_head, t in zip(are_heads, (q, p), strict=True))
    return Plan.of(first, second, Problem(Terms(*terms), temperature), keep)


@torch.library.custom_op("torch_klloss::divergence", mutates_args=())
def _forward(
    q: Sequence[Tensor], p: Sequence[Tensor], are_heads: Sequence[bool], terms: Sequence[float], temperature: float,
    keep: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Return the divergences, and of every row its numbers and its kind, zeros for a row that is left out."""
    plan = _plan(q, p, are_heads, terms, temperature, keep)
    with torch.no_grad():
        value, rows, kind = evaluate(plan, [*q, *p])
    if plan.index is None:
        return [value.squeeze(-1), rows, value.new_empty(0, dtype=torch.int8) if kind is None else kind]
    whole = value.new_zeros(len(Rows._fields), len(value), 1, dtype=torch.float64)
    kinds = value.new_zeros(len(value), dtype=torch.int8)
    if kind is not None:
        whole[:, plan.index], kinds[plan.index] = rows, kind
    return [value.squeeze(-1), whole, kinds]


@_forward.register_fake
def _(
    q: Sequence[Tensor], p: Sequence[Tensor], are_heads: Sequence[bool], terms: Sequence[float], temperature: float,
    keep: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    num_rows, on_cpu = q[0].shape[0], q[0].device.type == "cpu"
    dtype = torch.promote_types(common_dtype(q[0], p[0]), torch.float32)
    return [
        q[0].new_empty(num_rows, dtype=dtype),
        q[0].new_empty(len(Rows._fields), num_rows, 1, dtype=rows_dtype(q[0], p[0])),
        q[0].new_empty(num_rows if on_cpu else 0, dtype=torch.int8),
    ]


@torch.library.custom_op("torch_klloss::divergence_backward", mutates_args=())
def _pull_back(
    grad: Tensor, rows: Tensor, kind: Tensor, needs: Sequence[bool], q: Sequence[Tensor], p: Sequence[Tensor],
    are_heads: Sequence[bool], terms: Sequence[float], temperature: float, keep: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of the tensors that need one."""
    plan = _plan(q, p, are_heads, terms, temperature, keep)
    if plan.index is not None:
        rows, kind = rows[:, plan.index], kind[plan.index]
    known = kind if q[0].is_cpu else None
    with torch.no_grad():
        found = pull_back(plan, [*q, *p], needs, rows, known, grad.unsqueeze(-1))
    return [g for g in found if g is not None]


@_pull_back.register_fake
def _(
    grad: Tensor, rows: Tensor, kind: Tensor, needs: Sequence[bool], q: Sequence[Tensor], p: Sequence[Tensor],
    are_heads: Sequence[bool], terms: Sequence[float], temperature: float, keep: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(t) for t, need in zip([*q, *p], needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    q, p, *ctx.settings, keep = inputs
    ctx.num_first, ctx.has_keep = len(q), keep is not None
    ctx.needs = [t.requires_grad for t in (*q, *p)]
    ctx.save_for_backward(*output[1:], *q, *p, *([keep] if ctx.has_keep else []))


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    rows, kind, *tensors = ctx.saved_tensors
    keep = tensors.pop() if ctx.has_keep else None
    sides = tensors[: ctx.num_first], tensors[ctx.num_first :]
    found = iter(_pull_back(grads[0], rows, kind, ctx.needs, *sides, *ctx.settings, keep))
    by = [next(found) if need else None for need in ctx.needs]
    return by[: ctx.num_first], by[ctx.num_first :], None, None, None, None


_forward.register_autograd(_backward, setup_context=_setup_context)
