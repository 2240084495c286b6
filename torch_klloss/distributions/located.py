"""Points that know how far they are from the ends of their support, nearer than their dtype can hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch_klloss.numerics.exponentials import expm1

End = float | Tensor


@dataclass(frozen=True)
class Located:
    """Points with the logarithms of their distances to two ends.

    A tanh or a softmax rounds to 1 long before its argument is large, and a density that depends on 1 - x is lost then.
    The logarithm of the distance is not, if it is computed from the argument.

    Attributes:
        x: the points.
        lower: the lower end that `log_below` counts from; -inf if there is none.
        upper: the upper end.
        log_below: log(x - lower), in the shape of x; None: as x has it.
        log_above: log(upper - x); None: as x has it.
        origin: a transform and the points that it made these from.
    """

    x: Tensor
    lower: End = -math.inf
    upper: End = math.inf
    log_below: Tensor | None = None
    log_above: Tensor | None = None
    origin: tuple[Any, Located] | None = None

    def log_from(self, end: End) -> Tensor:
        """Return log(x - end), of an end at or below the points."""
        return _log_distance(self.x - end, self.log_below, self.lower - end, end)

    def log_to(self, end: End) -> Tensor:
        """Return log(end - x), of an end at or above the points."""
        return _log_distance(end - self.x, self.log_above, end - self.upper, end)

    def detach(self) -> Located:
        """Return the points without their gradient, and without the origin that it may flow through."""
        return replace(self._each(Tensor.detach), origin=None)

    def map(self, f: Callable[[Tensor], Tensor]) -> Located:
        """Return the points rearranged by f."""
        return replace(self._each(f), origin=None)

    def inside(self, mask: Tensor, point: Tensor) -> Located:
        """Return the points where the mask holds, and another point elsewhere."""
        other = Located(point)
        return Located(
            torch.where(mask, self.x, point),
            self.lower,
            self.upper,
            None if self.log_below is None else torch.where(mask, self.log_below, other.log_from(self.lower)),
            None if self.log_above is None else torch.where(mask, self.log_above, other.log_to(self.upper)),
        )

    def _each(self, f: Callable[[Tensor], Tensor]) -> Located:
        lower, upper = (f(t.expand_as(self.x)) if isinstance(t, Tensor) else t for t in (self.lower, self.upper))
        below, above = (None if log is None else f(log) for log in (self.log_below, self.log_above))
        return Located(f(self.x), lower, upper, below, above)


def located(x: Tensor | Located) -> Located:
    """Return points as `Located`; a tensor knows no more than its values."""
    return x if isinstance(x, Located) else Located(x)


def _log_distance(distance: Tensor, known: Tensor | None, gap: End, end: End) -> Tensor:
    """Return the logarithm of a distance to an end: the one that is known, where it counts from the same end.

    Args:
        distance: as the points have it.
        known: the logarithm of the distance to another end.
        gap: how much farther away this end is than the other one.
        end: this end, for its rounding.
    """
    if known is None:
        return distance.log()
    rounding = 16 * torch.finfo(known.dtype).eps
    if not isinstance(gap, Tensor):
        return known if abs(gap) <= rounding * max(1.0, abs(float(end))) else distance.log()
    same = gap.abs() <= rounding * torch.as_tensor(end).abs().clamp_min(1.0)
    if gap.requires_grad:  # the ends are the same number, and may be different parameters
        gap = gap - gap.detach()
        known = known + gap * (-known.detach()).exp().clamp_max(torch.finfo(known.dtype).max)
    return torch.where(same, known, torch.where(same, 1.0, distance).log())


def log1mexp(y: Tensor) -> Tensor:
    """Return log(1 - exp(y)) for y < 0."""
    near = y > -0.6931
    return torch.where(
        near,
        torch.log(-expm1(torch.where(near, y, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, y))),
    )


def log1m_power(x: Located, exponent: Tensor) -> Tensor:
    """Return log(1 - xᵃ) of points in (0, 1) and a > 0."""
    log_rest = exponent.log() + x.log_to(1.0)  # of a (1 - x)
    near = log_rest < math.log(torch.finfo(log_rest.dtype).eps) - 1
    power = torch.where(near, -1.0, exponent * x.log_from(0.0))
    return torch.where(near, log_rest, log1mexp(power))
