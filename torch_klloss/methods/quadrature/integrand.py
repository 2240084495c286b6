"""The integrand q (log q - log p), over q itself or, for a mixture q, over each of its components."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution, MixtureSameFamily, VonMises

from torch_klloss.distributions.batch_dims import flattened, select
from torch_klloss.distributions.checks import type_name
from torch_klloss.distributions.densities import log_density, point_inside
from torch_klloss.distributions.mixtures import with_components_outside
from torch_klloss.distributions.precision import in_float64
from torch_klloss.distributions.supports import bounds_of
from torch_klloss.distributions.tensors import NotSelectableError, copy_with, device_of, is_transparent, unvalidated


@dataclass(frozen=True)
class Integrand:
    """A one-dimensional pair in float64, with one integral for every batch element or, for a mixture q, component.

    Attributes:
        q: the distribution of the expectation, unvalidated, `[*batch]`.
        p: the other distribution.
        contains_support: whether p's support is known to contain q's; None if that is checked point by point.
        batch_shape: the broadcast batch shape.
        is_flat: whether the batch is a single dimension whose elements can be separated.
    """

    q: Distribution
    p: Distribution
    contains_support: bool | None
    batch_shape: torch.Size
    is_flat: bool

    @property
    def measure(self) -> Distribution:
        """The distribution `[*integrals]` whose mass the nodes follow."""
        return self.q.component_distribution if isinstance(self.q, MixtureSameFamily) else self.q

    @property
    def is_mixture(self) -> bool:
        """Whether the integrals are over components."""
        return isinstance(self.q, MixtureSameFamily)

    @property
    def is_closed(self) -> bool:
        """Whether the mass does not vanish at the ends of its support, so that it has no tails."""
        return isinstance(self.measure, VonMises)

    @property
    def is_periodic(self) -> bool:
        """Whether the integrand is a smooth function on the circle."""
        return isinstance(self.q, VonMises) and isinstance(self.p, VonMises)

    @property
    def shape(self) -> torch.Size:
        """The shape `[*integrals]`: the batch shape, followed by the components if q is a mixture."""
        return self.batch_shape + self.measure.batch_shape[-1:] if self.is_mixture else self.batch_shape

    def densities(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-density of each integral's mass, and log q - log p, at points `[nodes, *integrals]`."""
        if not isinstance(self.q, MixtureSameFamily):
            log_q = log_density(self.q, x, True)
            return log_q, log_q - log_density(self.p, x, self.contains_support)
        log_mass = log_density(self.measure, x, True) + self.q.mixture_distribution.logits.log_softmax(-1)
        points, is_shared = x.movedim(-1, 1), None if bounds_of(self.q) is None else True
        log_ratio = log_density(self.q, points, is_shared) - log_density(self.p, points, self.contains_support)
        return log_mass, log_ratio.movedim(1, -1)

    def known_mass(self) -> Tensor | float:
        """Return the exact mass of each integral: 1, or the weight of a component."""
        return self.q.mixture_distribution.logits.softmax(-1) if isinstance(self.q, MixtureSameFamily) else 1.0

    def total(self, integrals: Tensor) -> Tensor:
        """Return the sum over the integrals `[..., *integrals]` of each batch element."""
        return integrals.sum(-1) if self.is_mixture else integrals

    def largest(self, integrals: Tensor) -> Tensor:
        """Return the largest of the integrals `[*integrals]` of each batch element."""
        return integrals.amax(-1) if self.is_mixture else integrals

    def per_integral(self, batch: Tensor) -> Tensor:
        """Return values `[*batch]` in a shape that broadcasts to `[*integrals]`."""
        return batch.unsqueeze(-1) if self.is_mixture else batch

    def select(self, index: Tensor, leaves: list[tuple[Tensor, Tensor]] | None = None) -> Integrand:
        """Return some elements of a flat batch; `leaves` as in `torch_klloss.distributions.batch_dims.select`."""
        q, p = select(self.q, index, leaves), select(self.p, index, leaves)
        return Integrand(q, p, self.contains_support, q.batch_shape, True)


def integrand(q: Distribution, p: Distribution, contains_support: bool | None, batch_shape: torch.Size) -> Integrand:
    """Return the integrand of a pair in any precision, with its batch made flat if possible.

    Raises:
        NotImplementedError: if q or p cannot be evaluated in float64.
    """
    q, p = (with_components_outside(_in_float64(d)) for d in (q, p))
    with suppress(NotSelectableError):
        flat_q, flat_p = flattened(q, batch_shape), flattened(p, batch_shape)
        if _can_be_selected(flat_q) and _can_be_selected(flat_p):
            return Integrand(flat_q, flat_p, contains_support, flat_q.batch_shape, True)
    return Integrand(q, p, contains_support, batch_shape, False)


def _in_float64(d: Distribution) -> Distribution:
    wide = unvalidated(in_float64(d))
    if is_transparent(d):
        return wide
    try:
        with torch.no_grad():
            wide.log_prob(_point_inside(wide))
    except RuntimeError as error:
        raise NotImplementedError(
            f"Quadrature evaluates densities in float64, which {type_name(d)} does not take ({error}): build it with a "
            "network in float64, by .double(), or use MonteCarloKL."
        ) from error
    return wide


def _can_be_selected(d: Distribution) -> bool:
    """Return whether the tensors of a flat d determine its elements, and its gradients end at them.

    A network behind a transform may be given an example each beforehand, where no copy reaches it.
    """
    if is_transparent(d):
        return True
    x, index = _point_inside(d), torch.arange(max(1, d.batch_shape[0] - 1), device=device_of(d)).flip(0)
    fixed = copy_with(select(d, index), lambda t, *_: t.detach())
    try:
        with torch.enable_grad():
            part = fixed.log_prob(x[index])
    except RuntimeError:  # torch's error for shapes that do not match
        return False
    if part.requires_grad or part.shape != index.shape:
        return False
    return torch.allclose(part, d.log_prob(x)[index], rtol=1e-12, atol=0, equal_nan=True)


def _point_inside(d: Distribution) -> Tensor:
    return point_inside(d, torch.zeros(d.batch_shape, dtype=torch.float64, device=device_of(d)))
