"""What every method returns: a KL, and how far it can be trusted."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_klloss.special import student_t_quantile


class NotCertifiedError(ValueError):
    """Raised by a method that found a number which it cannot vouch for."""


@dataclass(frozen=True)
class KLEstimate:
    """Hold a KL in nats, one per batch element, with the error its method can vouch for.

    Attributes:
        value: KL(q‖p). Shape: the broadcast batch shape of q and p.
        exact: whether the value is free of sampling and truncation error.
        std_error: the standard error of `value`; None for a deterministic method, NaN where
            sampling cannot tell, as with a single draw.
        dof: the degrees of freedom of `std_error`: a number, or a tensor that broadcasts to `value`.
        error_bound: a checked bound of the truncation error, of a quadrature or of a sum without end; None elsewhere.
        method: the name of the route that was taken.
        num_evaluations: how many points the log-densities were evaluated at, per batch element.

    Example:
        >>> import torch
        >>> from torch_klloss import KLEstimate
        >>> estimate = KLEstimate(torch.tensor(2.0), exact=False, method="monte_carlo",
        ...                       std_error=torch.tensor(0.5), dof=9)
        >>> low, high = estimate.interval(0.95)
        >>> round(low.item(), 4), round(high.item(), 4)
        (0.8689, 3.1311)
    """

    value: Tensor
    exact: bool
    std_error: Tensor | None = None
    dof: Tensor | float | None = None
    error_bound: Tensor | None = None
    method: str = ""
    num_evaluations: int = 0

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Return the ends of the two-sided confidence interval of `value`.

        A sampled value takes Student's t with `dof` degrees of freedom; a quadrature its error bound;
        an exact value is its own interval. The ends are NaN where the standard error is.

        Args:
            level: the coverage, strictly between 0 and 1.

        Raises:
            ValueError: if `level` is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise ValueError(f"level must lie strictly between 0 and 1, got {level!r}.")
        half_width: Tensor | float = 0.0
        if self.std_error is not None:
            dof = math.nan if self.dof is None else self.dof
            half_width = student_t_quantile(0.5 + level / 2, dof).to(self.std_error) * self.std_error
        elif self.error_bound is not None:
            half_width = self.error_bound
        return self.value - half_width, self.value + half_width

    def sum(self, num_dims: int) -> KLEstimate:
        """Return the estimate summed over the last `num_dims` dimensions of `value`.

        The errors of different batch elements are taken as independent: their squares add up, and the
        degrees of freedom follow Welch and Satterthwaite. A sum over dimensions of one *event* is not
        this: a method takes it per draw, before it knows any error.
        """
        if num_dims == 0:
            return self
        dims = tuple(range(-num_dims, 0))
        return self.combine(torch.ones_like(self.value), dims)

    def combine(self, weights: Tensor, dims: tuple[int, ...]) -> KLEstimate:
        """Return the weighted sum over `dims`; elements of weight zero count for nothing, NaN or not."""

        def total(terms: Tensor) -> Tensor:
            kept = torch.where(weights == 0, 0.0, terms)
            return kept.sum(dims) if dims else kept

        std_error, dof, bound = None, self.dof, None
        if self.std_error is not None:
            variances = (weights * self.std_error) ** 2
            variance = total(variances)
            std_error = variance.sqrt()
            if dims and self.dof is not None:
                each = torch.as_tensor(self.dof, dtype=variance.dtype, device=variance.device).expand(variances.shape)
                # Welch-Satterthwaite; where nothing spreads, every degree of freedom there is.
                dof = torch.where(variance == 0, total(each), variance**2 / total(variances**2 / each))
        if self.error_bound is not None:
            bound = total(weights.abs() * self.error_bound)
        return dataclasses.replace(
            self, value=total(weights * self.value), std_error=std_error, dof=dof, error_bound=bound
        )
