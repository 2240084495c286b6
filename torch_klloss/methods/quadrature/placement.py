"""Placement of the nodes: where a distribution has its mass, and where its density is not smooth."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import (
    Cauchy,
    Distribution,
    Laplace,
    MixtureSameFamily,
    StudentT,
    TransformedDistribution,
    VonMises,
)

from torch_klloss.distributions.supports import bounds_of
from torch_klloss.distributions.tensors import device_of
from torch_klloss.methods.quadrature.coordinates import Coordinate, Segment, Shifted, coordinate
from torch_klloss.methods.quadrature.integrand import Integrand
from torch_klloss.methods.quadrature.rules import ORDER, Panels
from torch_klloss.methods.quadrature.scan import NUM_EVALUATIONS, NUM_POINTS, Scan, scan_support
from torch_klloss.numerics.devices import scalar

_MAX_SCANS = 12
_EXTENT = 8.0  # standard deviations of a component that matter
_NARROW = 3.0  # in v: nodes about a tenth apart might not resolve anything narrower
_GROWTH = 4.0  # of the panels around something narrow
_MAX_STEPS = 24


class Placement(NamedTuple):
    """Parameters that fit a coordinate to the mass of every integral, detached, `[*integrals]`."""

    centre: Tensor
    scale: Tensor
    offset: Tensor
    stretch: Tensor

    def coordinate(self, f: Integrand) -> Coordinate:
        """Return the coordinate; where gradients are recorded, they flow into the ends of the support."""
        lower, upper = ends_of(f.measure, f.p, f.shape)
        inner: Coordinate
        inner = Segment(lower, upper, self.centre) if f.is_closed else coordinate(lower, upper, self.centre, self.scale)
        is_moved = ((self.offset != 0) | (self.stretch != 1)).any()
        return Shifted(inner, self.offset, self.stretch) if is_moved else inner

    def select(self, index: Tensor) -> Placement:
        """Return the placement of some elements of a flat batch."""
        return Placement(*(t[index] for t in self))


def place(f: Integrand) -> tuple[Placement, Scan, int]:
    """Return a placement, its scan, and the number of evaluations.

    The coordinate is fitted to the mean and spread of q, and again to the scan as long as this hardly meets the mass.
    """
    centre, scale = centre_and_scale(f.measure, f.shape, ends_of(f.measure, f.p, f.shape))
    placement = Placement(centre, scale, torch.zeros_like(centre), torch.ones_like(centre))
    for k in range(1, _MAX_SCANS + 1):
        scan = scan_support(f, placement.coordinate(f))
        is_missed = scan.size.amax(0) > 0.5
        if not is_missed.any() or k == _MAX_SCANS:
            break
        middle, width = _peak(scan)
        offset = torch.where(is_missed, placement.offset + placement.stretch * middle, placement.offset)
        stretch = torch.where(is_missed, placement.stretch * width, placement.stretch)
        placement = placement._replace(offset=offset, stretch=stretch)
    return placement, scan, k * NUM_EVALUATIONS


def _peak(scan: Scan) -> tuple[Tensor, Tensor]:
    """Return the v of the largest point, and a width that is small beside the distance of its neighbours."""
    peak = scan.size.argmax(0, keepdim=True)
    v = scan.v.expand_as(scan.size)
    gap = v.gather(0, (peak + 1).clamp_max(NUM_POINTS - 1)) - v.gather(0, (peak - 1).clamp_min(0))
    return v.gather(0, peak)[0], gap[0] / 16


def ends_of(measure: Distribution, p: Distribution, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return the ends of the support of a measure, with their gradients, `[*integrals]`.

    Raises:
        NotImplementedError: if the support is not known to be an interval.
    """
    if isinstance(measure, VonMises) and isinstance(p, VonMises):  # periodic: the circle may be cut anywhere
        opposite = measure.loc.detach() - torch.pi
        return opposite.expand(shape), (opposite + 2 * torch.pi).expand(shape)
    bounds = bounds_of(measure)
    if bounds is None:
        raise NotImplementedError(f"the support of {type(measure).__name__} is not known to be an interval.")
    device = device_of(measure)
    lower, upper = (scalar(end, device, torch.float64).expand(shape) for end in (bounds.lower, bounds.upper))
    return lower, upper


