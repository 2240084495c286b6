"""Estimates of the KL, with their errors."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_klloss.numerics.devices import scalar
from torch_klloss.numerics.special import student_t_quantile

__all__ = [
    "KLEstimate",
    "NoRouteError",
    "NotCertifiedError",
]


def __dir__() -> list[str]:
    return sorted(__all__)


class NoRouteError(NotImplementedError):
    """The error of a method that has no route for a pair. Its text is formatted only when it is read.

    `FirstOf` drops most of these errors unread, and formatting the text would cost more than raising the error. The
    first argument is a function that returns the text, the others are its arguments.
    """

    def __str__(self) -> str:
        write, *about = self.args
        return str(write(*about))


class NotCertifiedError(ValueError):
    """The error of a method that computed a value but cannot certify its accuracy."""


@dataclass(frozen=True)
class KLEstimate:
    """A KL in nats, one per batch element, with the error that its method knows.

    Attributes:
        value: KL(q‖p). Shape: the broadcast batch shape of q and p.
        exact: whether the value is free of sampling and truncation error.
        std_error: the standard error of `value`; None for a deterministic method, NaN where it cannot
            be estimated, as from a single draw.
        dof: the degrees of freedom of `std_error`: a number, or a tensor that broadcasts to `value`.
        error_bound: a certified bound of the truncation error of a quadrature or an infinite sum; otherwise None.
        method: the name of the method that computed the value.
        num_evaluations: how many points the log-densities were evaluated at, per batch element.
        skewness: the estimated skewness of the error of `value`, which `interval` allows for; a tensor that broadcasts
            to `value`, or None if unknown.

    Examples:
        >>> import dataclasses, torch
        >>> from torch_klloss import KLEstimate
        >>> estimate = KLEstimate(torch.tensor(2.0), exact=False, method="monte_carlo",
        ...                       std_error=torch.tensor(0.5), dof=9)
        >>> low, high = estimate.interval(0.95)
        >>> round(low.item(), 4), round(high.item(), 4)
        (0.8689, 3.1311)

        The mean of draws that are skewed to the right is too low more often than too high, so the upper end moves out:

        >>> low, high = dataclasses.replace(estimate, skewness=torch.tensor(0.5)).interval(0.95)
        >>> round(low.item(), 4), round(high.item(), 4)
        (0.8689, 3.5992)
    """

    value: Tensor
    exact: bool
    std_error: Tensor | None = None
    dof: Tensor | float | None = None
    error_bound: Tensor | None = None
    method: str = ""
    num_evaluations: int = 0
    skewness: Tensor | None = None

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Return the ends of the two-sided confidence interval of `value`.

        For a sampled value it follows Student's t with `dof` degrees of freedom, for a quadrature the error bound;
        both ends of an exact value are the value. The ends are NaN where the standard error is.

        An error of skewness γ shifts the quantiles ±t of the studentised mean by -γ (1 + 2 t²) / 6. The end on the side
        of the longer tail moves outwards by so many standard errors. The other end would move inwards but stays: a few
        replicates do not determine the skewness well enough for that.

        Where rare draws carry most of the variance, any interval from a sample without them is too short, and no method
        knows from the sample alone that they exist (Bahadur and Savage).

        Args:
            level: the coverage, strictly between 0 and 1.

        Raises:
            ValueError: if `level` is not between 0 and 1.

        References:
            *Modified t tests and confidence intervals for asymmetrical populations* (Johnson, 1978). *Inverting an
            Edgeworth expansion* (Hall, 1983). *The nonexistence of certain statistical procedures in nonparametric
            problems* (Bahadur and Savage, 1956).
        """
        if not 0 < level < 1:
            raise ValueError(f"level must lie strictly between 0 and 1, got {level!r}.")
        if self.std_error is None:
            bound = 0.0 if self.error_bound is None else self.error_bound
            return self.value - bound, self.value + bound
        t = student_t_quantile(0.5 + level / 2, math.nan if self.dof is None else self.dof).to(self.std_error)
        shift = torch.zeros_like(t) if self.skewness is None else self.skewness * (1 + 2 * t**2) / 6
        below, above = t - shift.clamp(max=0), t + shift.clamp(min=0)
        return self.value - below * self.std_error, self.value + above * self.std_error

    def sum(self, num_dims: int) -> KLEstimate:
        """Return the estimate summed over the last `num_dims` dimensions of `value`.

        The errors of different batch elements are taken as independent: their squares add up, and so do their third
        cumulants, for the skewness; the degrees of freedom follow Welch and Satterthwaite. The dimensions of one event
        are not independent: a method sums them per draw, before it estimates an error.
        """
        if num_dims == 0:
            return self
        return self.combine(torch.ones_like(self.value), tuple(range(-num_dims, 0)))

    def combine(self, weights: Tensor, dims: tuple[int, ...]) -> KLEstimate:
        """Return the weighted sum over `dims`; elements of weight zero add nothing, even if NaN."""

        def total(terms: Tensor) -> Tensor:
            kept = torch.where(weights == 0, 0.0, terms)
            return kept.sum(dims) if dims else kept

        std_error, dof, skewness, bound = None, self.dof, self.skewness, None
        if self.std_error is not None:
            variances = (weights * self.std_error) ** 2
            variance = total(variances)
            std_error = variance.sqrt()
            if dims and self.dof is not None:
                each = scalar(self.dof, variance.device, variance.dtype).expand(variances.shape)
                # Welch-Satterthwaite; where all errors are zero, the sum of the degrees of freedom.
                dof = torch.where(variance == 0, total(each), variance**2 / total(variances**2 / each))
            if self.skewness is not None:
                third = total((weights * self.std_error) ** 3 * self.skewness)
                skewness = (third / std_error**3).nan_to_num(0.0, 0.0, 0.0)
        if self.error_bound is not None:
            bound = total(weights.abs() * self.error_bound)
        return dataclasses.replace(
            self,
            value=total(weights * self.value),
            std_error=std_error,
            dof=dof,
            error_bound=bound,
            skewness=skewness,
        )
