"""The Bregman divergence of lgamma(x) - x log x, and the differences of digamma that are its derivatives.

The KL divergences of the gamma family are Bregman divergences of lgamma. At large arguments nearly all of one is the
divergence of x log x, which belongs to the means of the distributions; the rest is B, computed without cancellation:

- lgamma(x) = lgamma(x + n) - Σ_{k<n} log(x + k), and the Bregman divergence of -log is isd(a, b) = a/b - 1 - log(a/b);
- lgamma(x) = (x - ½) log x - x + ½ log 2π + S(x), and S(x) = Σ wᵢ x / (x² + τᵢ) is a Gauss rule of Binet's integral:
  rational, so that its own Bregman divergence is (a - b)² times positive terms.

References:
    *Algorithm AS 103: psi (digamma) function* (Bernardo, 1976), for the recurrence up to where the rest is simple.
    *Handbook of continued fractions for special functions* (Cuyt et al., 2008), section 12.2, for S as a Stieltjes
    function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

from torch_klloss.numerics.custom_gradient import custom_gradient
from torch_klloss.numerics.elementary import constants, isd_from_gap, log_ratio
from torch_klloss.numerics.tracing import needs_plain_operations

_Number: TypeAlias = "float | Tensor"

SHIFT = 4
LARGE = 6.0  # no recurrence from here on

# (1/τ, w/τ²): the Gauss rule of six points, exact for the first twelve terms of Stirling's series. From x = 4 on, next
# to the terms of the recurrence, and from x = 6 on without them, it gives the divergence of lgamma to 6e-16.
NODES = (
    (76.374138658951859, 456.81741299341849),
    (3.1454081896706559, 0.048150801948820622),
    (0.7483261845312942, 8.3378175300790983e-5),
    (0.27410903881261714, 1.2468069819802201e-7),
    (0.12045283145193348, 7.0646417677711542e-11),
    (0.056142908389796309, 5.0348164107644745e-15),
)


def _over_nodes(term: Callable[[_Number], tuple[Tensor, Tensor]], like: Tensor) -> Tensor:
    """Return Σ w n(k)/d(k) over the nodes (k, w), of the terms n(k), d(k).

    One after the other where memory counts, and all at once on an accelerator, where launches do.
    """
    if _is_summed_at_once(like):
        nodes, weights = (leading(numbers, like) for numbers in zip(*NODES, strict=True))
        numerator, denominator = term(nodes)
        return (weights * numerator / denominator).sum(0)
    total = torch.zeros_like(like)
    for k, w in NODES:
        total = torch.addcdiv(total, *term(k), value=w)
    return total


def _over_steps(term: Callable[[_Number], Tensor], like: Tensor) -> Tensor:
    """Return Σ term(k) over k = 0, …, SHIFT - 1, as `_over_nodes` does."""
    if _is_summed_at_once(like):
        return term(leading(tuple(range(SHIFT)), like)).sum(0)
    return sum((term(k) for k in range(1, SHIFT)), term(0))


def _is_summed_at_once(like: Tensor) -> bool:
    return not (like.is_cpu or needs_plain_operations())


def leading(numbers: Sequence[float], like: Tensor) -> Tensor:
    """Return numbers along a new first dimension of a tensor, on its device."""
    return _column(tuple(numbers), like.dtype, like.device).view(-1, *(1,) * like.dim())


@cache
def _column(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.stack(constants(numbers, dtype, device))


def _partials(needs: Sequence[bool], a: Tensor, b: Tensor) -> Sequence[Tensor | None]:
    by_a = binet_digamma_difference(a - b, a, b) if needs[0] else None
    by_b = (b - a) * binet_trigamma(b) if needs[1] else None
    return by_a, by_b


@custom_gradient(_partials)
def bregman(a: Tensor, b: Tensor) -> Tensor:
    """Return the Bregman divergence B(a, b) of lgamma(x) - x log x, for float64 a, b > 0 that broadcast.

    After n steps, Σ_{k<n} isd(a + k, b + k) + ½ isd(a + n, b + n) and the divergence of S exceed B by what the
    divergence of x log x has lost: ∫ isd(a + t, b + t) dt = a isd(b (a + n), a (b + n)) + n isd(a + n, b + n). Where
    both arguments are large no step is taken, and nothing cancels.
    """
    a, b = torch.broadcast_tensors(a, b)
    difference = a - b
    small = torch.minimum(a, b) < LARGE
    if _is_summed_at_once(a):
        k = leading(range(SHIFT + 1), a)
        all_a, all_b = a + k, b + k
        far_a, far_b = all_a[SHIFT], all_b[SHIFT]
        gaps = difference * leading([1] * (SHIFT + 1) + [-SHIFT], a)
        terms = isd_from_gap(
            gaps, *(torch.cat((x, y.unsqueeze(0))) for x, y in ((all_a, b * far_a), (all_b, a * far_b)))
        )
    else:
        far_a, far_b = a + SHIFT, b + SHIFT
        terms = isd_from_gap(
            torch.stack((difference,) * (SHIFT + 1) + (-SHIFT * difference,)),
            torch.stack((*(a + k for k in range(SHIFT)), far_a, b * far_a)),
            torch.stack((*(b + k for k in range(SHIFT)), far_b, a * far_b)),
        )
    steps = terms[:SHIFT].sum(0) + (0.5 - SHIFT) * terms[SHIFT] - a * terms[SHIFT + 1]
    far_a, far_b = torch.where(small, far_a, a), torch.where(small, far_b, b)
    return torch.where(small, steps, 0.5 * terms[0]) + stirling_bregman(difference, far_a, far_b)


def stirling_bregman(difference: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the Bregman divergence of S(x) = lgamma(x) - (x - ½) log x + x - ½ log 2π, for a, b ≥ 4."""
    y, s, r = difference / b, a.reciprocal(), b.reciprocal()
    a_square, b_square, cross = s * s, r * r, r * (r + 2 * s)
    total = _over_nodes(lambda k: (k - cross, (a_square + k) * (b_square + k).square()), y)
    return y * (y * s) * total


