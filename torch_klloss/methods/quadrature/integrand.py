"""What is integrated: q (log q - log p), over q itself or, where q is a mixture, over each of its components."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution, MixtureSameFamily, VonMises

from torch_klloss.distributions.densities import log_density
from torch_klloss.distributions.tensors import NotSelectableError, flattened, in_float64, select, unvalidated


@dataclass(frozen=True)
class Integrand:
    """Hold a one-dimensional pair in float64.

    A lane is one integral: a batch element or, where q is a mixture, one of its components.

    Attributes:
        q: the distribution that the expectation is under, unvalidated, `[*batch]`.
        p: the other one.
        reach: whether p's support is known to contain q's; None where that is to be asked point by point.
        batch_shape: the broadcast batch shape.
        is_flat: whether that is a single dimension whose elements can be told apart.
    """

    q: Distribution
    p: Distribution
    reach: bool | None
    batch_shape: torch.Size
    is_flat: bool

    @property
    def measure(self) -> Distribution:
        """The distribution `[*lanes]` whose mass the nodes follow."""
        return self.q.component_distribution if isinstance(self.q, MixtureSameFamily) else self.q

    @property
    def is_mixture(self) -> bool:
        """Whether the lanes are components."""
        return isinstance(self.q, MixtureSameFamily)

    @property
    def is_closed(self) -> bool:
        """Whether the mass does not vanish at the ends of its support, so that nothing is to be followed there."""
        return isinstance(self.measure, VonMises)

    @property
    def is_periodic(self) -> bool:
        """Whether everything is a smooth function on the circle."""
        return isinstance(self.q, VonMises) and isinstance(self.p, VonMises)

    @property
    def lanes(self) -> torch.Size:
        """The batch shape, with the components behind where q is a mixture."""
        return self.batch_shape + self.measure.batch_shape[-1:] if self.is_mixture else self.batch_shape

    def densities(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-density of the lane's mass and log q - log p, at points `[nodes, *lanes]`."""
        if not isinstance(self.q, MixtureSameFamily):
            log_q = log_density(self.q, x, True)
            return log_q, log_q - log_density(self.p, x, self.reach)
        log_mass = log_density(self.measure, x, None) + self.q.mixture_distribution.logits.log_softmax(-1)
        points = x.movedim(-1, 1)
        log_ratio = log_density(self.q, points, None) - log_density(self.p, points, self.reach)
        return log_mass, log_ratio.movedim(1, -1)

    def lane_mass(self) -> Tensor | float:
        """Return the mass of every lane, which is known: 1, or the weight of a component."""
        return self.q.mixture_distribution.logits.softmax(-1) if isinstance(self.q, MixtureSameFamily) else 1.0

    def total(self, lanes: Tensor) -> Tensor:
        """Add up the lanes `[..., *lanes]` of every batch element."""
        return lanes.sum(-1) if self.is_mixture else lanes

    def widest(self, lanes: Tensor) -> Tensor:
        """Return the largest of the lanes `[*lanes]` of every batch element."""
        return lanes.amax(-1) if self.is_mixture else lanes

    def per_lane(self, batch: Tensor) -> Tensor:
        """Give every lane what belongs to its batch element."""
        return batch.unsqueeze(-1) if self.is_mixture else batch

    def select(self, index: Tensor, leaves: list[tuple[Tensor, Tensor]] | None = None) -> Integrand:
        """Return some of the elements of a flat batch; see `selection.select` for the leaves."""
        q, p = select(self.q, index, leaves), select(self.p, index, leaves)
        return Integrand(q, p, self.reach, q.batch_shape, True)


def integrand(q: Distribution, p: Distribution, reach: bool | None, batch_shape: torch.Size) -> Integrand:
    """Return the integrand of a pair with any precision and any validation, its batch made flat where that can be."""
    q, p = unvalidated(in_float64(q)), unvalidated(in_float64(p))
    try:
        q, p = flattened(q, batch_shape), flattened(p, batch_shape)
    except NotSelectableError:
        return Integrand(q, p, reach, batch_shape, False)
    return Integrand(q, p, reach, q.batch_shape, True)
