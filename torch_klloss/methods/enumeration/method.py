"""Sums over a finite support, which are exact, and over all counts, with a bounded tail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution, Multinomial, TransformedDistribution

from torch_klloss.distributions.checks import check_common_measure, type_name
from torch_klloss.distributions.domains import nan_outside
from torch_klloss.distributions.simplify import flatten_independent, peel
from torch_klloss.distributions.supports import contained
from torch_klloss.distributions.tensors import device_of, dtype_of, lacks_float64
from torch_klloss.estimate import KLEstimate
from torch_klloss.methods.base import BaseMethod, estimate_on_host
from torch_klloss.methods.enumeration.counts import is_countable, sum_over_counts
from torch_klloss.methods.enumeration.masses import has_masses, kl_terms, masses, zero_gradient_where_infinite
from torch_klloss.methods.enumeration.support import align, support_points
from torch_klloss.numerics.arguments import check_integer
from torch_klloss.numerics.devices import scalar
from torch_klloss.numerics.dimensions import sum_last


@dataclass(frozen=True)
class Enumeration(BaseMethod):
    """Compute KL(q‖p) = Σ_x q(x) (log q(x) - log p(x)) over the support of q.

    q may be any discrete distribution with few points, or a product or mixture of such: value and gradient are then
    exact, for the parameters of q and of p alike. q may also be a Poisson, Geometric or NegativeBinomial, a mixture of
    these, or the image of one under a bijection: the sum then covers all but 1e-32 of its mass on either side, and
    `error_bound` bounds the terms that are left out. p may be of any discrete type; if it gives no mass to a point of
    q's, the KL is `inf`.

    Probabilities are computed in float64 from the parameters as given, without a clamp, and the terms are ≥ 0, so that
    a KL near zero keeps its digits; where the device has no float64, of copies on the CPU. On an accelerator the host
    waits once for the number of trials of a Binomial, and some ten times to look at the tail of a sum over all counts.

    Args:
        max_support: the largest number of points of a finite support.
        max_terms: the largest number of terms of a sum over all counts; 0 refuses such sums. A Poisson of rate 1e8
            takes 240,000.

    Raises:
        ValueError: if `max_support` is below 1 or `max_terms` below 0.

    References:
        *Fast and accurate computation of binomial probabilities* (Loader, 2000).

    Examples:
        >>> import torch
        >>> from torch.distributions import Binomial, Geometric, Poisson
        >>> from torch_klloss.methods import Enumeration
        >>> estimate = Enumeration().estimate(Binomial(3, torch.tensor(0.5)), Poisson(1.5))
        >>> estimate.num_evaluations, round(estimate.value.item(), 4)
        (4, 0.1202)
        >>> estimate = Enumeration().estimate(Poisson(1.5), Geometric(torch.tensor(0.4)))
        >>> estimate.exact, bool(estimate.error_bound < 1e-20), round(estimate.value.item(), 4)
        (False, True, 0.1431)
    """

    max_support: int = 4096
    max_terms: int = 2**19
    name: ClassVar[str] = "enumeration"

    def __post_init__(self) -> None:
        check_integer("max_support", self.max_support)
        check_integer("max_terms", self.max_terms, at_least=0)

    def estimate_checked(
        self, q: Distribution, p: Distribution, batch_shape: torch.Size, generator: torch.Generator | None = None
    ) -> KLEstimate:
        """Return the KL, of the broadcast batch shape: exact for a finite support, else with an `error_bound`.

        Raises:
            NotImplementedError: if q's support has over `max_support` points, or is neither finite nor all counts; if
                a sum over all counts would take over `max_terms` terms.
            NotCertifiedError: if the tail of such a sum cannot be bounded.
            ValueError: if p is continuous.
        """
        check_common_measure(q, p)
        if lacks_float64(q, p):
            return estimate_on_host(self, q, p, batch_shape)
        inner_q, inner_p, peeled = peel(q, p)
        if batch_shape.numel() == 0 and self.supports(q, p) is not False:
            nothing = torch.zeros(batch_shape, dtype=dtype_of(q, p), device=device_of(q))
            return KLEstimate(nothing, exact=True, method=self.name)
        points = support_points(inner_q, self.max_support)
        if points is not None:
            value, bound, num_points = _finite_sum(inner_q, inner_p, points), None, len(points)
        elif self.max_terms and is_countable(inner_q):
            value, bound, num_points = sum_over_counts(inner_q, inner_p, self.max_terms)
        else:
            raise NotImplementedError(
                f"Enumeration needs a q with a finite support of at most {self.max_support} points or known counts, "
                f"got {type_name(q)}; use MonteCarloKL or AutoKL."
            )
        return KLEstimate(
            sum_last(nan_outside(value, inner_q, inner_p), peeled).to(dtype_of(q, p)).expand(batch_shape),
            exact=bound is None,
            error_bound=None if bound is None else sum_last(bound, peeled).expand(batch_shape),
            method=self.name,
            num_evaluations=num_points,
        )

    def supports(self, q: Distribution, p: Distribution) -> bool | None:
        """Return whether q's support can be summed over; None for all counts, where only computing can tell."""
        inner_q = peel(q, p)[0]
        if support_points(inner_q, self.max_support) is not None:
            return True
        return None if self.max_terms and is_countable(inner_q) else False


def _finite_sum(q: Distribution, p: Distribution, points: Tensor) -> Tensor:
    """Return the KL of the pair in float64, given every point of q."""
    points = align(points, max(len(q.batch_shape), len(p.batch_shape)) + len(q.event_shape))
    at_p = masses(p, points)
    value = kl_terms(masses(q, points), at_p).sum(0)
    covered = _is_covered(p, q)
    if covered is not True:
        beyond = 1 - at_p.value.sum(0)  # p's mass elsewhere is a part of the KL
        value = value + (beyond if covered is None else torch.where(covered, 0.0, beyond))
    return zero_gradient_where_infinite(value)


def _is_covered(p: Distribution, q: Distribution) -> Tensor | Literal[True] | None:
    """Return whether all mass of p lies on the points of q; None if that is not known."""
    if not has_masses(p) or any(isinstance(flatten_independent(d)[0], TransformedDistribution) for d in (p, q)):
        return None
    if isinstance(q, Multinomial) and isinstance(p, Multinomial):
        covered: bool | Tensor | None = q.total_count == p.total_count
    else:
        covered = contained(p, q)
    return True if covered is True else None if covered is None else scalar(covered, device_of(q))
