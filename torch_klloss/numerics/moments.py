"""Moments of single families and their distances from a Normal, for the pairs of unlike families.

Everything takes and returns float64. Each quantity keeps its digits where it becomes small, which is where two unlike
families can come near one another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_klloss.numerics.custom_gradient import custom_gradient
from torch_klloss.numerics.elementary import (
    at_least,
    at_most,
    gkl,
    horner,
    isd_from_gap,
    log_ratio,
    tiny,
    x_minus_log1p,
)
from torch_klloss.numerics.error_free import product_error, product_gap, quotient_error, sum_error
from torch_klloss.numerics.exponentials import e2, expm1
from torch_klloss.numerics.lgamma import LARGE, NODES, SHIFT, bregman, stirling_bregman

# B_2k/(2k)! with the Bernoulli numbers, from k = 1 on: of ½ coth(t/2) - 1/t in t², good to 1e-17 for |t| ≤ 1.
_BERNOULLI = (
    1 / 12,
    -1 / 720,
    1 / 30240,
    -1 / 1209600,
    1 / 47900160,
    -691 / 1307674368000,
    1 / 74724249600,
    -3617 / 10670622842880000,
    43867 / 5109094217170944000,
    -174611 / 802857662698291200000,
)
_EVEN = tuple(range(2, 2 * len(_BERNOULLI) + 1, 2))


# Divergences with custom gradients. The derivatives by a and b are complete; there is none by the gap.


def _gkl_partials(needs: Sequence[bool], a: Tensor, b: Tensor, gap: Tensor) -> Sequence[Tensor | None]:
    at_zero = torch.where(a == 0, 1.0, 0.0).to(b.dtype)
    return log_ratio(a, b, gap), torch.where(b == 0, at_zero, -gap / torch.where(b == 0, 1.0, b)), None


@custom_gradient(_gkl_partials)
def generalised_kl(a: Tensor, b: Tensor, gap: Tensor) -> Tensor:
    """Return a log(a/b) - a + b ≥ 0, given gap = a - b from before a and b were rounded."""
    return gkl(a, b, gap)


@custom_gradient(lambda needs, a, b, gap: (gap / b / a, -gap / b / b, None))
def itakura_saito(a: Tensor, b: Tensor, gap: Tensor) -> Tensor:
    """Return a/b - 1 - log(a/b) ≥ 0, given gap = a - b from before a and b were rounded."""
    return isd_from_gap(gap, a, b)


@custom_gradient(lambda needs, x: (x / (1 + x),))
def log1p_lag(x: Tensor) -> Tensor:
    """Return x - log(1 + x) ≥ 0."""
    return x_minus_log1p(x)


@custom_gradient(lambda needs, x: (expm1(x),))
def exp_lead(x: Tensor) -> Tensor:
    """Return exp(x) - 1 - x ≥ 0."""
    return e2(x)


# Gamma and Beta: Stirling's remainder R(x) = lgamma(x) - (x - ½) log x + x - ½ log 2π, for all x > 0.


def stirling(x: Tensor) -> Tensor:
    """Return R(x)."""
    is_small = x < LARGE
    steps = sum(((x + k + 0.5) * torch.log1p(1 / (x + k)) for k in range(1, SHIFT)), (x + 0.5) * torch.log1p(1 / x))
    s = torch.where(is_small, x + SHIFT, x).reciprocal()
    rest = s * sum((w / k / (s * s + k) for k, w in NODES), torch.zeros_like(s))
    return torch.where(is_small, steps - SHIFT, 0.0) + rest


def stirling_slope(x: Tensor) -> Tensor:
    """Return R'(x) = ψ(x) - log x + 1/(2x)."""
    is_small = x < LARGE
    steps = sum((torch.log1p(1 / (x + k)) - _harmonic_mean(x + k) for k in range(1, SHIFT)), torch.log1p(1 / x))
    square = torch.where(is_small, x + SHIFT, x).reciprocal().square()
    rest = square * sum((w * (square / k - 1) / (square + k).square() for k, w in NODES), torch.zeros_like(x))
    return torch.where(is_small, steps - _harmonic_mean(x), 0.0) + rest


def _harmonic_mean(x: Tensor) -> Tensor:
    return (1 / x + 1 / (x + 1)) / 2


