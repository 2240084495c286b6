"""The solver of one-dimensional integrals: place, scan, sum, refine, certify."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from torch_klloss.methods.quadrature.certificate import Certificate, certify
from torch_klloss.methods.quadrature.integrand import Integrand
from torch_klloss.methods.quadrature.placement import panels_of, place, split_points
from torch_klloss.methods.quadrature.remainder import tail_integrals
from torch_klloss.methods.quadrature.rules import STRAIGHT, Panels, Rule, Sums, Trapezoid, integrate
from torch_klloss.methods.quadrature.scan import BEND, NEGLIGIBLE, Scan
from torch_klloss.methods.quadrature.state import FINITE, State, status_of

_BUDGET = 40  # evaluations that halving may take, in units of num_nodes
_FAR = 4.0  # in v
_AIM = 0.25  # of the tolerance


def solve(f: Integrand, index: Tensor, num_nodes: int, rtol: float) -> Iterator[Certificate]:
    """Yield certificates that cover the batch, each for the elements that took the same number of refinements."""
    state, scan = start(f, index, num_nodes)
    while True:
        certificate = certify(state)
        is_open = ~certificate.is_settled & (state.status == FINITE)
        is_coarse = is_open & (certificate.errors["panels"] > _tolerance(certificate, rtol))
        if not is_coarse.any() or state.evaluations > _BUDGET * num_nodes:
            yield certificate
            return
        if f.is_flat and not is_coarse.all():
            yield certify(state.select((~is_coarse).nonzero()[:, 0]))
            rest = is_coarse.nonzero()[:, 0]
            state, scan = state.select(rest), scan.select(rest)
        if isinstance(state.rule, Panels):
            state = halve(certify(state), state.rule, rtol)
        else:
            state = with_panels(state, scan, num_nodes)


def _tolerance(certificate: Certificate, rtol: float) -> Tensor:
    """Return the error that the panels of each batch element may have."""
    return _AIM * rtol * certificate.value.abs() + 1e-30


def start(f: Integrand, index: Tensor, num_nodes: int) -> tuple[State, Scan]:
    """Return the state after the first sum, and the scan of the whole support."""
    placement, scan, evaluations = place(f)
    coordinate = placement.coordinate(f)
    status, slope = status_of(f, coordinate, scan)
    is_open = (not f.is_closed) & (scan.size[[0, -1]] > NEGLIGIBLE)
    ends = scan.v[[0, -1]].expand_as(is_open) if f.is_closed else BEND * scan.ends.sinh()
    tails = torch.zeros(2, 4, *f.shape, dtype=torch.float64, device=ends.device)
    if is_open.any():
        tails = torch.stack(tail_integrals(f, coordinate, ends, is_open))
        evaluations += 10
    is_smooth = f.is_periodic or not (f.is_closed or is_open.any() or len(split_points(f, coordinate)))
    rule = _trapezoid(f, ends, num_nodes) if is_smooth else panels_of(f, coordinate, scan, num_nodes)
    values, sums = integrate(f, coordinate, rule)
    evaluations += rule.num_nodes
    return State(f, index, placement, rule, ends, is_open, sums, tails, status, slope, values, evaluations), scan


def _trapezoid(f: Integrand, ends: Tensor, num_nodes: int) -> Rule:
    """Return the trapezoidal rule, even in v unless it reaches far; on the circle the two ends are one point."""
    low, high = ends
    high = high - (high - low) / num_nodes if f.is_periodic else high
    ends = torch.stack([low, high])
    bend = torch.where(ends.abs().amax(0) > _FAR, 2.5, STRAIGHT)
    t = ends / bend
    return Trapezoid(torch.where(bend == STRAIGHT, t, t.asinh()), bend, num_nodes)


def with_panels(state: State, scan: Scan, num_nodes: int) -> State:
    """Return the state with panels in place of the trapezoidal rule."""
    coordinate = state.placement.coordinate(state.f)
    rule = panels_of(state.f, coordinate, scan, num_nodes)
    values, sums = integrate(state.f, coordinate, rule)
    return replace(state, rule=rule, sums=sums, values=values, evaluations=state.evaluations + rule.num_nodes)


def halve(certificate: Certificate, rule: Panels, rtol: float) -> State:
    """Return the state with those panels halved whose error is above their share of the tolerance.

    In every integral as many are halved as in the worst.
    """
    state, is_near = certificate.state, certificate.is_near
    f, edges = state.f, rule.edges
    error = torch.where(f.per_integral(is_near), state.sums.near_error, state.sums.plain_error)
    tolerance = f.per_integral(_tolerance(certificate, rtol))
    share = tolerance / (2 * error.shape[0] * (f.shape[-1] if f.is_mixture else 1))
    count = int((error > share).sum(0).max())
    order = error.argsort(0, descending=True)
    kept, split = order[count:], order[:count]
    low, high = edges[0].gather(0, split), edges[1].gather(0, split)
    middle = (low + high) / 2
    halves = Panels(torch.stack([torch.cat([low, middle]), torch.cat([middle, high])]))
    _, added = integrate(f, state.placement.coordinate(f), halves, is_near)
    sums = Sums(*(torch.cat([old.gather(0, kept), new]) for old, new in zip(state.sums, added, strict=True)))
    edges = torch.stack([torch.cat([old.gather(0, kept), new]) for old, new in zip(edges, halves.edges, strict=True)])
    evaluations = state.evaluations + halves.num_nodes
    return replace(state, rule=Panels(edges), sums=sums, values=None, evaluations=evaluations)
