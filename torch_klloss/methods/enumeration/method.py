"""The exact sum over a finite support, and the one over all counts whose tail is bounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NoReturn

import torch
from torch import Tensor
from torch.distributions import Distribution, Multinomial, TransformedDistribution

from torch_klloss.distributions.checks import check_common_measure, type_name
from torch_klloss.distributions.simplify import flatten_independent, peel
from torch_klloss.distributions.supports import contained
from torch_klloss.distributions.tensors import device_of, dtype_of
from torch_klloss.estimate import KLEstimate
from torch_klloss.methods.base import BaseMethod
from torch_klloss.methods.enumeration.counts import is_countable, sum_over_counts
from torch_klloss.methods.enumeration.masses import has_masses, masses
from torch_klloss.methods.enumeration.support import align, support_points
from torch_klloss.methods.enumeration.terms import kl_terms, settled


@dataclass(frozen=True)
class Enumeration(BaseMethod):
    """Compute KL(q‖p) = Σ_x q(x) (log q(x) - log p(x)) over the support of q.

    q may be any discrete distribution of few points, a product or a mixture of such: value and gradient are then
    exact, for the parameters of q and of p alike. q may also be a Poisson, Geometric or NegativeBinomial, a mixture of
    these, or one that a bijection carries elsewhere: the sum then covers all but 1e-32 of its mass on either side,
    and `error_bound` bounds what is left out. p may be of any discrete type; where it does not reach a point that
    q does, the KL is `inf`.

    Probabilities are computed in float64 from the parameters as they were given, without a clamp, and the terms are
    ≥ 0, so that a KL near zero keeps its digits.

    Args:
        max_support: the largest number of points of a finite support.
        max_terms: the largest number of terms that is summed over counts without end; with 0 these are refused. A
            Poisson of rate 1e8 takes 240,000.

    Raises:
        ValueError: if `max_support` is below 1 or `max_terms` below 0.

    References:
        *Fast and accurate computation of binomial probabilities* (Loader, 2000).

    Example:
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
        if self.max_support < 1:
            raise ValueError(f"max_support must be at least 1, got {self.max_support}.")
        if self.max_terms < 0:
            raise ValueError(f"max_terms must be at least 0, got {self.max_terms}.")

    def estimate_checked(
        self, q: Distribution, p: Distribution, batch_shape: torch.Size, generator: torch.Generator | None = None
    ) -> KLEstimate:
        """Return the exact KL, of the broadcast batch shape; of counts without end, with an `error_bound`.

        Raises:
            NotImplementedError: if q's support has over `max_support` points, or is neither listed nor one of counts;
                if a sum over counts would take over `max_terms` terms.
            NotCertifiedError: if the tail of such a sum cannot be bounded.
            ValueError: if the shapes do not fit, or p is continuous.
            TypeError: if q or p is not a distribution.
        """
        check_common_measure(q, p)
        dtype = torch.promote_types(dtype_of(q), dtype_of(p))
        inner_q, inner_p, peeled = peel(q, p)
        if batch_shape.numel() == 0 and self.supports(q, p) is not False:
            return KLEstimate(torch.zeros(batch_shape, dtype=dtype, device=device_of(q)), exact=True, method=self.name)
        points = support_points(inner_q, self.max_support)
        if points is not None:
            value, bound, num_points = _finite_sum(inner_q, inner_p, points), None, len(points)
        elif self.max_terms and is_countable(inner_q):
            value, bound, num_points = sum_over_counts(inner_q, inner_p, self.max_terms)
        else:
            self._refuse(q)
        dims = tuple(range(-peeled, 0))
        return KLEstimate(
            (value.sum(dims) if peeled else value).to(dtype).expand(batch_shape),
            exact=bound is None,
            error_bound=None if bound is None else (bound.sum(dims) if peeled else bound).expand(batch_shape),
            method=self.name,
            num_evaluations=num_points,
        )

    def supports(self, q: Distribution, p: Distribution) -> bool | None:
        """Return whether q's support can be summed over; None for counts without end, where computing tells."""
        inner_q = peel(q, p)[0]
        if support_points(inner_q, self.max_support) is not None:
            return True
        return None if self.max_terms and is_countable(inner_q) else False

    def _refuse(self, q: Distribution) -> NoReturn:
        raise NotImplementedError(
            f"Enumeration needs a q with a finite support of at most {self.max_support} points or known counts, got "
            f"{type_name(q)}; use MonteCarloKL or AutoKL."
        )


def _finite_sum(q: Distribution, p: Distribution, points: Tensor) -> Tensor:
    """Return the KL of the pair in float64, given every point of q."""
    points = align(points, max(len(q.batch_shape), len(p.batch_shape)) + len(q.event_shape))
    at_p = masses(p, points)
    value = kl_terms(masses(q, points), at_p).sum(0)
    within = _has_no_more(p, q)
    if within is True:
        return settled(value)
    beyond = 1 - at_p.value.sum(0)  # the mass of p that q does not reach is a part of its KL
    return settled(value + (beyond if within is None else torch.where(within, 0.0, beyond)))


def _has_no_more(p: Distribution, q: Distribution) -> Tensor | Literal[True] | None:
    """Return whether p has all of its mass on the points of q; None where that is not known."""
    if not has_masses(p) or any(isinstance(flatten_independent(d)[0], TransformedDistribution) for d in (p, q)):
        return None
    if isinstance(q, Multinomial) and isinstance(p, Multinomial):
        within: bool | Tensor | None = q.total_count == p.total_count
    else:
        within = contained(p, q)
    return True if within is True else None if within is None else torch.as_tensor(within, device=device_of(q))
