"""torch_klloss/methods/quadrature/splits.py."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_klloss.distributions.tensors import device_of
from torch_klloss.methods.quadrature.coordinates import Coordinate
from torch_klloss.methods.quadrature.integrand import Integrand
from torch_klloss.methods.quadrature.placement import components_of, kinks_of, peaks_of
from torch_klloss.methods.quadrature.rules import ORDER, Panels
from torch_klloss.methods.quadrature.scan import Scan

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