def centre_and_scale(d: Distribution, shape: torch.Size, ends: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation where they are finite, else location and scale, else a guess."""
    if type(d) is TransformedDistribution and (moved := _moved_centre_and_scale(d, shape)) is not None:
        return moved
    lower, upper = (end.detach() for end in ends)
    inner = torch.where(upper.isfinite(), (lower + upper) / 2, lower + 1)
    inner = torch.where(lower.isfinite(), inner, torch.where(upper.isfinite(), upper - 1, 0.0))
    width = torch.where(lower.isfinite() & upper.isfinite(), (upper - lower) / 3, 1.0)
    mean, stddev, loc, scale = (_property_or_nan(d, name, shape) for name in ("mean", "stddev", "loc", "scale"))
    usable = mean.isfinite() & stddev.isfinite() & (stddev > 0) & (mean > lower) & (mean < upper)
    known = loc.isfinite() & (scale > 0) & scale.isfinite() & (loc > lower) & (loc < upper)
    centre = torch.where(usable, mean, torch.where(known, loc, inner))
    return centre, torch.where(usable, stddev, torch.where(scale > 0, scale, width))


def _moved_centre_and_scale(d: TransformedDistribution, shape: torch.Size) -> tuple[Tensor, Tensor] | None:
    """Return the image of the centre of d's base, and half the distance between the images of the points around it."""
    if bounds_of(d.base_dist) is None:
        return None
    centre, scale = centre_and_scale(d.base_dist, shape, ends_of(d.base_dist, d.base_dist, shape))
    lower, upper = (end.detach() for end in ends_of(d.base_dist, d.base_dist, shape))
    points = [torch.maximum(torch.minimum(centre + k * scale, upper), lower) for k in (-1, 0, 1)]
    for t in d.transforms:
        points = [t(point) for point in points]
    low, middle, high = (point.detach() for point in points)
    width = (high - low).abs() / 2
    is_usable = middle.isfinite() & width.isfinite() & (width > 0)
    return (middle, width) if bool(is_usable.all()) else None


def _property_or_nan(d: Distribution, name: str, shape: torch.Size) -> Tensor:
    """Return a property of d in float64, detached; NaN if d lacks it."""
    try:
        value = getattr(d, name)
    except (AttributeError, NotImplementedError):
        value = torch.nan
    return scalar(value, device_of(d), torch.float64).detach().expand(shape)


def panels_of(f: Integrand, coordinate: Coordinate, scan: Scan, num_nodes: int) -> Panels:
    """Return about num_nodes / ORDER panels whose edges include every kink of q and p and every peak of p."""
    points = split_points(f, coordinate)
    if isinstance(f.p, (Cauchy, StudentT)):  # smooth, but with a peak that a scan may miss
        points = torch.cat([points, _in_v(f, coordinate, [f.per_integral(f.p.loc)])])
    edges = scan.edges(max(1, num_nodes // ORDER - len(points)))
    if len(points):
        inside = torch.where(points.isnan(), edges[0], points).clamp(edges[0], edges[-1])
        edges = torch.cat([edges, inside]).sort(0).values
    return Panels(torch.stack([edges[:-1], edges[1:]]))


def split_points(f: Integrand, coordinate: Coordinate) -> Tensor:
    """Return the v of the kinks of q and p, and of the borders of their narrow components, `[points, *integrals]`.

    NaN where an integral does not need the point.
    """
    kinks = [f.per_integral(each) for d in (f.q, f.p) for each in kinks_of(d)]
    if f.is_mixture:
        kinks += kinks_of(f.measure)
    points = [_in_v(f, coordinate, kinks)]
    for centre, scale in (each for d in (f.q, f.p) for each in components_of(d)):
        points.append(_around(f, coordinate, centre, scale))
    return torch.cat(points)


def _around(f: Integrand, coordinate: Coordinate, centre: Tensor, scale: Tensor) -> Tensor:
    """Return the v of the borders of a component if it is narrow, and of steps that grow up to the size of a panel.

    Far out of a narrow component log p may still follow its tail, up to where another component is larger.
    """
    v = _in_v(f, coordinate, [f.per_integral(centre + k * _EXTENT * scale) for k in (-1, 0, 1)])
    width = v[2] - v[0]
    is_narrow = width < _NARROW
    if not is_narrow.any():
        return v[:0]
    least = width[is_narrow & (width > 0)]
    num_steps = math.ceil(math.log(_NARROW / float(least.min()), _GROWTH)) if len(least) else 0
    steps = [sign * _EXTENT * _GROWTH**k for k in range(1, min(num_steps, _MAX_STEPS) + 1) for sign in (-1, 1)]
    more = _in_v(f, coordinate, [f.per_integral(centre + k * scale) for k in steps])
    v = torch.cat([v, torch.where((more - v[1]).abs() < _NARROW, more, torch.nan)])
    return torch.where(is_narrow, v, torch.nan)


def _in_v(f: Integrand, coordinate: Coordinate, x: list[Tensor]) -> Tensor:
    if not x:
        return torch.zeros(0, *f.shape, dtype=torch.float64, device=device_of(f.q))
    return coordinate.inverse(torch.stack([each.detach().double().expand(f.shape) for each in x]))


def kinks_of(d: Distribution) -> list[Tensor]:
    """Return the points `[*batch]` where the log-density of d has a kink, with those that d declares."""
    if isinstance(d, Laplace):
        return [d.loc]
    declared = getattr(d, "breakpoints", None)
    if isinstance(declared, Tensor):
        return list(declared)
    if isinstance(d, MixtureSameFamily):
        return _component_kinks(d)
    if isinstance(d, TransformedDistribution):
        kinks = kinks_of(d.base_dist)
        for transform in d.transforms:
            kinks = [transform(kink) for kink in kinks]
        return kinks
    return []


def _component_kinks(d: MixtureSameFamily) -> list[Tensor]:
    """Return the points where components have kinks, begin or end."""
    components = d.component_distribution
    bounds = bounds_of(components)
    ends = () if bounds is None else (bounds.lower, bounds.upper)
    points = kinks_of(components) + [end for end in ends if isinstance(end, Tensor)]
    return [each for point in points for each in point.expand(components.batch_shape).unbind(-1)]


def components_of(d: Distribution) -> list[tuple[Tensor, Tensor]]:
    """Return centre and scale `[*batch]` of every component of a mixture; nothing for other distributions."""
    if not isinstance(d, MixtureSameFamily):
        return []
    components = d.component_distribution
    if bounds_of(components) is None:
        return []
    ends = ends_of(components, components, components.batch_shape)
    centre, scale = centre_and_scale(components, components.batch_shape, ends)
    return list(zip(centre.unbind(-1), scale.unbind(-1), strict=True))
