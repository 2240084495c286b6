"""Coordinates in which an integral over a support becomes one over v, with the integrand falling off at both ends.

Close to an end of the support, and far out on an infinite one, v is the logarithm of the distance: powers become
exponentials there, which a Gauss rule integrates to rounding, and every scale that float64 has is within reach.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_FARTHEST = 150 * math.log(10)  # the square of 1e150 is still a float64
_FAR = 300.0  # in units of the scale, e^300
_NEAREST = -300 * math.log(10)
_RESOLUTION = -34 * math.log(2)  # nearer to an end other than 0, a float64 has not the digits to say how near


class Coordinate(Protocol):
    """A map from v to points x of a support, per lane; its own numbers broadcast to `[*lanes]`."""

    def points(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log dx/dv; both are live in the ends of the support."""
        ...

    def inverse(self, x: Tensor) -> Tensor:
        """Return v; infinite, or not a number, outside of the support."""
        ...

    def limits(self) -> tuple[Tensor, Tensor]:
        """Return the least and the greatest v that float64 can follow."""
        ...


@dataclass(frozen=True)
class Line:
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
class HalfLine:
    """x = end + sign exp(middle + width v)."""

    end: Tensor
    sign: int
    middle: Tensor
    width: Tensor

    def points(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log dx/dv, of the distance that x has after rounding."""
        distance = (self.middle + self.width * v).exp()
        x = self.end + self.sign * distance
        return x, (self.sign * (x - self.end)).log() + self.width.log()

    def inverse(self, x: Tensor) -> Tensor:
        """Return v."""
        return ((self.sign * (x - self.end)).log() - self.middle) / self.width

    def limits(self) -> tuple[Tensor, Tensor]:
        """Return the ends of v."""
        nearest = _log_nearest(self.end.detach())
        return (nearest - self.middle) / self.width, (_FARTHEST - self.middle) / self.width


@dataclass(frozen=True)
class Interval:
    """x = lower + (upper - lower) sigmoid(middle + width v)."""

    lower: Tensor
    upper: Tensor
    middle: Tensor
    width: Tensor

    def points(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log dx/dv, of the distances that x has after rounding."""
        logit, length = self.middle + self.width * v, self.upper - self.lower
        x = torch.where(logit < 0, self.lower + length * logit.sigmoid(), self.upper - length * (-logit).sigmoid())
        return x, (x - self.lower).log() + (self.upper - x).log() - length.log() + self.width.log()

    def inverse(self, x: Tensor) -> Tensor:
        """Return v."""
        return ((x - self.lower).log() - (self.upper - x).log() - self.middle) / self.width

    def limits(self) -> tuple[Tensor, Tensor]:
        """Return the ends of v."""
        length = (self.upper - self.lower).detach().log()
        nearest, farthest = (_log_nearest(end.detach()) - length for end in (self.lower, self.upper))
        return (nearest - self.middle) / self.width, (-farthest - self.middle) / self.width


@dataclass(frozen=True)
class Segment:
    """x = centre + scale v, of a density that does not vanish at the ends of its support."""

    lower: Tensor
    upper: Tensor
    centre: Tensor
    scale: Tensor

    def points(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log dx/dv."""
        return self.centre + self.scale * v, self.scale.log().expand_as(v)

    def inverse(self, x: Tensor) -> Tensor:
        """Return v."""
        return (x - self.centre) / self.scale

    def limits(self) -> tuple[Tensor, Tensor]:
        """Return the ends of v."""
        return self.inverse(self.lower), self.inverse(self.upper)


@dataclass(frozen=True)
class Shifted:
    """v of another coordinate is offset + stretch v."""

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


@dataclass(frozen=True)
class Mixed:
    """One coordinate for some lanes and another one for the others."""

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


def coordinate(lower: Tensor, upper: Tensor, centre: Tensor, scale: Tensor) -> Coordinate:
    """Return the coordinate of a support, fitted to where a distribution has its mass.

    Args:
        lower: the lower end of the support, live, infinite where there is none.
        upper: the upper end.
        centre: where the mass is, detached.
        scale: how wide it is, detached.
    """
    kinds: dict[tuple[bool, bool], Callable[[], Coordinate]] = {
        (True, True): lambda: Interval(*_finite(lower, upper), *_logit_normal(lower, upper, centre, scale)),
        (True, False): lambda: HalfLine(_finite(lower, upper)[0], 1, *_log_normal(centre - lower.detach(), scale)),
        (False, True): lambda: HalfLine(_finite(lower, upper)[1], -1, *_log_normal(upper.detach() - centre, scale)),
        (False, False): lambda: Line(centre, scale),
    }
    masks = {kind: (lower.isfinite() == kind[0]) & (upper.isfinite() == kind[1]) for kind in kinds}
    present = [kind for kind, mask in masks.items() if mask.any()]
    chosen = kinds[present[0]]() if present else Line(centre, scale)
    for kind in present[1:]:
        chosen = Mixed(masks[kind], kinds[kind](), chosen)
    return chosen


def _finite(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Replace infinite ends, which belong to lanes of another coordinate."""
    return torch.where(lower.isfinite(), lower, 0.0), torch.where(upper.isfinite(), upper, 1.0)


def _log_normal(mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the logarithm, were it Normal."""
    mean = mean.abs().clamp(1e-290, 1e290)
    log_ratio = 2 * (scale.clamp(1e-290, 1e290).log() - mean.log())
    variance = torch.logaddexp(log_ratio, torch.zeros_like(log_ratio)).clamp_min(1e-24)
    variance = torch.where(log_ratio < -20, log_ratio.exp(), variance)
    return mean.log() - variance / 2, variance.sqrt()


def _logit_normal(lower: Tensor, upper: Tensor, centre: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centre of the logit, and its width by the slope there."""
    lower, upper = (end.detach() for end in _finite(lower, upper))
    share = ((centre - lower) / (upper - lower)).clamp(1e-6, 1 - 1e-6)
    return share.logit(), (scale / (upper - lower) / (share * (1 - share))).clamp(1e-12, 2.0)


def _log_nearest(end: Tensor) -> Tensor:
    """Return the logarithm of the least distance from an end that float64 resolves."""
    return (end.abs().clamp_min(1e-300).log() + _RESOLUTION).clamp_min(_NEAREST)
