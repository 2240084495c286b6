"""Exponentials less the first terms of their series, accurate near 0, by the rules of `elementary`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_klloss.numerics.elementary import (
    chooses,
    constants,
    has_digits_to_spare,
    horner,
    is_differentiated,
    largest,
    narrowed,
    product,
    within,
)
from torch_klloss.numerics.error_free import difference_error

# Of (exp(x) - 1 - x)/x²: minimax for |x| ≤ 1, relative errors 1e-7 and 1e-17.
_EXP = {
    torch.float32: (0.5, 0.1666669729, 0.04166669721, 0.008330886169, 0.001388644774, 0.0002032904191, 2.52884349e-05),
    torch.float64: (
        0.5,
        0.16666666666666666,
        0.04166666666666609,
        0.008333333333333299,
        0.0013888888888981404,
        0.00019841269841324198,
        2.4801587246096818e-05,
        2.7557319191381816e-06,
        2.755733506893373e-07,
        2.5052117695907823e-08,
        2.0874435575864273e-09,
        1.6057679623801638e-10,
        1.1639194124150522e-11,
        7.746178593018827e-13,
    ),
}
_FEW = 2**13  # numbers, for which the number of operations counts
_ABOVE_ONE = {torch.float32: 1 + 2.0**-22, torch.float64: 1 + 2.0**-50}  # by more than exp rounds near 1
# Of (exp(x) - 1 - x)/x²: the series, which ends with an odd power so that it is a lower bound.
_SERIES = {torch.float32: tuple(1 / math.factorial(k) for k in range(2, 12)), torch.float64: (1 / 2, 1 / 6)}
_FIRST = 4  # terms of it, which are enough for |x| up to this:
NEAR = {torch.float32: 2.0**-4, torch.float64: 2.0**-12}


def e2(x: Tensor) -> Tensor:
    """Return exp(x) - 1 - x ≥ 0."""
    if chooses(x):
        square = x * x
        return torch.where(square < 1, square * horner(x, _EXP[x.dtype]), torch.expm1(x) - x)
    near = within(x, -1.0, 1.0) if is_differentiated() else x.clamp(-1, 1)
    lead = horner(near, _EXP[x.dtype])
    return torch.addcmul((torch.exp(x) - torch.exp(near)) - (x - near), near * near, lead)


def decay(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp(t) - 1 and exp(t) - 1 - t ≥ 0 of t ≤ 0, in the dtype of t.

    Of few numbers in float64 the second is a difference, and within the first terms of its series where that has lost
    digits.
    """
    if not has_digits_to_spare(t) or is_differentiated():
        lead = e2(t)
        return lead + t, lead
    if _are_many(t):
        return _bounded_from_below(t, t.double())
    wide = t.double()
    lost, above = torch.expm1(wide), product(wide, wide, times=0.5)
    below = torch.addcmul(above, above, wide, value=1 / 3)
    return narrowed(lost, t), narrowed(torch.clamp(lost - wide, below, above), t)


def _are_many(x: Tensor) -> bool:
    """Return whether what an operation takes for a number counts, and not how many operations there are."""
    return x.is_cpu and x.numel() > _FEW


def _bounded_from_below(x: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp(x) - 1 and exp(x) - 1 - x in float32 of x, which is given in float64 as well, as `lead_into`.

    x is no more than the first, for every x, and as good as equal to it where its digits are lost.
    """
    grown = torch.exp(wide).sub_(_ABOVE_ONE[wide.dtype])
    below = torch.add(constants((0.5,), x.dtype, x.device)[0], x, alpha=1 / 6).mul_(x).mul_(x)
    return torch.maximum(grown.float(), x), torch.maximum(grown.sub_(wide).float(), below)


def lost_into(x: Tensor, out: Tensor) -> Tensor:
    """Write exp(x) - 1 to `out`, with the digits of float32, by the quicker of two ways."""
    if x.dtype == torch.float32:
        return torch.expm1(x, out=out)
    return torch.maximum(torch.exp(x, out=out).sub_(_ABOVE_ONE[x.dtype]), x, out=out)


def lead_into(x: Tensor, out: Tensor, work: Tensor, *, is_near: bool) -> Tensor:
    """Write exp(x) - 1 - x ≥ 0 of x to `out`, with the digits of float32, with the help of another such tensor.

    The series up to an odd power is no more than that, for every x. Where exp(x) - 1 - x has lost digits it is as good
    as equal to that, and larger than what is computed with a unit that exceeds 1 by more than the rounding of exp.
    float64's exp takes a fifth of the time of its `expm1`.

    Args:
        x: the exponents.
        out: what is written to.
        work: a tensor of that shape.
        is_near: whether |x| ≤ `NEAR` everywhere, where a few terms of the series are enough.
    """
    *lower, last = _SERIES[x.dtype][: _FIRST if is_near else None]
    constant, *others = reversed(constants(tuple(lower), x.dtype, x.device))
    below = torch.add(constant, x, alpha=last, out=out if is_near else work)
    for c in others:
        torch.addcmul(c, below, x, out=below)
    below.mul_(x).mul_(x)
    if is_near:
        return below
    return torch.maximum(torch.exp(x, out=out).sub_(_ABOVE_ONE[x.dtype]).sub_(x), below, out=out)


def e2_within_one(x: Tensor) -> Tensor:
    """Return exp(x) - 1 - x of |x| ≤ 1."""
    return x * x * horner(x, _EXP[x.dtype])


def expm1(x: Tensor) -> Tensor:
    """Return exp(x) - 1.

    torch's compiler for the CPU computes it as it is written, and loses the digits of a small x.
    """
    if not torch.compiler.is_compiling() or x.dtype not in _EXP:
        return torch.expm1(x)
    near = within(x, -1.0, 1.0)
    return torch.where(near == x, near + e2_within_one(near), torch.exp(x) - 1)


def growth(a: Tensor, b: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return exp(x) - 1 and exp(x) - 1 - x ≥ 0 of x = a, or of x = a - b, in the dtype of a."""
    if has_digits_to_spare(a):
        return narrow_growth(a.double(), a) if b is None else narrow_growth(a.double() - b.double())
    x = a if b is None else a - b
    lead = e2(x)
    if b is not None:  # the exponential of a large difference feels how that was rounded
        lead = torch.addcmul(lead, (lead + x).clamp_max(largest(x)), difference_error(a.detach(), b.detach()))
    return lead + x, lead


def narrow_growth(x: Tensor, narrow: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return exp(x) - 1 and exp(x) - 1 - x ≥ 0 in float32, of x in float64 and perhaps in float32 as well."""
    if _are_many(x) and not is_differentiated():
        return _bounded_from_below(x.float() if narrow is None else narrow, x)
    grown = torch.expm1(x)
    return grown.float(), (grown - x).clamp_min(0).float()
