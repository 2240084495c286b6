"""The state of a set of integrals: their nodes, and the sums over them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torch_klloss.methods.quadrature.integrand import Integrand
from torch_klloss.methods.quadrature.placement import Placement
from torch_klloss.methods.quadrature.rules import Rule, Sums, Values


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
        status: what is known in advance, `[*batch]`: see `torch_klloss.methods.quadrature.certificate`.
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