def binet_digamma_difference(difference: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return [ψ(a) - log a] - [ψ(b) - log b], from a difference a - b that is known better than a and b are."""
    small = torch.minimum(a, b) < LARGE
    far_a, far_b = a + SHIFT, b + SHIFT
    steps = _over_steps(lambda k: difference / ((a + k) * (b + k)), a + b)
    steps = steps + log_ratio(b * far_a, a * far_b, -SHIFT * difference)
    far_a, far_b = torch.where(small, far_a, a), torch.where(small, far_b, b)
    rest = difference / (2 * far_a * far_b) + stirling_slope_difference(difference, far_a, far_b)
    return torch.where(small, steps, 0.0) + rest


def stirling_slope_difference(difference: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return S'(a) - S'(b) of the S of `stirling_bregman`, for a, b ≥ 4."""
    s, r = a.reciprocal(), b.reciprocal()
    a_square, b_square = s * s, r * r
    squares = a_square + b_square

    def term(k: _Number) -> tuple[Tensor, Tensor]:
        product = (a_square + k) * (b_square + k)
        return 2 * k * squares + 4 * k * k - 3 * product, product.square()

    return difference * s * r * (s + r) * _over_nodes(term, squares)


def binet_trigamma(x: Tensor) -> Tensor:
    """Return ψ'(x) - 1/x, to the digits that float64 has; torch.polygamma gives nine."""
    small = x < LARGE
    far = x + SHIFT
    steps = _over_steps(lambda k: (x + k).square().reciprocal(), x) - SHIFT / (x * far)
    far = torch.where(small, far, x)
    return torch.where(small, steps, 0.0) + _trigamma_rest(far)


def trigamma(x: Tensor) -> Tensor:
    """Return ψ'(x) to nine digits, which is what torch has of it."""
    return torch.polygamma(1, x)


def _trigamma_rest(x: Tensor) -> Tensor:
    """Return ψ'(x) - 1/x for x ≥ 4: 1/(2x²) + S''(x)."""
    r = x.reciprocal()
    square = r * r
    total = _over_nodes(lambda k: (k - 3 * square, (square + k) ** 3), r)
    return square * (0.5 + 2 * r * total)
