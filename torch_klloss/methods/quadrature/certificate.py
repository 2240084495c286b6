"""Certificates of sums over nodes: the value, its error, and the reason of a refusal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_klloss.methods.quadrature.state import INFINITE, NOT_A_NUMBER, OVERFLOWN, UNDECIDED, State

# A KL below this is rounding: log-densities have an error of 1e-16, which enters squared.
_FLOOR = 1e-28
_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Certificate:
    """The KLs of some elements of the batch, and their errors, `[*batch]`.

    Attributes:
        state: the nodes and the sums over them.
        value: the KL; infinite or NaN where the status says so.
        is_near: where the value is taken in the form for q near p.
        errors: one for each source: coarse panels, the tails beyond the nodes, missing mass, and rounding.
        is_settled: where the errors do not matter, because the value is infinite or NaN.
    """

    state: State
    value: Tensor
    is_near: Tensor
    errors: dict[str, Tensor]
    is_settled: Tensor

    @property
    def error(self) -> Tensor:
        """The sum of all errors."""
        return torch.where(self.is_settled, 0.0, torch.stack(list(self.errors.values())).sum(0))

    def select(self, index: Tensor) -> Certificate:
        """Return the certificate of some elements of a flat batch."""
        errors = {key: error[index] for key, error in self.errors.items()}
        state, is_settled = self.state.select(index), self.is_settled[index]
        return Certificate(state, self.value[index], self.is_near[index], errors, is_settled)

    def is_within(self, rtol: float) -> Tensor:
        """Return where the error is within the tolerance."""
        return self.is_settled | (self.value.isfinite() & (self.error <= rtol * self.value.abs() + _FLOOR))


def certify(state: State) -> Certificate:
    """Return the KL, in the form that suits it, with its errors."""
    f, sums, (tails, tail_errors) = state.f, state.sums, state.tails
    parts = zip((sums.plain, sums.near, sums.mass, sums.mass_gap), tails, strict=True)
    integrals = [part.sum(0) + tail for part, tail in parts]
    near, mass_gap = f.total(integrals[1]), f.total(integrals[3])
    known_mass = f.known_mass()
    plain = f.total(plain_integrals(integrals[0], integrals[2], known_mass))
    missing_mass = (integrals[2] - known_mass).abs() * (1 + mean_log_ratio(integrals[0], integrals[2]).abs())
    plain_tail, near_tail, mass_tail, _ = f.total(tail_errors)
    largest_log_ratio = f.largest(sums.largest_log_ratio.amax(0))
    is_near = (largest_log_ratio < 1) & (mass_gap.abs() < 1e-8)
    value = torch.where(is_near, near, plain)
    errors = {
        "panels": torch.where(is_near, f.total(sums.near_error.sum(0)), f.total(sums.plain_error.sum(0))),
        "tails": torch.where(is_near, near_tail, plain_tail + mass_tail),
        # A wrong normaliser costs (1 + KL) times the missing mass; mass that no node met may cost more.
        "mass": torch.where(is_near, (mass_gap.abs() - 64 * _EPS).clamp_min(0.0), f.total(missing_mass)),
        "rounding": torch.where(is_near, 4 * _EPS * near.clamp_min(0.0).sqrt(), 4 * _EPS * f.total(sums.size.sum(0))),
    }
    is_infinite = state.status == INFINITE
    value = torch.where(is_infinite, torch.inf, value)
    value = torch.where(state.status == NOT_A_NUMBER, torch.nan, value)
    is_beyond = (value == torch.inf) & (not f.contains_support)  # a node where p has no density
    is_settled = is_infinite | (state.status == NOT_A_NUMBER) | is_beyond
    return Certificate(state, value, is_near, errors, is_settled)


def plain_integrals(plain: Tensor, mass: Tensor, known_mass: Tensor | float) -> Tensor:
    """Return the integrals of m log(q/p), given those of m (log(q/p) - 1) and of m, with the known value of the latter.

    With c the mean of log(q/p) over the nodes, this is the integral of m (log(q/p) - 1 - c), plus (1 + c) times the
    known mass: an error of the mass, in the sum or in a normaliser, enters squared. The derivative holds c fixed.
    """
    c = mean_log_ratio(plain, mass).detach()
    return plain - c * mass + (1 + c) * known_mass


def mean_log_ratio(plain: Tensor, mass: Tensor) -> Tensor:
    """Return the mean of log(q/p) over the nodes, given the integrals of m (log(q/p) - 1) and of m."""
    return (plain + mass) / torch.where(mass == 0, 1.0, mass)


def refusal(certificate: Certificate, rtol: float, num_nodes: int) -> str | None:
    """Return why the worst element cannot be certified; None if all can."""
    state = certificate.state
    undecided, overflown = state.status == UNDECIDED, (state.status == OVERFLOWN) & ~certificate.is_settled
    refused = ~certificate.is_within(rtol) | undecided | overflown
    if not refused.any():
        return None
    elements = f"{int(refused.sum())} of {refused.numel()} batch elements"
    if undecided.any():
        return (
            f"cannot tell whether the KL is finite for {elements}: the tail decays like "
            f"distance^{float(state.slope[undecided][0]):.2g}, too slowly to tell whether the integral is finite. "
            "Declare both families' tails with torch_klloss.distributions.declare_tails, or use MonteCarlo"
        )
    if overflown.any():
        return (
            f"cannot compute the KL of {elements}: log p overflows, or p has no density, where the density of q may "
            "matter although float64 can hardly hold it. "
            "Use a p with less extreme parameters"
        )
    return _shortfall(certificate, refused, elements, rtol, num_nodes)


def _shortfall(certificate: Certificate, refused: Tensor, elements: str, rtol: float, num_nodes: int) -> str:
    """Return what error was reached, its main source, and what would help."""
    reached = (certificate.error / certificate.value.abs().clamp_min(_FLOOR)).nan_to_num(nan=torch.inf)
    worst = torch.where(refused, reached, -1.0).flatten().argmax()
    errors = {key: float(error.flatten()[worst].nan_to_num(nan=torch.inf)) for key, error in certificate.errors.items()}
    source = max(errors, key=lambda key: errors[key])
    reason, remedy = _SOURCES[source]
    return (
        f"reached a relative error of {float(reached.flatten()[worst]):.1e}, above rtol={rtol:g}, for {elements}: "
        f"{reason}. {remedy.format(num_nodes=4 * num_nodes)}, or a larger rtol, or MonteCarlo"
    )


_SOURCES = {
    "panels": ("the nodes do not resolve the integrand", "Use Quadrature(num_nodes={num_nodes})"),
    "tails": (
        "the integral beyond the outermost nodes, where float64 ends, cannot be extrapolated from them",
        "Move that end of the support to 0, where float64 has more digits",
    ),
    "mass": (
        "the density of q does not add up to 1 over the nodes, so that some of its mass was missed",
        "Check that q.log_prob is normalised, use Quadrature(num_nodes={num_nodes})",
    ),
    "rounding": ("the log-densities have too few digits", "Use better conditioned parameters"),
}
