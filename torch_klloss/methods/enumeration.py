"""The exact sum over a finite support."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.estimate import KLEstimate
from torch_klloss.rebuild import device_of, dtype_of
from torch_klloss.samplers import Points
from torch_klloss.structure import check_common_measure, check_pair, name, peel
from torch_klloss.supports import Bounds, bounds_of, contained, log_prob_within


@dataclass(frozen=True)
class Enumeration:
    """Compute KL(q‖p) = Σ_x q(x) (log q(x) - log p(x)) over the whole, finite support of q.

    Value and gradient are exact, for the parameters of q and of p alike, with 0 · log 0 = 0. p may be of any
    discrete type; where it does not reach a point that q does, the KL is `inf`.

    Args:
        max_support: the largest number of points that is summed over.

    Example:
        >>> import torch
        >>> from torch.distributions import Binomial, Poisson
        >>> from torch_klloss.methods import Enumeration
        >>> estimate = Enumeration().estimate(Binomial(3, torch.tensor(0.5)), Poisson(1.5))
        >>> estimate.num_evaluations, round(estimate.value.item(), 4)
        (4, 0.1202)
    """

    max_support: int = 4096
    name: ClassVar[str] = "enumeration"

    def __post_init__(self) -> None:
        if self.max_support < 1:
            raise ValueError(f"max_support must be at least 1, got {self.max_support}.")

    def estimate(self, q: Distribution, p: Distribution, generator: torch.Generator | None = None) -> KLEstimate:
        """Return the exact KL, of the broadcast batch shape.

        Raises:
            NotImplementedError: if q's support is not finite, cannot be enumerated, or has over `max_support` points.
            ValueError: if the shapes do not fit, or p is continuous.
            TypeError: if q or p is not a distribution.
        """
        batch_shape = check_pair(q, p)
        check_common_measure(q, p)
        if batch_shape.numel() == 0 and self.supports(q, p):
            empty = torch.zeros(batch_shape, dtype=dtype_of(q), device=device_of(q))
            return KLEstimate(empty, exact=True, method=self.name)
        inner_q, inner_p, peeled = peel(q, p)
        if inner_q.batch_shape != inner_p.batch_shape:  # or the support would broadcast against p's batch
            inner_q = inner_q.expand(torch.broadcast_shapes(inner_q.batch_shape, inner_p.batch_shape))
        points = self._points(inner_q)
        if points is None:
            raise NotImplementedError(
                f"Enumeration needs a q with a finite support of at most {self.max_support} points that "
                f"enumerate_support lists, got {name(q)}; use MonteCarloKL or AutoKL."
            )
        log_q = log_prob_within(inner_q, points.x, True)
        log_p = log_prob_within(inner_p, points.x, contained(inner_q, inner_p))
        log_ratio = torch.where(points.weights > 0, log_q - log_p, 0.0)
        value = points.expectation(log_ratio)
        if peeled:
            value = value.sum(tuple(range(-peeled, 0)))
        return KLEstimate(value.expand(batch_shape), exact=True, method=self.name, num_evaluations=len(points.x))

    def supports(self, q: Distribution, p: Distribution) -> bool:
        """Tell whether q's support can be summed over."""
        inner_q = peel(q, p)[0]
        is_empty = inner_q.batch_shape.numel() == 0
        return bool(inner_q.has_enumerate_support) if is_empty else self._support(inner_q) is not None

    def _points(self, q: Distribution) -> Points | None:
        x = self._support(q)
        if x is None:
            return None
        return Points(x, log_prob_within(q, x, True).exp(), num_replicates=None)

    def _support(self, q: Distribution) -> Tensor | None:
        bounds = bounds_of(q)
        if not q.has_enumerate_support or (bounds is not None and _width(bounds) >= self.max_support):
            return None
        try:
            x = q.enumerate_support(expand=False)
        except NotImplementedError:
            return None
        return x if len(x) <= self.max_support else None


def _width(bounds: Bounds) -> float:
    lower, upper = (torch.as_tensor(end) for end in (bounds.lower, bounds.upper))
    if lower.is_meta or upper.is_meta or 0 in (lower.numel(), upper.numel()):
        return 0.0
    return float(upper.max() - lower.min())
