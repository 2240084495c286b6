"""The divergences of the gamma family for an accelerator, where the number of operations counts.

Everything is in float64, of what was given in float32: so nothing need be done in two ways for small and for large
arguments, and all divergences of -log that `lgamma.bregman` adds up are computed at once, along a new first dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_klloss.numerics.elementary import horner
from torch_klloss.numerics.lgamma import (
    SHIFT,
    leading,
    stirling_bregman,
    stirling_slope_difference,
)

_WEIGHTS = (1.0,) * SHIFT + (0.5 - SHIFT,)
_SLOPE_WEIGHTS = (1.0,) * SHIFT + (0.5,)
_NEAR = 1e-3  # of a ratio to 1
_SERIES = (1 / 2, -1 / 3, 1 / 4, -1 / 5)  # of (x - log(1 + x))/x²


class Arguments(NamedTuple):
    """What a divergence is computed of, `[*dims]` each.

    Attributes:
        a, b: the arguments of lgamma.
        gap: a - b, from before these were rounded.
        means: two numbers whose ratio m has to do with the means of the distributions.
        cross: the difference of the two.
    """

    a: Tensor
    b: Tensor
    gap: Tensor
    means: tuple[Tensor, Tensor]
    cross: Tensor


def divergence_and_slope(x: Arguments) -> tuple[Tensor, Tensor]:
    """Return a (m - 1 - log m) + B(a, b), with B of `lgamma.bregman`, and its derivative by a where m changes as 1/a.

    That is [ψ(a) - log a] - [ψ(b) - log b] - log m.
    """
    steps = leading(tuple(range(SHIFT + 1)), x.a)
    all_a, all_b = x.a + steps, x.b + steps
    far_a, far_b = all_a[SHIFT], all_b[SHIFT]
    rows = (x.b * far_a, x.means[0]), (x.a * far_b, x.means[1]), (x.gap * -SHIFT, x.cross)
    numerators, denominators, gaps = (
        torch.cat((first, torch.stack(rest)))
        for first, rest in zip((all_a, all_b, x.gap.expand_as(all_a)), rows, strict=True)
    )
    lags, logs = _lags_and_logs(gaps / denominators, numerators / denominators)
    value = (leading(_WEIGHTS, x.a) * lags[:-2]).sum(0) + stirling_bregman(x.gap, far_a, far_b)
    value = torch.addcmul(value, x.a, lags[-1] - lags[-2])
    slope = (x.gap / (all_a * all_b) * leading(_SLOPE_WEIGHTS, x.a)).sum(0)
    slope = slope + stirling_slope_difference(x.gap, far_a, far_b) + (logs[-2] - logs[-1])
    return value, slope


def binet_trigamma(x: Tensor) -> Tensor:
    """Return ψ'(x) - 1/x, of which a large x loses some of the digits that float32 does not have."""
    return torch.special.zeta(2.0, x) - x.reciprocal()


def _lags_and_logs(x: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Return x - log(1 + x) and log(1 + x), given 1 + x as well."""
    log, square = torch.log(ratio), x * x
    return torch.where(square < _NEAR**2, square * horner(x, _SERIES), x - log), log
