"""KL(softmax(a)‖softmax(b)) of many rows, in blocks that stay in the cache.

Beside the inputs, nothing of their size is kept for the gradient: the exponentials are computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from torch_klloss.numerics.elementary import common_dtype

_BLOCK = 2**17  # numbers of one tensor of a block, so that a handful of its tensors fit into the cache of a core
# (classes, share): from so many classes on, float32 is tried first, and kept where the KL is at least this share of the
# terms whose difference it is. Its error is below 1e-7 of them: 4 units in the last place, and 32 above 1024 classes.
_IN_SINGLE = ((1025, 2.0**-5), (256, 2.0**-1))
_PART = 64  # classes that are summed in their own dtype, of many
_FEW_NUMBERS = 2**12  # up to which all float64 rows are computed by the accurate formula

Formula = Callable[[Tensor, Tensor, bool], Tensor]
Partials = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]


def kl_in_blocks(a: Tensor, b: Tensor, formula: Formula, partials: Partials, *, are_logits: bool) -> Tensor:
    """Return the KL of parameters a and b, `[*batch, classes]`, over their last dimension.

    The KL of logits is the difference of the log-normalisers less the mean of b - a, in float32 where there are many
    classes. Rows where that would cancel, or is not finite, are computed in float64, and at last by `formula`.

    Args:
        a: the parameter of q.
        b: the parameter of p; they broadcast.
        formula: the accurate fallback. It takes float64 rows and whether all digits of float64 are needed, and returns
            the KL with the last dimension kept.
        partials: computes its derivatives from the rows and their KL, by operations that can be differentiated again.
        are_logits: whether a and b both are logits; if not, `formula` computes all rows.
    """
    dtype = common_dtype(a, b)
    a, b = torch.broadcast_tensors(a.to(dtype), b.to(dtype))
    shape = a.shape
    rows = a.reshape(-1, shape[-1]), b.reshape(-1, shape[-1])
    value: Tensor = _Rows.apply(*rows, formula, partials, are_logits)
    return value.reshape(shape[:-1])


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, formula: Formula, partials: Partials, are_logits: bool) -> Tensor:
        rows = a.new_full((4, len(a)), math.nan, dtype=torch.float64)
        value, is_left = rows[0], a.new_ones(len(a), dtype=torch.bool)
        is_single = a.dtype == torch.float32
        least = next((least for classes, least in _IN_SINGLE if a.shape[-1] >= classes), None)
        if are_logits and is_single and least is not None:
            for block in _blocks(len(a), a):
                rows[:, block], is_left[block] = _compare(a[block], b[block], least)
        is_native = ~is_left
        if are_logits and (is_single or a.numel() > _FEW_NUMBERS):
            least = 2.0 ** (-23 if is_single else -1)
            for some in _indices(is_left, a):
                rows[:, some], is_left[some] = _compare(a[some].double(), b[some].double(), least)
        for some in _indices(is_left, a):
            value[some] = formula(a[some].double(), b[some].double(), not is_single).squeeze(-1)
        ctx.save_for_backward(a, b, rows, is_native, is_left)
        ctx.formula, ctx.partials = formula, partials
        return value.to(a.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, rows, is_native, is_left = ctx.saved_tensors
        rows, grad = rows.unsqueeze(-1), grad.unsqueeze(-1)
        if torch.is_grad_enabled():  # to be differentiated again
            a, b = a.double(), b.double()
            by = ctx.partials(a, b, ctx.formula(a, b, True), True)
            return *((grad * d).to(grad.dtype) for d in by), None, None, None
        by_a, by_b = (
            torch.empty_like(t) if need else None for t, need in zip((a, b), ctx.needs_input_grad[:2], strict=True)
        )
        if not is_left.all():
            for block in _blocks(len(a), a):
                dtype = a.dtype if bool(is_native[block].all()) else torch.float64
                x, y, some, g = (t.to(dtype) for t in (a[block], b[block], rows[:, block], grad[block]))
                _differentiate(x, y, some, g, _at(by_a, block), _at(by_b, block))
        for some in _indices(is_left, a):
            by = ctx.partials(a[some].double(), b[some].double(), rows[0, some], a.dtype == torch.float64)
            for whole, d in zip((by_a, by_b), by, strict=True):
                if whole is not None:
                    whole[some] = (grad[some] * d).to(whole.dtype)
        return by_a, by_b, None, None, None


def _compare(a: Tensor, b: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Return the KL of the rows, the sums of the exponentials and the mean of b - a; and which rows have lost digits.

    These are the rows where the KL is less than `least` of the numbers whose difference it is, or an exponential over-
    or underflows. The logits are not shifted, since they are exact as they are.
    """
    weights, other = torch.exp(a), torch.exp(b)
    add = _add_in_parts if _is_spread(weights) and _is_spread(other) else _add
    total, other_total = add(weights), add(other)
    mean = add(_log_ratio(a, b).mul_(weights)) / total
    log_norm = torch.log(other_total / total)
    value = log_norm - mean
    underflows = torch.minimum(total, other_total) < math.sqrt(torch.finfo(a.dtype).tiny)
    is_left = ~(value > least * (1 + mean.abs() + log_norm.abs())) | underflows
    return torch.stack((value, total, other_total, mean)), is_left


def _differentiate(a: Tensor, b: Tensor, rows: Tensor, grad: Tensor, by_a: Tensor | None, by_b: Tensor | None) -> None:
    """Write grad times the derivatives, -q (ratio - mean) and p - q, into `by_a` and `by_b`."""
    _, total, other_total, mean = rows
    weights, share = torch.exp(a), grad / total
    if by_a is not None:
        torch.mul(_log_ratio(a, b).sub_(mean).mul_(weights), -share, out=by_a)
    if by_b is not None:
        torch.sub(torch.exp(b).mul_(grad / other_total), weights.mul_(share), out=by_b)


def _add(t: Tensor) -> Tensor:
    return t.sum(-1, dtype=torch.float64)


def _add_in_parts(t: Tensor) -> Tensor:
    """Return the sum of each row, a few numbers at a time in their own dtype: in a quarter of the time."""
    return _add(t.unflatten(-1, (-1, _PART)).sum(-1))


def _is_spread(weights: Tensor) -> bool:
    """Return whether no row is dominated by few classes, so that the roundings of its parts average out."""
    if weights.shape[-1] % _PART:
        return False
    parts = weights.unflatten(-1, (-1, _PART)).sum(-1)
    return bool((parts.amax(-1) * 16 < parts.sum(-1)).all())


def _log_ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return b - a; of a class that q lacks, any finite number, since its weight is 0."""
    ratio = b - a
    if not bool(ratio.sum().isfinite()):
        ratio.nan_to_num_(nan=0.0, posinf=1e30, neginf=-math.inf)
    return ratio


def _blocks(size: int, t: Tensor) -> Iterator[slice]:
    step = max(1, _BLOCK // t.shape[-1])
    return (slice(start, start + step) for start in range(0, size, step))


def _indices(condition: Tensor, t: Tensor) -> Iterator[Tensor]:
    """Return the indices of the rows of t where the condition holds, in blocks."""
    indices = condition.nonzero().squeeze(-1)
    return (indices[block] for block in _blocks(len(indices), t))


def _at(t: Tensor | None, block: slice) -> Tensor | None:
    return None if t is None else t[block]
