"""Coordinates v of a support, in which the integrand falls off at both ends.

Close to an end of the support, and far out on an infinite one, v is the logarithm of the distance: powers become
exponentials there, which a Gauss rule integrates to rounding, and every scale of float64 is within reach.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_FARTHEST = 150 * math.log(10)  # the square of 1e150 is still a float64
_FAR = 300.0  # in units of the scale, e^300
_NEAREST = -300 * math.log(10)
_RESOLUTION = -34 * math.log(2)  # nearer to an end other than 0, float64 has too few digits for the distance


class Coordinate(ABC):
    """A map from v to points x of a support, one for every integral; its parameters broadcast to `[*integrals]`."""

    @abstractmethod
    def points(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log dx/dv; gradients flow into the ends of the support."""

    @abstractmethod
    def inverse(self, x: Tensor) -> Tensor:
        """Return v; infinite or NaN outside the support."""

    @abstractmethod
    def limits(self) -> tuple[Tensor, Tensor]:
        """Return the least and the greatest v that float64 can follow."""

    def log_distance(self, v: Tensor) -> Tensor:
        """Return what grows or falls like the logarithm of the distance, towards either end: v itself."""
        return v


@dataclass(frozen=True)
class Line(Coordinate):
    """x = centre + scale sinh v."""

    centre: Tensor
    scale: Tensor

    def points(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log dx/dv."""
        sinh = v.sinh()
        return self.centre + self.scale * sinh, self.scale.log() + (1 + sinh * sinh).log() / 2

    def inverse(self, x: Tensor) -> Tensor:
        """Return v."""
        return ((x - self.centre) / self.scale).asinh()

    def limits(self) -> tuple[Tensor, Tensor]:
        """Return the ends of v."""
        end = (_FARTHEST - self.scale.log()).min().clamp_max(_FAR)  # one for all, so that a grid of v is shared
        return -end, end


@dataclass(frozen=True)
class HalfLine(Coordinate):
    """x = end + sign exp v."""

    end: Tensor
    sign: int

    def points(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log dx/dv, at the distance that x has after rounding."""
        x = self.end + self.sign * v.exp()
        return x, self.inverse(x)

    def inverse(self, x: Tensor) -> Tensor:
        """Return v."""
        return (self.sign * (x - self.end)).log()

    def limits(self) -> tuple[Tensor, Tensor]:
        """Return the ends of v."""
        nearest = _log_nearest(self.end.detach())
        return nearest, torch.full_like(nearest, _FARTHEST)


@dataclass(frozen=True)
class Interval(Coordinate):
    """x = lower + (upper - lower) sigmoid v."""

    lower: Tensor
    upper: Tensor

    def points(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log dx/dv, at the distances that x has after rounding."""
        length = self.upper - self.lower
        x = torch.where(v < 0, self.lower + length * v.sigmoid(), self.upper - length * (-v).sigmoid())
        return x, (x - self.lower).log() + (self.upper - x).log() - length.log()

    def inverse(self, x: Tensor) -> Tensor:
        """Return v."""
        return (x - self.lower).log() - (self.upper - x).log()

    def limits(self) -> tuple[Tensor, Tensor]:
        """Return the ends of v."""
        length = (self.upper - self.lower).detach().log()
        return _log_nearest(self.lower.detach()) - length, length - _log_nearest(self.upper.detach())


@dataclass(frozen=True)
class Segment(Coordinate):
    """x = centre + v, for a density that does not vanish at the ends of its support."""

    lower: Tensor
    upper: Tensor
    centre: Tensor

    def points(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log dx/dv."""
        return self.centre + v, torch.zeros_like(v)

    def inverse(self, x: Tensor) -> Tensor:
        """Return v."""
        return x - self.centre

    def limits(self) -> tuple[Tensor, Tensor]:
        """Return the ends of v."""
        return self.inverse(self.lower), self.inverse(self.upper)


@dataclass(frozen=True)
class Shifted(Coordinate):
    """Another coordinate, whose v is offset + stretch v."""

    inner: Coordinate
    offset: Tensor
    stretch: Tensor

    def points(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log dx/dv."""
        x, log_slope = self.inner.points(self.offset + self.stretch * v)
        return x, log_slope + self.stretch.log()

    def inverse(self, x: Tensor) -> Tensor:
        """Return v."""
        return (self.inner.inverse(x) - self.offset) / self.stretch

    def limits(self) -> tuple[Tensor, Tensor]:
        """Return the ends of v."""
        low, high = self.inner.limits()
        return (low - self.offset) / self.stretch, (high - self.offset) / self.stretch

    def log_distance(self, v: Tensor) -> Tensor:
        """Return the other coordinate's."""
        return self.inner.log_distance(self.offset + self.stretch * v)


@dataclass(frozen=True)
class Mixed(Coordinate):
    """One coordinate for the integrals in `mask`, another one for the others."""

    mask: Tensor
    first: Coordinate
    second: Coordinate

    def points(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log dx/dv."""
        (x, slope), (other_x, other_slope) = self.first.points(v), self.second.points(v)
        return torch.where(self.mask, x, other_x), torch.where(self.mask, slope, other_slope)

    def inverse(self, x: Tensor) -> Tensor:
        """Return v."""
        return torch.where(self.mask, self.first.inverse(x), self.second.inverse(x))

    def limits(self) -> tuple[Tensor, Tensor]:
        """Return the ends of v."""
        (low, high), (other_low, other_high) = self.first.limits(), self.second.limits()
        return torch.where(self.mask, low, other_low), torch.where(self.mask, high, other_high)

    def log_distance(self, v: Tensor) -> Tensor:
        """Return that of the coordinate of each integral."""
        return torch.where(self.mask, self.first.log_distance(v), self.second.log_distance(v))


def coordinate(lower: Tensor, upper: Tensor, centre: Tensor, scale: Tensor) -> Coordinate:
    """Return the coordinate of a support, fitted to the mass of a distribution.

    Args:
        lower: the lower end of the support, with its gradient; -inf if there is none.
        upper: the upper end.
        centre: the centre of the mass, detached.
        scale: the width of the mass, detached.
    """
    # 0 and 1 stand for infinite ends, which belong to integrals with another coordinate.
    first, last = torch.where(lower.isfinite(), lower, 0.0), torch.where(upper.isfinite(), upper, 1.0)
    kinds: dict[tuple[bool, bool], Callable[[], Coordinate]] = {
        (True, True): lambda: Shifted(Interval(first, last), *_logit_normal(first, last, centre, scale)),
        (True, False): lambda: Shifted(HalfLine(first, 1), *_log_normal(centre - lower.detach(), scale)),
        (False, True): lambda: Shifted(HalfLine(last, -1), *_log_normal(upper.detach() - centre, scale)),
        (False, False): lambda: Line(centre, scale),
    }
    masks = {kind: (lower.isfinite() == kind[0]) & (upper.isfinite() == kind[1]) for kind in kinds}
    is_present = torch.stack([mask.any() for mask in masks.values()]).tolist()  # one wait on an accelerator
    present = [kind for kind, is_there in zip(masks, is_present, strict=True) if is_there]
    chosen = kinds[present[0]]() if present else Line(centre, scale)
    for kind in present[1:]:
        chosen = Mixed(masks[kind], kinds[kind](), chosen)
    return chosen


def _log_normal(mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of log x, for a LogNormal x of this mean and standard deviation."""
    mean = mean.abs().clamp(1e-290, 1e290)
    log_ratio = 2 * (scale.clamp(1e-290, 1e290).log() - mean.log())
    variance = torch.logaddexp(log_ratio, torch.zeros_like(log_ratio)).clamp_min(1e-24)
    variance = torch.where(log_ratio < -20, log_ratio.exp(), variance)
    return mean.log() - variance / 2, variance.sqrt()


def _logit_normal(lower: Tensor, upper: Tensor, centre: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logit of the centre, and the width of the logit from its slope there."""
    lower, upper = lower.detach(), upper.detach()
    share = ((centre - lower) / (upper - lower)).clamp(1e-6, 1 - 1e-6)
    return share.logit(), (scale / (upper - lower) / (share * (1 - share))).clamp(1e-12, 2.0)


def _log_nearest(end: Tensor) -> Tensor:
    """Return the logarithm of the least distance from an end that float64 resolves."""
    return (end.abs().clamp_min(1e-300).log() + _RESOLUTION).clamp_min(_NEAREST)
