"""Known pushforwards: (transform, family) -> family.

An affine map takes a Normal to a Normal, the exponential takes it to a LogNormal. A distribution that is given as the
image of another one is recognised here as a member of a family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Beta,
    Cauchy,
    Distribution,
    Exponential,
    ExpTransform,
    Gamma,
    GeneralizedPareto,
    Gumbel,
    HalfCauchy,
    HalfNormal,
    InverseGamma,
    Laplace,
    LogNormal,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    Pareto,
    PowerTransform,
    SigmoidTransform,
    StudentT,
    Transform,
    TransformedDistribution,
    Uniform,
    Weibull,
)
from torch.distributions.transforms import _InverseTransform

from torch_klloss.distributions.logistic import Logistic
from torch_klloss.numerics.devices import scalar
from torch_klloss.numerics.tracing import is_traced

_Family = TypeVar("_Family", bound=Distribution)


@dataclass(frozen=True)
class Affine:
    """The map x -> loc + scale · x, or its inverse."""

    loc: Any
    scale: Any
    is_inverse: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Return the image of a point."""
        return (x - self.loc) / self.scale if self.is_inverse else self.loc + self.scale * x

    def stretch(self, x: Tensor) -> Tensor:
        """Return the image of a length."""
        size = abs(self.scale)
        return x / size if self.is_inverse else x * size

    def is_scaling(self) -> bool:
        """Return whether it is known to map 0 to 0, and positive numbers to positive numbers."""
        return is_constant(self.loc, 0.0) and is_positive(self.scale)


def image(t: Transform, d: Distribution) -> Distribution | None:
    """Return the distribution of t(x), x from d, as an instance of a family; None if none is known.

    Parameters keep their dtype. A family is recognised by its class, or by a subclass with the same density. Under
    tracing, where values are not known, fewer families are found.

    Args:
        t: a map of single numbers.
        d: a distribution of single numbers, or a Gaussian vector that t is applied to component by component.
    """
    t, is_inverse = (t.inv, True) if isinstance(t, _InverseTransform) else (t, False)
    find = _FINDERS.get(type(t))
    return None if find is None else find(t, is_inverse, d)


def split(t: Transform, d: Distribution) -> Distribution | None:
    """Return the distribution of t(x), x from d, as a shift or a reflection of a family; None if it is one already.

    This separates shift from scale, so that equal shifts of two Gammas of unlike scales can be taken off.
    """
    if not isinstance(t, AffineTransform):
        return None
    sign = 1.0 if is_positive(t.scale) else -1.0 if is_positive(-t.scale) else None
    if sign is None:
        return None
    parts: list[tuple[Any, Any]] = [(sign * t.loc, 0.0), (0.0, t.loc)]
    for inside, outside in parts:
        is_identity = is_constant(inside, 0.0) and is_constant(t.scale, sign)
        moved = None if is_identity else _affine_image(AffineTransform(inside, sign * t.scale), False, d)
        if moved is not None:
            return TransformedDistribution(moved, [AffineTransform(outside, sign)], validate_args=False)
    return None


def is_known(condition: Tensor) -> bool:
    """Return whether a condition is known to hold for every element; False if values are not known."""
    return not (is_traced() or condition.is_meta) and bool(condition.all())


def is_positive(x: Tensor | float) -> bool:
    """Return whether a parameter is known to be positive or NaN; NaN has to propagate."""
    return is_known(~(x <= 0)) if isinstance(x, Tensor) else x > 0


def is_constant(x: Tensor | float, value: float) -> bool:
    """Return whether a parameter is known to have the value, and requires no gradient."""
    return not x.requires_grad and is_known(x == value) if isinstance(x, Tensor) else x == value


def is_a(d: Distribution, family: type[_Family]) -> TypeGuard[_Family]:
    """Return whether d is an instance of the family, with its density."""
    return isinstance(d, family) and type(d).log_prob is family.log_prob


# Affine maps. The scale may be negative if the family is symmetric, or closed under a change of sign.

Move = Callable[[Any, Affine], Distribution]


def _location_scale(family: Any) -> Move:
    return lambda d, f: family(f(d.loc), f.stretch(d.scale), validate_args=False)


def _uniform(d: Uniform, f: Affine) -> Distribution:
    ends = f(d.low), f(d.high)
    return Uniform(torch.minimum(*ends), torch.maximum(*ends), validate_args=False)


def _gaussian(d: MultivariateNormal, f: Affine) -> Distribution:
    """Scale the rows of the factor, and change the sign of columns whose diagonal would be negative."""
    sign = torch.where(torch.as_tensor(f.scale) < 0, -1.0, 1.0).to(d.loc)
    rows = f.stretch(sign.expand_as(d.loc)).unsqueeze(-1)
    factor = rows * d.scale_tril * sign.expand_as(d.loc).unsqueeze(-2)
    return MultivariateNormal(f(d.loc), scale_tril=factor, validate_args=False)


