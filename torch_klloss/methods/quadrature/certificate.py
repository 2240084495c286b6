"""What a sum over nodes is worth: the checks that it has to pass, and what is said where it does not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_klloss.distributions.supports import contained
from torch_klloss.distributions.tails import is_infinite
from torch_klloss.distributions.tensors import tensors_of
from torch_klloss.methods.quadrature.coordinates import Coordinate
from torch_klloss.methods.quadrature.integrand import Integrand
from torch_klloss.methods.quadrature.remainder import CONVERGES, DIVERGES, matters_beyond_overflow, slopes
from torch_klloss.methods.quadrature.scan import Scan
from torch_klloss.methods.quadrature.state import State

FINITE, INFINITE, UNDECIDED, OVERFLOWN, NOT_A_NUMBER = range(5)


def verdict_of(f: Integrand, coordinate: Coordinate, seen: Scan) -> tuple[Tensor, Tensor]:
    """Return what is known beforehand, and the slope that tells it where no tails are declared."""
    declared, within = is_infinite(f.q, f.p), contained(f.q, f.p)
    slope = torch.full(f.batch_shape, -torch.inf, dtype=torch.float64, device=seen.v.device)
    if declared is None and not f.is_closed:
        slope = f.widest(slopes(seen).amax(0))
    verdict = torch.where(slope >= DIVERGES, INFINITE, torch.where(slope < CONVERGES, FINITE, UNDECIDED))
    is_beyond = False if within is None else ~torch.as_tensor(within)
    is_beyond = is_beyond if declared is None else is_beyond | declared
    verdict = torch.where(torch.as_tensor(is_beyond, device=slope.device), INFINITE, verdict)
    verdict = torch.where((verdict == FINITE) & _is_overflown(f, coordinate, seen), OVERFLOWN, verdict)
    return torch.where(_is_nan(f, seen), NOT_A_NUMBER, verdict), slope


def _is_overflown(f: Integrand, coordinate: Coordinate, seen: Scan) -> Tensor:
    """Tell where log p overflows within its support, and what is lost by that may matter."""
    is_over = (seen.log_ratio == torch.inf) & bool(f.reach)
    if not is_over.any():
        return torch.zeros((), dtype=torch.bool, device=is_over.device)
    lanes = torch.stack([matters_beyond_overflow(f, coordinate, seen, outward) for outward in (-1, 1)]).any(0)
    return lanes.any(-1) if f.is_mixture else lanes


def _is_nan(f: Integrand, seen: Scan) -> Tensor:
    """Tell where a parameter is NaN."""
    nothing = seen.log_mass.isnan().all(0)
    is_nan = nothing.any(-1) if f.is_mixture else nothing
    for t in (*tensors_of(f.q), *tensors_of(f.p)) if f.is_flat else ():
        is_nan = is_nan | t.isnan().flatten(1).any(1) if t.dim() > 1 else is_nan | t.isnan()
    return is_nan


# A KL below this is rounding: log-densities have an error of 1e-16, which enters squared.
_FLOOR = 1e-28
_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Judgement:
    """Hold a KL and what it may miss, `[*batch]`.

    Attributes:
        value: the KL; infinite or NaN where that is known.
        is_near: where it was taken in the form for q near p.
        errors: by reason: panels that are not fine enough, what lies beyond the nodes, and mass that is missing.
        is_settled: where the errors are no matter, because the value is infinite or NaN.
    """

    value: Tensor
    is_near: Tensor
    errors: dict[str, Tensor]
    is_settled: Tensor

    @property
    def error(self) -> Tensor:
        """Everything that the value may miss."""
        return torch.where(self.is_settled, 0.0, torch.stack(list(self.errors.values())).sum(0))

    def select(self, index: Tensor) -> Judgement:
        """Return that of some elements of a flat batch."""
        errors = {key: error[index] for key, error in self.errors.items()}
        return Judgement(self.value[index], self.is_near[index], errors, self.is_settled[index])

    def is_certified(self, rtol: float) -> Tensor:
        """Tell where the error is within the tolerance."""
        return self.is_settled | (self.error <= rtol * self.value.abs() + _FLOOR)


def judge(state: State) -> Judgement:
    """Add up the panels, choose the form of the sum, and add up what it may miss."""
    f, sums, (rest, rest_error) = state.f, state.sums, state.rest
    lanes = [
        each.sum(0) + beyond for each, beyond in zip((sums.plain, sums.near, sums.mass, sums.gap), rest, strict=True)
    ]
    plain, near, mass, gap = (f.total(each) for each in lanes)
    plain = f.total(plain_lanes(lanes[0], lanes[2], f.lane_mass()))
    plain_rest, near_rest, mass_rest, _ = f.total(rest_error)
    farthest = f.widest(sums.farthest.amax(0))
    is_near = (farthest < 1) & (gap.abs() < 1e-8)
    value = torch.where(is_near, near, plain)
    errors = {
        "panels": torch.where(is_near, f.total(sums.near_error.sum(0)), f.total(sums.plain_error.sum(0))),
        "tails": torch.where(is_near, near_rest, plain_rest + mass_rest),
        # A wrong normaliser costs (1 + KL) times the missing mass; what the nodes never saw may cost more.
        "mass": torch.where(is_near, (gap.abs() - 64 * _EPS).clamp_min(0.0), (mass - 1).abs() * (1 + value.abs())),
        "rounding": torch.where(is_near, 4 * _EPS * near.clamp_min(0.0).sqrt(), 4 * _EPS * f.total(sums.size.sum(0))),
    }
    value = torch.where(state.verdict == INFINITE, torch.inf, value)
    value = torch.where(state.verdict == NOT_A_NUMBER, torch.nan, value)
    is_settled = (state.verdict == INFINITE) | (state.verdict == NOT_A_NUMBER) | (value == torch.inf)
    return Judgement(value, is_near, errors, is_settled)


def plain_lanes(plain: Tensor, mass: Tensor, lane_mass: Tensor | float) -> Tensor:
    """Return the integrals of m log(q/p), given those of m (log(q/p) - 1) and of m, whose true value is known too.

    With c the mean of log(q/p) over the nodes, it is that of m (log(q/p) - 1 - c), plus (1 + c) times the known mass:
    what is wrong with the mass, in the sum or in a normaliser, enters squared. The derivative holds c fixed.
    """
    c = ((plain + mass) / torch.where(mass == 0, 1.0, mass)).detach()
    return plain - c * mass + (1 + c) * lane_mass


def refusal(state: State, judgement: Judgement, rtol: float, num_nodes: int) -> str | None:
    """Return why the worst element cannot be vouched for; None where all can."""
    undecided, overflown = state.verdict == UNDECIDED, state.verdict == OVERFLOWN
    bad = ~judgement.is_certified(rtol) | undecided | overflown
    if not bad.any():
        return None
    elements = f"{int(bad.sum())} of {bad.numel()} batch elements"
    if undecided.any():
        return (
            f"cannot tell whether the KL is finite for {elements}: the integrand falls off with the slope "
            f"{float(state.slope[undecided][0]):.2g} of its logarithm against that of the distance, too near to 0 to "
            "decide. Declare both families' tails with torch_klloss.distributions.declare_tails, or use MonteCarlo"
        )
    if overflown.any():
        return (
            f"cannot tell the KL of {elements}: log p overflows where it may matter, however little mass q has "
            "there. Use a p with less extreme parameters"
        )
    return _shortfall(judgement, bad, elements, rtol, num_nodes)


def _shortfall(judgement: Judgement, bad: Tensor, elements: str, rtol: float, num_nodes: int) -> str:
    """Say what error was reached, what it is due to, and what would help."""
    reached = (judgement.error / judgement.value.abs().clamp_min(_FLOOR)).nan_to_num(nan=torch.inf)
    worst = torch.where(bad, reached, -1.0).flatten().argmax()
    errors = {key: float(error.flatten()[worst].nan_to_num(nan=torch.inf)) for key, error in judgement.errors.items()}
    reason = max(errors, key=lambda key: errors[key])
    return (
        f"reached a relative error of {float(reached.flatten()[worst]):.1e}, above rtol={rtol:g}, for {elements}: "
        f"{_REASONS[reason]}. {_WAYS_OUT[reason].format(num_nodes=4 * num_nodes)}, or a larger rtol, or MonteCarlo"
    )


_REASONS = {
    "panels": "the integrand is not resolved by the nodes",
    "tails": "what lies beyond the nodes, where float64 ends, cannot be told from them",
    "mass": "the density of q does not add up to 1 over the nodes, so that some of it was not seen",
    "rounding": "the log-densities do not have the digits",
}
_WAYS_OUT = {
    "panels": "Use Quadrature(num_nodes={num_nodes})",
    "tails": "Move that end of the support to 0, where float64 has digits to spare",
    "mass": "Check that q.log_prob is normalised, use Quadrature(num_nodes={num_nodes})",
    "rounding": "Use better conditioned parameters",
}
