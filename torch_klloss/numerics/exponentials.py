"""Exponentials less the first terms of their series, accurate near 0, by the rules of `elementary`."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_klloss.numerics.elementary import (
    chooses,
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
    digits: half as many operations, which take longer a number.
    """
    if not has_digits_to_spare(t) or is_differentiated() or t.numel() > _FEW:
        lead = e2(t)
        return lead + t, lead
    wide = t.double()
    lost, above = torch.expm1(wide), product(wide, wide, times=0.5)
    below = torch.addcmul(above, above, wide, value=1 / 3)
    return narrowed(lost, t), narrowed(torch.clamp(lost - wide, below, above), t)


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


def growth(a: Tensor, b: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, exp(x) - 1 and exp(x) - 1 - x ≥ 0, all widened, of x = a, or of x = a - b."""
    if has_digits_to_spare(a):
        x = a.double() if b is None else a.double() - b.double()
        grown = torch.expm1(x)
        return x, grown, (grown - x).clamp_min(0)
    x = a if b is None else a - b
    lead = e2(x)
    if b is not None:  # the exponential of a large difference feels how that was rounded
        lead = torch.addcmul(lead, (lead + x).clamp_max(largest(x)), difference_error(a.detach(), b.detach()))
    return x, lead + x, lead