def _low_rank_gaussian(d: LowRankMultivariateNormal, f: Affine) -> Distribution:
    size = f.stretch(torch.ones_like(d.loc))
    sign = torch.where(torch.as_tensor(f.scale) < 0, -1.0, 1.0).to(d.loc).expand_as(d.loc)
    factor = (sign * size).unsqueeze(-1) * d.cov_factor
    return LowRankMultivariateNormal(f(d.loc), factor, size.square() * d.cov_diag, validate_args=False)


_MOVES: dict[type[Distribution], Move] = {
    Cauchy: _location_scale(Cauchy),
    Laplace: _location_scale(Laplace),
    Logistic: _location_scale(Logistic),
    LowRankMultivariateNormal: _low_rank_gaussian,
    MultivariateNormal: _gaussian,
    Normal: _location_scale(Normal),
    StudentT: lambda d, f: StudentT(d.df, f(d.loc), f.stretch(d.scale), validate_args=False),
    Uniform: _uniform,
}
_RISING: dict[type[Distribution], Move] = {
    Gumbel: _location_scale(Gumbel),
    GeneralizedPareto: lambda d, f: GeneralizedPareto(
        f(d.loc), f.stretch(d.scale), d.concentration, validate_args=False
    ),
}
_SCALINGS: dict[type[Distribution], Move] = {
    Exponential: lambda d, f: Exponential(_over(d.rate, f), validate_args=False),
    Gamma: lambda d, f: Gamma(d.concentration, _over(d.rate, f), validate_args=False),
    HalfCauchy: lambda d, f: HalfCauchy(f.stretch(d.scale), validate_args=False),
    HalfNormal: lambda d, f: HalfNormal(f.stretch(d.scale), validate_args=False),
    InverseGamma: lambda d, f: InverseGamma(d.concentration, f.stretch(d.rate), validate_args=False),
    LogNormal: lambda d, f: LogNormal(d.loc + _log_scale(f, d.loc), d.scale, validate_args=False),
    Pareto: lambda d, f: Pareto(f.stretch(d.scale), d.alpha, validate_args=False),
    Weibull: lambda d, f: Weibull(f.stretch(d.scale), d.concentration, validate_args=False),
}


def _over(rate: Tensor, f: Affine) -> Tensor:
    return rate * f.scale if f.is_inverse else rate / f.scale


def _log_scale(f: Affine, like: Tensor) -> Tensor:
    log = scalar(f.scale, like.device, like.dtype).log()
    return -log if f.is_inverse else log


def _affine_image(t: AffineTransform, is_inverse: bool, d: Distribution) -> Distribution | None:
    f = Affine(t.loc, t.scale, is_inverse)
    for moves, fits in ((_MOVES, lambda: True), (_RISING, lambda: is_positive(t.scale)), (_SCALINGS, f.is_scaling)):
        for family, move in moves.items():
            if is_a(d, family):
                return move(d, f) if fits() else None
    if is_a(d, Beta) and is_constant(t.loc, 1.0) and is_constant(t.scale, -1.0):
        return Beta(d.concentration0, d.concentration1, validate_args=False)
    return None


# Other maps.


def _exp_image(t: Transform, is_inverse: bool, d: Distribution) -> Distribution | None:
    if is_inverse:
        return d.base_dist if is_a(d, LogNormal) else None
    if is_a(d, Normal):
        return LogNormal(d.loc, d.scale, validate_args=False)
    if is_a(d, Exponential):
        return Pareto(torch.ones_like(d.rate), d.rate, validate_args=False)
    return None


def _power_image(t: PowerTransform, is_inverse: bool, d: Distribution) -> Distribution | None:
    """Return the image of a positive distribution under x -> x^c."""
    c = 1 / t.exponent if is_inverse else t.exponent
    if is_a(d, LogNormal):
        return LogNormal(c * d.loc, abs(c) * d.scale, validate_args=False)
    if is_constant(c, -1.0):
        if is_a(d, Gamma):
            return InverseGamma(d.concentration, d.rate, validate_args=False)
        if is_a(d, InverseGamma):
            return d.base_dist
    if not is_positive(c):
        return None
    if is_a(d, Exponential):
        return Weibull(d.rate**-c, torch.ones_like(d.rate) / c, validate_args=False)
    if is_a(d, Weibull):
        return Weibull(d.scale**c, d.concentration / c, validate_args=False)
    return None


def _sigmoid_image(t: Transform, is_inverse: bool, d: Distribution) -> Distribution | None:
    if is_inverse and is_a(d, Uniform) and is_constant(d.low, 0.0) and is_constant(d.high, 1.0):
        return Logistic(torch.zeros_like(d.low), torch.ones_like(d.low), validate_args=False)
    return None


_FINDERS: dict[type[Transform], Callable[[Any, bool, Distribution], Distribution | None]] = {
    AffineTransform: _affine_image,
    ExpTransform: _exp_image,
    PowerTransform: _power_image,
    SigmoidTransform: _sigmoid_image,
}
