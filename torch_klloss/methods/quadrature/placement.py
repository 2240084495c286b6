"""Where a distribution has its mass, told by what it says of itself; and where its density is not smooth."""

from __future__ import annotations

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
from torch_klloss.methods.quadrature.coordinates import Coordinate
from torch_klloss.methods.quadrature.integrand import Integrand
from torch_klloss.methods.quadrature.rules import ORDER, Panels
from torch_klloss.methods.quadrature.scan import Scan


def ends_of(measure: Distribution, p: Distribution, lanes: torch.Size) -> tuple[Tensor, Tensor]:
    """Return the ends of the support of a measure, live, `[*lanes]`.

    Raises:
        NotImplementedError: if it is not known to be an interval.
    """
    if isinstance(measure, VonMises) and isinstance(p, VonMises):  # periodic: the circle may be cut anywhere
        opposite = measure.loc.detach() - torch.pi
        return opposite.expand(lanes), (opposite + 2 * torch.pi).expand(lanes)
    bounds = bounds_of(measure)
    if bounds is None:
        raise NotImplementedError(f"the support of {type(measure).__name__} is not known to be an interval.")
    lower, upper = (torch.as_tensor(end, dtype=torch.float64).expand(lanes) for end in (bounds.lower, bounds.upper))
    return lower, upper


def centre_and_scale(d: Distribution, lanes: torch.Size, ends: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation where they are finite, else location and scale, else a guess."""
    lower, upper = (end.detach() for end in ends)
    inner = torch.where(upper.isfinite(), (lower + upper) / 2, lower + 1)
    inner = torch.where(lower.isfinite(), inner, torch.where(upper.isfinite(), upper - 1, 0.0))
    width = torch.where(lower.isfinite() & upper.isfinite(), (upper - lower) / 3, 1.0)
    mean, stddev = _said(d, "mean", lanes), _said(d, "stddev", lanes)
    loc, scale = _said(d, "loc", lanes), _said(d, "scale", lanes)
    usable = mean.isfinite() & stddev.isfinite() & (stddev > 0) & (mean > lower) & (mean < upper)
    known = loc.isfinite() & (scale > 0) & scale.isfinite() & (loc > lower) & (loc < upper)
    centre = torch.where(usable, mean, torch.where(known, loc, inner))
    return centre, torch.where(usable, stddev, torch.where(scale > 0, scale, width))


def kinks_of(d: Distribution) -> list[Tensor]:
    """Return the points `[*batch]` where the log-density of d has a kink, those that d declares itself included."""
    if isinstance(d, Laplace):
        return [d.loc]
    declared = getattr(d, "breakpoints", None)
    if isinstance(declared, Tensor):
        return list(declared)
    if isinstance(d, MixtureSameFamily):
        return _mixture_features(d)
    if isinstance(d, TransformedDistribution):
        kinks = kinks_of(d.base_dist)
        for transform in d.transforms:
            kinks = [transform(kink) for kink in kinks]
        return kinks
    return []


def peaks_of(d: Distribution) -> list[Tensor]:
    """Return the points `[*batch]` where the log-density of d has a peak that no scan may meet, though it is smooth."""
    return [d.loc] if isinstance(d, (Cauchy, StudentT)) else []


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


def _mixture_features(d: MixtureSameFamily) -> list[Tensor]:
    """Return where the components have kinks, begin and end."""
    components = d.component_distribution
    bounds = bounds_of(components)
    features = kinks_of(components)
    for end in () if bounds is None else (bounds.lower, bounds.upper):
        if isinstance(end, Tensor):
            features.append(end)
    return [each for feature in features for each in feature.expand(components.batch_shape).unbind(-1)]


def _said(d: Distribution, name: str, lanes: torch.Size) -> Tensor:
    """Return a property of d; NaN where it has none."""
    try:
        said = getattr(d, name)
    except (AttributeError, NotImplementedError):
        said = torch.nan
    return torch.as_tensor(said, dtype=torch.float64).detach().expand(lanes)


_EXTENT = 8.0  # standard deviations of a component that matter
_NARROW = 3.0  # in v: narrower, and nodes about a tenth apart might not resolve it


def panels_of(f: Integrand, coordinate: Coordinate, seen: Scan, num_nodes: int) -> Panels:
    """Return about num_nodes / ORDER panels that have among their edges wherever q or p is not smooth, or peaked."""
    points = split_points(f, coordinate)
    if peaks := peaks_of(f.p):
        points = torch.cat([points, _in_v(f, coordinate, [f.per_lane(each) for each in peaks])])
    edges = seen.edges(max(1, num_nodes // ORDER - len(points)))
    if len(points):
        inside = torch.where(points.isnan(), edges[0], points).clamp(edges[0], edges[-1])
        edges = torch.cat([edges, inside]).sort(0).values
    return Panels(torch.stack([edges[:-1], edges[1:]]))


def split_points(f: Integrand, coordinate: Coordinate) -> Tensor:
    """Return the v of the kinks of q and p, and of the borders of their narrow components, `[points, *lanes]`.

    NaN where a lane does not need the point.
    """
    kinks = [f.per_lane(each) for d in (f.q, f.p) for each in kinks_of(d)]
    if f.is_mixture:
        kinks += kinks_of(f.measure)
    points = [_in_v(f, coordinate, kinks)]
    for centre, scale in (each for d in (f.q, f.p) for each in components_of(d)):
        around = [f.per_lane(centre + k * scale) for k in (-_EXTENT, 0, _EXTENT)]
        v = _in_v(f, coordinate, around)
        is_narrow = v[2] - v[0] < _NARROW
        if is_narrow.any():
            points.append(torch.where(is_narrow, v, torch.nan))
    return torch.cat(points)


def _in_v(f: Integrand, coordinate: Coordinate, x: list[Tensor]) -> Tensor:
    if not x:
        return torch.zeros(0, *f.lanes, dtype=torch.float64, device=device_of(f.q))
    return coordinate.inverse(torch.stack([each.detach().double().expand(f.lanes) for each in x]))
