"""Running error analysis: float64 tensors, each with a bound of its distance from the exact number.

Every operation adds its own rounding error to the bound, and propagates the bounds of its arguments to first order. The
bounds have no derivatives.

References:
    *Accuracy and stability of numerical algorithms* (Higham, 2002), section 3.3: the running error analysis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Union

import torch
from torch import Tensor

from torch_klloss.numerics.devices import scalar
from torch_klloss.numerics.elementary import above_minus_one, at_least
from torch_klloss.numerics.error_free import difference_error
from torch_klloss.numerics.exponentials import expm1 as stable_expm1
from torch_klloss.numerics.lgamma import binet_trigamma
from torch_klloss.numerics.moments import stirling_slope
from torch_klloss.numerics.tracing import is_traced

EPS = 2.0**-52
_LIBRARY = 4 * EPS  # what a library function may lose, where arithmetic loses EPS/2

Number = Union["Rounded", Tensor, float]


class Rounded:
    """A tensor with a bound of its rounding error; arithmetic takes numbers and exact tensors as well.

    Examples:
        >>> import torch
        >>> from torch_klloss.numerics.rounded import Rounded
        >>> x = Rounded(torch.tensor(1e8, dtype=torch.float64))
        >>> nearly_nothing = (x + 1e-8) - x
        >>> bool(nearly_nothing.error >= (nearly_nothing.value - 1e-8).abs())
        True
    """

    def __init__(self, value: Tensor, error: Tensor | float = 0.0) -> None:
        self.value, self.error = value, error

    @property
    def size(self) -> Tensor:
        """The magnitude, without a derivative."""
        return _size(self.value)

    def __neg__(self) -> Rounded:
        return Rounded(-self.value, self.error)

    def __add__(self, other: Number) -> Rounded:
        return self - (-as_rounded(other, self.value))

    def __sub__(self, other: Number) -> Rounded:
        a, b = self, as_rounded(other, self.value)
        value = a.value - b.value
        # The rounding error of a difference is known, and often 0, as for 1 - x beside 1.
        return _bounded(value, lambda: a.error + b.error + difference_error(a.value, b.value).detach().abs())

    def __mul__(self, other: Number) -> Rounded:
        a, b = self, as_rounded(other, self.value)
        value = a.value * b.value
        return _bounded(value, lambda: _times(a.error, b.size) + _times(b.error, a.size) + EPS * _size(value))

    def __truediv__(self, other: Number) -> Rounded:
        a, b = self, as_rounded(other, self.value)
        value = a.value / b.value
        return _bounded(value, lambda: (a.error + _times(b.error, _size(value))) / b.size + EPS * _size(value))

    __radd__ = __add__

    def __rsub__(self, other: float | Tensor) -> Rounded:
        return -self + other

    __rmul__ = __mul__

    def __rtruediv__(self, other: float | Tensor) -> Rounded:
        return as_rounded(other, self.value) / self


def as_rounded(x: Number, like: Tensor) -> Rounded:
    """Return x itself; a tensor counts as exact, a number as rounded unless it is a multiple of ¼."""
    if isinstance(x, Rounded):
        return x
    if isinstance(x, Tensor):
        return Rounded(x)
    number = torch.full((), x, dtype=like.dtype, device=like.device)
    return Rounded(number, 0.0 if float(4 * x).is_integer() else EPS * abs(x))


def _bounded(value: Tensor, error: Callable[[], Tensor | float]) -> Rounded:
    """Return the value with its error, which is left out where values cannot be read."""
    return Rounded(value, 0.0 if is_traced() else error())


def _size(value: Tensor) -> Tensor:
    return value.detach().abs()


def _times(error: Tensor | float, size: Tensor) -> Tensor | float:
    """Return error · size, 0 where the error is 0, whatever the size is."""
    return 0.0 if isinstance(error, float) and error == 0 else error * size


def elementwise(
    f: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor], floor: float = 0.0
) -> Callable[[Rounded], Rounded]:
    """Return a function of the library as a function of `Rounded` numbers.

    Args:
        f: the function, which loses `_LIBRARY` of its value, and of `floor`.
        slope: the derivative of f, for the error that the argument brings.
        floor: a size that the error is relative to even where f is smaller, as beside a root.
    """

    def of_rounded(x: Rounded) -> Rounded:
        value = f(x.value)

        def error() -> Tensor:
            inherited = _times(x.error, _size(slope(x.value.detach()))) if isinstance(x.error, Tensor) else 0.0
            return inherited + _LIBRARY * _size(value).clamp_min(floor)

        return _bounded(value, error)

    return of_rounded


def _digamma(x: Tensor) -> Tensor:
    return x.log() - 0.5 / x + stirling_slope(x)


def _trigamma(x: Tensor) -> Tensor:
    return binet_trigamma(x) + 1 / x


exp = elementwise(torch.exp, torch.exp)
expm1 = elementwise(stable_expm1, torch.exp)
log = elementwise(torch.log, torch.reciprocal)
log1p = elementwise(lambda t: torch.log1p(at_least(t, above_minus_one(t))), lambda t: 1 / (1 + t))
"""log(1 + x), kept away from x = -1."""
erf = elementwise(torch.erf, lambda t: 2 / math.sqrt(math.pi) * torch.exp(-t * t))
atan = elementwise(torch.atan, lambda t: 1 / (1 + t * t))
cos = elementwise(torch.cos, torch.sin)
lgamma = elementwise(torch.lgamma, torch.digamma, floor=1.0)
digamma = elementwise(_digamma, _trigamma, floor=1.0)
"""ψ(x) for x > 0, with a derivative that has all its digits, unlike torch's."""
trigamma = elementwise(_trigamma, lambda t: _trigamma(t) * (1 + 2 / t))


def square(x: Rounded) -> Rounded:
    """Return x²."""
    return x * x


def where(mask: Tensor, a: Rounded, b: Rounded) -> Rounded:
    """Return a where the mask is set and b elsewhere; each must be finite where it is not taken."""
    a_error, b_error = (scalar(x.error, a.value.device, a.value.dtype) for x in (a, b))
    return Rounded(torch.where(mask, a.value, b.value), torch.where(mask, a_error, b_error))


def positive(x: Rounded) -> Rounded:
    """Return max(x, 0)."""
    return Rounded(torch.where(x.value > 0, x.value, 0 * x.value), x.error)