def stirling_gap(gap: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return R(x) - R(y), given gap = x - y as it was before x or y was rounded."""
    s, r = at_least(x, LARGE).reciprocal(), at_least(y, LARGE).reciprocal()
    terms = (w * (s * r / k - 1) / ((s * s + k) * (r * r + k)) for k, w in NODES)
    large = gap * s * r * sum(terms, torch.zeros_like(s))
    return torch.where(torch.minimum(x, y) < LARGE, stirling(x) - stirling(y), large)


def stirling_slope_gap(gap: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return R'(x) - R'(y), given gap = x - y as it was before x or y was rounded."""
    s, r = at_least(x, LARGE).reciprocal(), at_least(y, LARGE).reciprocal()
    pairs = ((k, w, (s * s + k).reciprocal(), (r * r + k).reciprocal()) for k, w in NODES)
    total = sum((w * (u * v) * (2 * k * (u + v) - 3) for k, w, u, v in pairs), torch.zeros_like(s))
    large = gap * s * r * (s + r) * total
    return torch.where(torch.minimum(x, y) < LARGE, stirling_slope(x) - stirling_slope(y), large)


def stirling_bregman_gap(a: Tensor, b: Tensor) -> Tensor:
    """Return R(a) - R(b) - R'(b) (a - b)."""
    far_a, far_b = at_least(a, LARGE), at_least(b, LARGE)
    small = bregman(a, b) - itakura_saito(a, b, a - b) / 2
    return torch.where(torch.minimum(a, b) < LARGE, small, stirling_bregman(far_a - far_b, far_a, far_b))


def gamma_excess(shape: Tensor) -> Tensor:
    """Return the KL of a Gamma from the Normal of its mean and variance, 1/(3α) for a large shape α.

    It is ½ log(2πe α) less the entropy at rate 1: 1/(2α) - R(α) - (1 - α) R'(α).
    """
    return 1 / (2 * shape) - stirling(shape) - (1 - shape) * stirling_slope(shape)


def beta_excess(a: Tensor, b: Tensor) -> Tensor:
    """Return the KL of a Beta from the Normal of its mean and variance.

    With G of `gamma_excess` it is G(a) + G(b) - ½ log(1 + 1/S) - 1/S + R(S) - (S - 2) R'(S), S = a + b. For large
    arguments its part of order 1/S is (a - b)²/(3abS), which vanishes at a = b.
    """
    total = a + b
    of_total = torch.log1p(1 / total) / 2 + 1 / total - stirling(total) + (total - 2) * stirling_slope(total)
    direct = gamma_excess(a) + gamma_excess(b) - of_total
    far_a, far_b = at_least(a, LARGE), at_least(b, LARGE)
    far = far_a + far_b
    skew = (far_a - far_b) / far_a * ((far_a - far_b) / far_b) / (3 * far)
    s = 1 / far
    rest = s * s / 6 - log1p_lag(s) / 2 + _stirling_tails(far, 2.0)
    large = skew + (1 / far_a**2 + 1 / far_b**2) / 12 + _stirling_tails(far_a, 1.0) + _stirling_tails(far_b, 1.0) - rest
    return torch.where(torch.minimum(a, b) < LARGE, direct, large)


def _stirling_tails(x: Tensor, c: float) -> Tensor:
    """Return (x - c) (R'(x) + 1/(12x²)) - (R(x) - 1/(12x)) ≥ 0 for x ≥ 6."""
    s = 1 / x
    square = s * s
    slope = sum((w * (3 * k + square) / (k * (square + k)).square() for k, w in NODES), torch.zeros_like(x))
    value = sum((w / (k * k * (square + k)) for k, w in NODES), torch.zeros_like(x))
    return square * s * ((1 - c * s) * slope + value)


def beta_mean_gap(a: Tensor, b: Tensor, point: Tensor) -> Tensor:
    """Return the mean of a Beta less `point`: (a (1 - point) - b point) / (a + b)."""
    rest = 1 - point
    return (product_gap(a, rest, b, point) + a * sum_error(torch.ones_like(point), -point, rest)) / (a + b)


def beta_std(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the standard deviation of a Beta, rounded, and its rounding error."""
    total = a + b
    std = ((a / total) * (b / total) / (total + 1)).sqrt()
    whole = (total, sum_error(a, b, total))
    more = (total + 1, whole[1] + sum_error(total, torch.ones_like(total), total + 1))
    root = _times((std, torch.zeros_like(std)), whole)
    square = _times(_times(root, root), more)
    product = _times((a, torch.zeros_like(a)), (b, torch.zeros_like(b)))
    gap = (product[0] - square[0]) + (product[1] - square[1])
    return std, (gap / (2 * square[0]) * std).detach()


def _times(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the product of two numbers, each given rounded and with its rounding error."""
    high = x[0] * y[0]
    return high, product_error(x[0], y[0], high) + x[0] * y[1] + x[1] * y[0]


# ContinuousBernoulli, of the size t ≥ 0 of its log-odds: the density is exp(t x) t/(exp(t) - 1), or that mirrored.


def tilt_log_norm(t: Tensor) -> Tensor:
    """Return log((exp(t) - 1)/t) - t/2 ≥ 0."""
    far = at_least(t, 1.0)
    closed = far / 2 + torch.log(-expm1(-far) / far)
    return torch.where(t < 1, _series(at_most(t, 1.0), [1 / k for k in _EVEN]), closed)


def tilt_divergence(t: Tensor) -> Tensor:
    """Return the KL from the Uniform on [0, 1], t/(exp(t) - 1) - 1 + log(t/(1 - exp(-t)))."""
    far = at_least(t, 1.0)
    closed = far / expm1(far) - 1 - torch.log(-expm1(-far) / far)
    return torch.where(t < 1, _series(at_most(t, 1.0), [1 - 1 / k for k in _EVEN]), closed)


def tilt_mean(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance of the mean from its nearer end, 1/t - 1/(exp(t) - 1), and its rounding error."""
    near, far = at_most(t, 1.0), at_least(t, 1.0)
    return _or_series(t, 0.5 - near * horner(near * near, _BERNOULLI), far, -1 / expm1(far))


def tilt_std(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the standard deviation, the root of 1/t² - exp(-t)/(1 - exp(-t))², and its rounding error."""
    near, far = at_most(t, 1.0), at_least(t, 1.0)
    series = horner(near * near, [(k - 1) * c for k, c in zip(_EVEN, _BERNOULLI, strict=True)]).sqrt()
    drop = far / expm1(-far) * (far * torch.exp(-far) / expm1(-far))
    return _or_series(t, series, far, -drop / (1 + (1 - drop).sqrt()) / far)


def _or_series(t: Tensor, series: Tensor, far: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Return 1/t + rest, rounded, and its rounding error; for t < 1 the series."""
    inverse = 1 / far
    total = inverse + rest
    lost = quotient_error(torch.ones_like(far), far, inverse) + sum_error(inverse, rest, total)
    return torch.where(t < 1, series, total), torch.where(t < 1, 0.0, lost)


def _series(t: Tensor, factors: list[float]) -> Tensor:
    return t * t * horner(t * t, [f * c for f, c in zip(factors, _BERNOULLI, strict=True)])


# Uniform on [low, high], low ≥ 0.


def uniform_log_drop(low: Tensor, width: Tensor) -> Tensor:
    """Return log(high) - E[log x] in [0, 1]: 1 - low/width log(high/low), 1 where low is 0."""
    ratio = width / at_least(low, tiny(low))
    near = at_most(ratio, 1.0)
    far = 1 - low / width * torch.log1p(at_least(ratio, 1.0))
    return torch.where(ratio < 1, log1p_lag(near) / near, far)


def uniform_jensen_gap(low: Tensor, width: Tensor) -> Tensor:
    """Return log E[x] - E[log x] ≥ 0; a series in the ratio of half the width to the mean, where that is small."""
    s = width / (2 * low + width)
    near = at_most(s, 0.25)
    series = near * near * horner(near * near, [1 / (k * (k + 1)) for k in range(2, 28, 2)])
    return torch.where(s < 0.25, series, uniform_log_drop(low, width) - torch.log1p(s))


def uniform_log_width(low: Tensor, high: Tensor) -> Tensor:
    """Return log(high - low) for an interval within [0, 1], from what it lacks where that is little."""
    width, lack = high - low, low + (1 - high)
    return torch.where(width < 0.5, width.log(), torch.log1p(-at_most(lack, 0.75)))


# Pareto of tail index alpha > 1.


def pareto_tail_drop(alpha: Tensor) -> Tensor:
    """Return log E[x] - E[log x] ≥ 0 of a Pareto, -1/α - log(1 - 1/α)."""
    return log1p_lag(-1 / alpha)
