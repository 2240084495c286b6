"""Error-free transformations: rounding errors of float64 sums, products and quotients.

References:
    *The art of computer programming*, volume 2, section 4.2.2 (Knuth, 1969), for sums.
    *A floating-point technique for extending the available precision* (Dekker, 1971), for products.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sum_error(a: Tensor, b: Tensor, total: Tensor) -> Tensor:
    """Return a + b - total, where `total` is a + b rounded."""
    b_rounded = total - a
    return ((a - (total - b_rounded)) + (b - b_rounded)).detach()


def difference_error(a: Tensor, b: Tensor) -> Tensor:
    """Return the exact a - b less the rounded one; NaN where one of them is infinite."""
    difference = a - b
    minus_b = difference - a
    return (a - (difference - minus_b)) - (b + minus_b)


def product_error(a: Tensor, b: Tensor, product: Tensor) -> Tensor:
    """Return a b - product, where `product` is a b rounded."""
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    return a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)


def quotient_error(a: Tensor, b: Tensor, quotient: Tensor) -> Tensor:
    """Return a/b - quotient, where `quotient` is a/b rounded."""
    product = quotient * b
    return (((a - product) - product_error(quotient, b, product)) / b).detach()


def product_gap(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Return a b - c d to the last digit, however near the two products are."""
    left, right = a * b, c * d
    return (left - right) + (product_error(a, b, left) - product_error(c, d, right)).detach()


def multiple(constant: tuple[float, float], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return c x rounded and its rounding error, for a constant c = c[0] + c[1] of twice the digits."""
    high = constant[0] * x
    return high, (product_error(torch.full_like(x, constant[0]), x, high) + constant[1] * x).detach()


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a sum of two numbers of half the digits."""
    scaled = 134217729.0 * x  # 2²⁷ + 1
    high = scaled - (scaled - x)
    return high, x - high
