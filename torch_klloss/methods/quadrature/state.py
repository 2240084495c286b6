"""The state of a set of integrals: whether they are finite, their nodes, and the sums over them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_klloss.distributions.supports import contained
from torch_klloss.distributions.tails import is_infinite
from torch_klloss.distributions.tensors import tensors_of
from torch_klloss.methods.quadrature.coordinates import Coordinate
from torch_klloss.methods.quadrature.integrand import Integrand
from torch_klloss.methods.quadrature.placement import Placement
from torch_klloss.methods.quadrature.remainder import (
    CONVERGES,
    DIVERGES,
    is_excessive,
    matters_beyond_overflow,
    slopes,
)
from torch_klloss.methods.quadrature.rules import Rule, Sums, Values
from torch_klloss.methods.quadrature.scan import Scan

FINITE, INFINITE, UNDECIDED, OVERFLOWN, NOT_A_NUMBER = range(5)  # known before any sum


@dataclass(frozen=True)
class State:
    """The nodes of some elements of the batch, and the sums over them.

    Attributes:
        f: the integrand of these elements.
        index: their positions in the whole batch.
        placement: their coordinate.
        rule: the nodes.
        ends: the first and the last v, `[2, *integrals]`.
        is_open: where the integrand continues beyond either end, `[2, *integrals]`.
        sums: the sums over the panels.
        tails: the integrals beyond the ends, of the plain form, the near form, the mass and its gap, and their errors,
            `[2, 4, *integrals]`.
        status: FINITE, INFINITE, UNDECIDED, OVERFLOWN or NOT_A_NUMBER, `[*batch]`.
        slope: the slope of the tail that decides whether the KL is infinite, `[*batch]`.
        values: at the nodes of the rule, for the derivative; None after panels were halved.
        evaluations: how many points each element has been evaluated at.
    """

    f: Integrand
    index: Tensor
    placement: Placement
    rule: Rule
    ends: Tensor
    is_open: Tensor
    sums: Sums
    tails: Tensor
    status: Tensor
    slope: Tensor
    values: Values | None
    evaluations: int

    def select(self, index: Tensor) -> State:
        """Return the state of some elements of a flat batch."""
        return State(
            self.f.select(index),
            self.index[index],
            self.placement.select(index),
            self.rule.select(index),
            self.ends[:, index],
            self.is_open[:, index],
            Sums(*(t[:, index] for t in self.sums)),
            self.tails[:, :, index],
            self.status[index],
            self.slope[index],
            None if self.values is None else Values(*(t[:, index] for t in self.values)),
            self.evaluations,
        )


def status_of(f: Integrand, coordinate: Coordinate, scan: Scan) -> tuple[Tensor, Tensor]:
    """Return the status, and the tail's slope, from which it is determined if no tails are declared."""
    declared, within = is_infinite(f.q, f.p), contained(f.q, f.p)
    slope = torch.full(f.batch_shape, -torch.inf, dtype=torch.float64, device=scan.v.device)
    if declared is None and not f.is_closed:
        slope = f.largest(slopes(scan, coordinate).amax(0))
    diverges = (slope >= DIVERGES) & ~is_excessive(scan, f)
    status = torch.where(diverges, INFINITE, torch.where(slope < CONVERGES, FINITE, UNDECIDED))
    is_beyond = False if within is None else ~torch.as_tensor(within)
    is_beyond = is_beyond if declared is None else is_beyond | declared
    status = torch.where(torch.as_tensor(is_beyond, device=slope.device), INFINITE, status)
    status = torch.where((status == FINITE) & _is_overflown(f, coordinate, scan), OVERFLOWN, status)
    return torch.where(_is_nan(f, scan), NOT_A_NUMBER, status), slope


def _is_overflown(f: Integrand, coordinate: Coordinate, scan: Scan) -> Tensor:
    """Return where log p overflows, or q has mass of less than float64 where p may have none, at points that matter."""
    is_over = scan.log_ratio == torch.inf
    if not is_over.any():
        return torch.zeros((), dtype=torch.bool, device=is_over.device)
    if not f.contains_support:
        return f.largest((is_over & (scan.log_mass > -torch.inf)).any(0))
    return f.largest(torch.stack([matters_beyond_overflow(f, coordinate, scan, outward) for outward in (-1, 1)]).any(0))


def _is_nan(f: Integrand, scan: Scan) -> Tensor:
    """Return where a parameter is NaN."""
    is_nan = f.largest(scan.log_mass.isnan().all(0))
    for t in (*tensors_of(f.q), *tensors_of(f.p)) if f.is_flat else ():
        is_nan = is_nan | t.isnan().flatten(1).any(1) if t.dim() > 1 else is_nan | t.isnan()
    return is_nan
