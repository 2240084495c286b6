"""The value of an integral whose nodes are known, live in the parameters of q and p."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_klloss.distributions.supports import has_moving_support
from torch_klloss.methods.quadrature.certificate import Judgement, plain_lanes
from torch_klloss.methods.quadrature.coordinates import Coordinate
from torch_klloss.methods.quadrature.integrand import Integrand
from torch_klloss.methods.quadrature.rules import weigh
from torch_klloss.methods.quadrature.state import State, beyond
from torch_klloss.numerics.elementary import e2

Outcome = tuple[State, Judgement]


def with_gradient(f: Integrand, outcomes: Sequence[Outcome], value: Tensor) -> Tensor:
    """Return the flat KL again, live in the parameters; where it is infinite or NaN its derivative is 0."""
    if not f.is_flat:
        ((state, judgement),) = outcomes
        return torch.where(judgement.is_settled, judgement.value, value_of(f, state, judgement)).flatten()
    leaves: list[tuple[Tensor, Tensor]] = []
    f.select(torch.zeros(0, dtype=torch.long, device=value.device), leaves)
    return _Recomputed.apply(value, f, _unsettled(outcomes), *(t for t, _ in leaves)) if leaves else value


def _unsettled(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return what is left of the outcomes without the elements whose value is infinite or NaN."""
    left = []
    for state, judgement in outcomes:
        index = (~judgement.is_settled).nonzero()[:, 0]
        if len(index) == len(judgement.is_settled):
            left.append((state, judgement))
        elif len(index):
            left.append((state.select(index), judgement.select(index)))
    return left


def value_of(f: Integrand, state: State, judgement: Judgement) -> Tensor:
    """Return the KL `[*batch]` in the form that was chosen.

    The nodes are held fixed in v, so that they move with the ends of the support and with nothing else.
    """
    coordinate = state.placement.coordinate(f)
    v, weights = _nodes(f, coordinate, state)
    _, mass, log_ratio = weigh(f, coordinate, v, weights)
    is_near = judgement.is_near
    plain, lane_mass = (mass * (log_ratio - 1)).sum(0), mass.sum(0)
    rest = beyond(f, coordinate, state.ends, state.is_open)[0] if state.is_open.any() else None
    if rest is not None:
        plain, lane_mass = plain + rest[0], lane_mass + rest[2]
    value = f.total(plain_lanes(plain, lane_mass, f.lane_mass()))
    if is_near.any():
        near = (mass * e2(-log_ratio.clamp(-2, 2))).sum(0)
        near = f.total(near if rest is None else near + rest[1])
        if has_moving_support(f.q) or has_moving_support(f.p):
            # p's mass over the nodes, which the near form counts on to be 1, moves with them.
            near = near.detach() + value - value.detach()
        value = torch.where(is_near, near, value)
    return value


def _live(
    f: Integrand, state: State, judgement: Judgement, grad: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return what depends on the parameters, and the derivatives of the value by that.

    Where the nodes are fixed and their values at hand, that is the log-densities alone.
    """
    moves = has_moving_support(f.q) or has_moving_support(f.p) or bool(state.is_open.any())
    if moves or state.values is None or bool(state.sums.is_holed.any()):
        return (value_of(f, state, judgement),), (grad,)
    x, mass, log_ratio = state.values
    c = (mass * log_ratio).sum(0) / mass.sum(0)
    by_mass, by_ratio = mass * (log_ratio - 1 - c), mass
    is_near = f.per_lane(judgement.is_near).expand(f.lanes)
    if is_near.any():
        by_mass = torch.where(is_near, mass * e2(-log_ratio), by_mass)
        by_ratio = torch.where(is_near, -mass * torch.expm1(-log_ratio), by_ratio)
    grad = f.per_lane(grad)
    outputs, weights = f.densities(x), (grad * by_mass, grad * by_ratio)
    known = f.lane_mass()
    if isinstance(known, Tensor):
        by_known = torch.where(is_near, 0.0, grad * (1 + c))
        return (*outputs, known), (*weights, by_known)
    return outputs, weights


@torch.no_grad()
def _nodes(f: Integrand, coordinate: Coordinate, state: State) -> tuple[Tensor, Tensor]:
    """Return nodes and weights, those without mass moved to where most is: a NaN derivative survives a weight of 0."""
    v, weights = state.rule.nodes()
    if not state.sums.is_holed.any():
        return v, weights
    mass = weigh(f, coordinate, v, weights).mass
    fullest = v.gather(0, mass.argmax(0, keepdim=True))
    return torch.where(mass == 0, fullest, v), torch.where(mass == 0, 0.0, weights)


class _Recomputed(torch.autograd.Function):
    """A value that is known already, and whose derivative is computed when it is asked for, part by part."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, f: Integrand, outcomes: Sequence[Outcome], *tensors: Tensor) -> Tensor:
        """Return the value; the tensors are those of f that need a gradient, in the order of `Integrand.select`."""
        ctx.f, ctx.outcomes = f, outcomes
        ctx.save_for_backward(*tensors)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the derivatives to the tensors."""
        (grad,) = grads
        if torch.is_grad_enabled():  # somebody wants to differentiate again
            parts = [value_of(ctx.f.select(state.index), state, judgement) for state, judgement in ctx.outcomes]
            grads = tuple(grad[state.index] for state, _ in ctx.outcomes)
            found = torch.autograd.grad(parts, ctx.saved_tensors, grads, create_graph=True, allow_unused=True)
            return None, None, None, *found
        totals = [torch.zeros_like(t) for t in ctx.saved_tensors]
        for state, judgement in ctx.outcomes:
            leaves: list[tuple[Tensor, Tensor]] = []
            part = ctx.f.select(state.index, leaves)
            with torch.enable_grad():
                outputs, weights = _live(part, state, judgement, grad[state.index])
            found = torch.autograd.grad(outputs, [leaf for _, leaf in leaves], weights, allow_unused=True)
            for total, each in zip(totals, found, strict=True):
                if each is not None:
                    total[state.index] = each
        return None, None, None, *totals
