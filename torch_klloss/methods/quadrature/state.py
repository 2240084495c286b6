"""What is known of an integral while it is worked on, and what it is worth so far."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_klloss.methods.quadrature.coordinates import Coordinate, Segment, Shifted, coordinate
from torch_klloss.methods.quadrature.integrand import Integrand
from torch_klloss.methods.quadrature.placement import ends_of
from torch_klloss.methods.quadrature.remainder import remainder
from torch_klloss.methods.quadrature.rules import Rule, Sums, Values, weigh
from torch_klloss.numerics.elementary import e2

STEP = 1.0  # between the four points that tell what lies beyond an end


@dataclass(frozen=True)
class Placement:
    """Hold what fits a coordinate to its lanes, detached, `[*lanes]`."""

    centre: Tensor
    scale: Tensor
    offset: Tensor
    stretch: Tensor

    def coordinate(self, f: Integrand) -> Coordinate:
        """Return the coordinate, live in the ends of the support where gradients are recorded."""
        lower, upper = ends_of(f.measure, f.p, f.lanes)
        if f.is_closed:
            inner: Coordinate = Segment(lower, upper, self.centre, torch.ones_like(self.scale))
        else:
            inner = coordinate(lower, upper, self.centre, self.scale)
        is_moved = (self.offset != 0).any() or (self.stretch != 1).any()
        return Shifted(inner, self.offset, self.stretch) if is_moved else inner

    def select(self, index: Tensor) -> Placement:
        """Return that of some elements of a flat batch."""
        return Placement(*(t[index] for t in vars(self).values()))


@dataclass(frozen=True)
class State:
    """Hold the panels of some elements of the batch, and what they add up to.

    Attributes:
        f: the integrand of these elements.
        index: which elements of the whole batch they are.
        placement: their coordinate.
        rule: where the nodes are.
        ends: the first and the last v, `[2, *lanes]`.
        is_open: where something is left beyond either end, `[2, *lanes]`.
        sums: over the panels.
        rest: what is beyond the ends in either form, in mass and in the gap, and the error of that, `[2, 4, *lanes]`.
        verdict: what is known beforehand, `[*batch]`: see `torch_klloss.methods.quadrature.certificate`.
        slope: of the tail that decides whether the KL is infinite, `[*batch]`.
        values: at the nodes of the rule, for the derivative; None where they are not at hand any more.
    """

    f: Integrand
    index: Tensor
    placement: Placement
    rule: Rule
    ends: Tensor
    is_open: Tensor
    sums: Sums
    rest: Tensor
    verdict: Tensor
    slope: Tensor
    values: Values | None

    def moved(self, offset: int) -> State:
        """Return the state of a part of a batch that begins at `offset`, without the integrand of that part."""
        return replace(self, index=self.index + offset)

    def select(self, index: Tensor) -> State:
        """Return some of the elements of a flat batch."""
        sums = Sums(*(t[:, index] for t in self.sums))
        return State(
            self.f.select(index),
            self.index[index],
            self.placement.select(index),
            self.rule.select(index),
            self.ends[:, index],
            self.is_open[:, index],
            sums,
            self.rest[:, :, index],
            self.verdict[index],
            self.slope[index],
            None if self.values is None else Values(*(t[:, index] for t in self.values)),
        )


def beyond(f: Integrand, place: Coordinate, v: Tensor, is_open: Tensor) -> tuple[Tensor, Tensor]:
    """Return what lies beyond either end where that is open, of the plain form, the near one, the mass and the gap.

    Returns:
        The sums over both ends `[4, *lanes]`, and their errors.
    """
    total, error = (torch.zeros(4, *f.lanes, dtype=v.dtype, device=v.device) for _ in range(2))
    for end, outward, opened in zip(v, (-1, 1), is_open, strict=True):
        steps = torch.arange(-3, 1, device=end.device).reshape(4, *(1,) * end.dim())
        points = end + outward * STEP * steps
        _, mass, log_ratio = weigh(f, place, points, torch.ones_like(end))
        noise = _noise(place, end.unsqueeze(0))
        inside = log_ratio.clamp(-2, 2)
        factors = (log_ratio - 1, e2(-inside), torch.ones_like(mass), torch.expm1(-inside))
        parts, errors = zip(*(remainder(mass, factor, STEP, noise) for factor in factors), strict=True)
        total = total + torch.where(opened, torch.stack(parts), 0.0)
        error = error + torch.where(opened, torch.stack(errors), 0.0)
    return total, error


def _noise(place: Coordinate, v: Tensor) -> Tensor:
    """Return by how much v may be off where x is rounded."""
    x, log_slope = place.points(v)
    return torch.finfo(x.dtype).eps * (x.detach().abs().log() - log_slope.detach()).exp()[0]
