"""The KL of the softmax of logits for a compiler: few passes over the rows, of which it keeps a few numbers each.

It is the formula of `pairs`, written for what torch's compiler does on a CPU. It writes to memory whatever has
an exponential in it and is used twice, or has more than fifty operations, and it tests number by number whether
something is finite. So every sum has its own exponential, in a form of its own, since equal ones would become one;
`exp2`, which is not held to be costly, serves where its argument may be rounded.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_klloss.numerics.elementary import lag
from torch_klloss.numerics.error_free import difference_error
from torch_klloss.numerics.exponentials import e2_within_one
from torch_klloss.numerics.tracing import distinct

_MISSING = -1e30  # a logit below it counts as -inf
_SMALL = 0.1  # a KL; below it the classes where q and p are far apart cannot hold all the mass
_FAR = 1e30  # the logarithm of p/q of a class that one of them lacks
_LONG = 2048  # classes, from which on float32 loses digits in a sum
# The largest logit of a row that is taken as it is; of others the classes that count lose no digits.
_UNSHIFTED = (-17.0, 34.0)


class Rows(NamedTuple):
    """What the derivatives need of every row, `[rows, 1]` each.

    Attributes:
        value: the KL.
        q_shift, p_shift: what is taken off the logits.
        q_total, p_total: the sums of the exponentials.
        centre, rest: what is taken off b - a to get z, about log p/q, and what that was rounded by.
        deviation: the mean of z under q.
        error: what z exceeds log p/q by.
    """

    value: Tensor
    q_shift: Tensor
    p_shift: Tensor
    q_total: Tensor
    p_total: Tensor
    centre: Tensor
    rest: Tensor
    deviation: Tensor
    error: Tensor


def kl(a: Tensor, b: Tensor, keep: Tensor | None, scale: float) -> Tensor:
    """Return the KL of softmax(scale · a) to softmax(scale · b), `[rows, 1]`, for logits `[rows, classes]`.

    Args:
        a: the logits of q.
        b: those of p.
        keep: whether a row counts, `[rows, 1]`; the others are 0.
        scale: a power of two.
    """
    value: Tensor = _FusedKL.apply(*distinct(a, b), keep, scale)
    return value


class _FusedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, keep: Tensor | None, scale: float) -> Tensor:
        with torch.no_grad():
            rows = _rows(*_widened(a, b), scale)
        ctx.save_for_backward(a, b, keep, *rows)
        ctx.scale = scale
        return _kept(rows.value, keep)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, keep, *rows = ctx.saved_tensors
        with torch.no_grad():
            found = _derivatives(*_widened(a, b), Rows(*rows), grad, ctx.scale)
        by = [
            _kept(d, keep).to(t.dtype) if need else None
            for d, t, need in zip(found, (a, b), ctx.needs_input_grad, strict=False)
        ]
        return *by, None, None


def _kept(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else torch.where(keep, x, 0.0)


def _widened(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(wide), b.to(wide)


def _rows(a: Tensor, b: Tensor, scale: float) -> Rows:
    q_top, p_top = a.amax(-1, keepdim=True), b.amax(-1, keepdim=True)
    missed = torch.where(b < _MISSING, a, -torch.inf).amax(-1, keepdim=True) > _MISSING
    q_shift, p_shift, offset = _shift(q_top, scale), _shift(p_top, scale), p_top - q_top
    rough = torch.exp2((a - q_top) * (scale / math.log(2)))
    q_below, p_total = _sum(rough), _sum(torch.exp((b - p_shift) * scale))
    mean = _sum(rough * _log_ratio(a, b, offset, 0.0, 1.0, 0.0)) / q_below
    q_total = q_below * torch.exp((q_top - q_shift) * scale)
    log_norm = torch.log(p_total * torch.exp((p_shift - p_top) * scale) / q_below)
    least = log_norm - mean * scale
    is_small = least < _SMALL
    least = torch.where(is_small, 0.0, least)
    centre = offset + mean
    rest = ((centre - offset) - mean) - difference_error(p_top, q_top)
    z = _log_ratio(a, b, centre, rest, scale, _FAR)
    is_near = (z - least).abs() < 1
    terms = torch.where(is_near, e2_within_one(z - least), least - 1 - z)
    of_q = _sum(torch.exp((q_shift - a) * -scale) * terms) / q_total
    of_p = _sum(torch.where(is_near, 0.0, torch.exp((p_shift - b) * -scale))) / p_total
    deviation = _sum(rough * z) / q_below
    value, error = _kl_and_error(of_q + of_p, deviation, of_p, is_small)
    value = torch.where(missed, torch.inf, value)
    return Rows(value, q_shift, p_shift, q_total, p_total, centre, rest, deviation, least + error)


def _derivatives(a: Tensor, b: Tensor, rows: Rows, grad: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return grad times the derivatives by a and b: q times the mean of z less z, and p - q; 0 where the KL is inf."""
    z = _log_ratio(a, b, rows.centre, rows.rest, scale, _FAR)
    grad = torch.where(rows.value == torch.inf, 0.0, grad * scale)
    q = torch.exp((a - rows.q_shift) * scale) * (grad / rows.q_total)
    p = torch.exp((b - rows.p_shift) * scale) * (grad / rows.p_total)
    log_ratio = z - rows.error
    near = q * (e2_within_one(log_ratio) + log_ratio)
    return q * (rows.deviation - z), torch.where(log_ratio.abs() < 1, near, p - q)


def _shift(top: Tensor, scale: float) -> Tensor:
    low, high = _UNSHIFTED
    return torch.where((top * scale > low) & (top * scale < high), 0.0, top)


def _sum(x: Tensor) -> Tensor:
    """Return the sum over the last dimension, a sixteenth of which a compiler for the CPU adds up number by number."""
    dtype = torch.float64 if x.is_cpu and x.shape[-1] > _LONG else x.dtype
    return x.sum(-1, keepdim=True, dtype=dtype).to(x.dtype)


def _log_ratio(a: Tensor, b: Tensor, centre: Tensor, rest: Tensor | float, scale: float, otherwise: float) -> Tensor:
    """Return scale · (b - a - centre), rounded once, and what is given where a logit is missing."""
    gap = b - a
    ratio = (gap - centre) + (difference_error(b, a) + rest)
    return torch.where(gap.abs() < -_MISSING, ratio * scale if scale != 1 else ratio, otherwise)


def _kl_and_error(total: Tensor, deviation: Tensor, far: Tensor, is_small: Tensor) -> tuple[Tensor, Tensor]:
    """Return the KL, and what z is off by, as `pairs._kl` explains.

    A KL that is not small does not feel that z is off by the rounding of the log-normaliser.
    """
    far = torch.where(is_small, far, 0.0)
    near = torch.where(is_small, (total + deviation) - far, 0.0)
    value = total - lag(near, 1 + near) + lag(-far, 1 - far)
    return value.clamp_min(0), torch.log1p(near) - torch.log1p(-far)
