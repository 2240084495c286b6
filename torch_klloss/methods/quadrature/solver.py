"""The way of a one-dimensional integral: placed, scanned, summed, halved where that is not enough, and judged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from torch_klloss.methods.quadrature.certificate import FINITE, Judgement, judge, verdict_of
from torch_klloss.methods.quadrature.integrand import Integrand
from torch_klloss.methods.quadrature.placement import centre_and_scale, ends_of, panels_of, split_points
from torch_klloss.methods.quadrature.rules import STRAIGHT, Panels, Rule, Sums, Trapezoid, integrate, weigh
from torch_klloss.methods.quadrature.scan import BEND, NEGLIGIBLE, NUM_EVALUATIONS, NUM_POINTS, Scan, scan
from torch_klloss.methods.quadrature.state import Placement, State, beyond

_BUDGET = 40  # evaluations that halving may take, in units of num_nodes
_MAX_SCANS = 12
_FAR = 4.0  # in v
_AIM = 0.25  # of the tolerance


def solve(f: Integrand, num_nodes: int, rtol: float) -> Iterator[tuple[State, Judgement, int]]:
    """Yield the elements of the batch, those that took the same panels together, and how many points they took."""
    state, seen, evaluations = start(f, num_nodes)
    while True:
        judgement = judge(state)
        todo = _is_to_do(state, judgement, rtol)
        if not todo.any() or evaluations > _BUDGET * num_nodes:
            yield state, judgement, evaluations
            return
        if f.is_flat and not todo.all():
            done = state.select((~todo).nonzero()[:, 0])
            yield done, judge(done), evaluations
            rest = todo.nonzero()[:, 0]
            state, seen = state.select(rest), seen.select(rest)
        if isinstance(state.rule, Panels):
            state, added = halve(state, state.rule, judge(state), rtol)
        else:
            state, added = with_panels(state, seen, num_nodes)
        evaluations += added


def _is_to_do(state: State, judgement: Judgement, rtol: float) -> Tensor:
    return (
        ~judgement.is_settled
        & (state.verdict == FINITE)
        & (judgement.errors["panels"] > _AIM * rtol * judgement.value.abs() + 1e-30)
    )


def start(f: Integrand, num_nodes: int) -> tuple[State, Scan, int]:
    """Place the nodes, look at the whole support, and take the first sum."""
    place, seen, evaluations = placed(f)
    coordinate = place.coordinate(f)
    verdict, slope = verdict_of(f, coordinate, seen)
    is_open = (not f.is_closed) & (seen.size[[0, -1]] > NEGLIGIBLE)
    ends = seen.v[[0, -1]].expand_as(is_open) if f.is_closed else BEND * seen.ends.sinh()
    rest = torch.zeros(2, 4, *f.lanes, dtype=torch.float64, device=ends.device)
    if is_open.any():
        rest = torch.stack(beyond(f, coordinate, ends, is_open))
        evaluations += 8
    is_smooth = f.is_periodic or not (f.is_closed or is_open.any() or len(split_points(f, coordinate)))
    rule = _trapezoid(f, ends, num_nodes) if is_smooth else panels_of(f, coordinate, seen, num_nodes)
    index = torch.arange(f.batch_shape.numel(), device=ends.device).reshape(f.batch_shape)
    values = weigh(f, coordinate, *rule.nodes())
    sums = integrate(f, values, rule)
    state = State(f, index, place, rule, ends, is_open, sums, rest, verdict, slope, values)
    return state, seen, evaluations + rule.count


def _trapezoid(f: Integrand, ends: Tensor, num_nodes: int) -> Rule:
    """Return the trapezoidal rule, even in v unless that is to reach far; on the circle the two ends are one point."""
    low, high = ends
    high = high - (high - low) / num_nodes if f.is_periodic else high
    ends = torch.stack([low, high])
    bend = torch.where(ends.abs().amax(0) > _FAR, 2.5, STRAIGHT)
    t = ends / bend
    return Trapezoid(torch.where(bend == STRAIGHT, t, t.asinh()), bend, num_nodes)


def with_panels(state: State, seen: Scan, num_nodes: int) -> tuple[State, int]:
    """Return the state with panels in place of the one rule that did not do, and how many nodes they have."""
    coordinate = state.placement.coordinate(state.f)
    rule = panels_of(state.f, coordinate, seen, num_nodes)
    values = weigh(state.f, coordinate, *rule.nodes())
    return replace(state, rule=rule, sums=integrate(state.f, values, rule), values=values), rule.count


def placed(f: Integrand) -> tuple[Placement, Scan, int]:
    """Fit a coordinate to what q says of itself, and fit it anew as long as the scan hardly meets the mass."""
    centre, scale = centre_and_scale(f.measure, f.lanes, ends_of(f.measure, f.p, f.lanes))
    place = Placement(centre, scale, torch.zeros_like(centre), torch.ones_like(centre))
    for k in range(1, _MAX_SCANS + 1):
        seen = scan(f, place.coordinate(f))
        is_missed = seen.size.amax(0) > 0.5
        if not is_missed.any() or k == _MAX_SCANS:
            break
        middle, width = _moments(seen)
        offset = torch.where(is_missed, place.offset + place.stretch * middle, place.offset)
        place = replace(place, offset=offset, stretch=torch.where(is_missed, place.stretch * width, place.stretch))
    return place, seen, k * NUM_EVALUATIONS


def _moments(seen: Scan) -> tuple[Tensor, Tensor]:
    """Return where the largest point is in v, and a width that is small beside the distance of its neighbours."""
    peak = seen.size.argmax(0, keepdim=True)
    v = seen.v.expand_as(seen.size)
    gap = v.gather(0, (peak + 1).clamp_max(NUM_POINTS - 1)) - v.gather(0, (peak - 1).clamp_min(0))
    return v.gather(0, peak)[0], gap[0] / 16


def halve(state: State, rule: Panels, judgement: Judgement, rtol: float) -> tuple[State, int]:
    """Halve the panels whose error is above their share of the tolerance, in every lane as many as in the worst."""
    f, edges = state.f, rule.edges
    error = torch.where(f.per_lane(judgement.is_near), state.sums.near_error, state.sums.plain_error)
    tolerance = f.per_lane(_AIM * rtol * judgement.value.abs() + 1e-30)
    share = tolerance / (2 * error.shape[0] * (f.lanes[-1] if f.is_mixture else 1))
    count = int((error > share).sum(0).max())
    order = error.argsort(0, descending=True)
    kept, split = order[count:], order[:count]
    low, high = edges[0].gather(0, split), edges[1].gather(0, split)
    middle = (low + high) / 2
    halves = torch.stack([torch.cat([low, middle]), torch.cat([middle, high])])
    new = Panels(halves)
    added = integrate(f, weigh(f, state.placement.coordinate(f), *new.nodes()), new, judgement.is_near)
    sums = Sums(*(torch.cat([old.gather(0, kept), more]) for old, more in zip(state.sums, added, strict=True)))
    edges = torch.stack([torch.cat([old.gather(0, kept), more]) for old, more in zip(edges, halves, strict=True)])
    return replace(state, rule=Panels(edges), sums=sums, values=None), new.count
