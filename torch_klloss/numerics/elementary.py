"""Building blocks of the elementary closed forms: each ≥ 0, exactly 0 at equality, and accurate near it.

They compute in float64 whatever comes in. A float32 number has a relative distance of at least 6e-8 from its
neighbours, which float64 subtracts without a series; only float64 itself needs one near equality.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_klloss.numerics.tracing import is_traced, needs_plain_operations

# A parameter below this counts as this much in the derivative of a logarithm, which stays finite at 0.
TINY = 1e-280
ABOVE_MINUS_ONE = -1 + 2.0**-53
# Of x - log(1 + x), in s² with s = x/(2 + x); good to 1e-16 for |s| ≤ 0.2.
_ARTANH = tuple(1 / k for k in range(3, 23, 2))
_MAX_S = 0.2
# Of (t coth(t/2) - 2)/t², in t²: 2 B_2k/(2k)! with the Bernoulli numbers; good to 1e-16 for |t| ≤ 1.
_COTH = (
    1 / 6,
    -1 / 360,
    1 / 15120,
    -1 / 604800,
    1 / 23950080,
    -691 / 653837184000,
    1 / 37362124800,
    -3617 / 5335311421440000,
    43867 / 2554547108585472000,
    -174611 / 401428831349145600000,
)


def horner(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Return the polynomial of x whose coefficients are given from the constant one up."""
    # A compiler prefers numbers, and an accelerator would be waited for by a copy; on the CPU each costs an operation.
    if not x.is_cpu or needs_plain_operations():
        value = torch.full_like(x, coefficients[-1])
        for c in reversed(coefficients[:-1]):
            value = value * x + c
        return value
    *lower, value = x.new_tensor(coefficients).unbind()
    for constant in reversed(lower):
        value = torch.addcmul(constant, value, x)
    return value


def has_float64(*tensors: Tensor) -> bool:
    """Return whether one of the tensors is in float64, so that float64 arithmetic has no digits to spare."""
    return any(t.dtype == torch.float64 for t in tensors)


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype that a sum of the tensors would have."""
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def may_fall_to(x: Tensor, bound: float) -> bool:
    """Return whether the case of x at or below the bound must be computed: x reaches it, or cannot be read."""
    return is_traced() or not x.is_cpu or not (x.numel() == 0 or x.amin().item() > bound)


def may_be_infinite(x: Tensor) -> bool:
    """Return whether an element of x may not be finite, from the sum, which is the cheapest to read."""
    return is_traced() or not x.is_cpu or not math.isfinite(x.sum().item())


def sign_of(x: Tensor) -> Tensor:
    """Return 1 or -1, at zero one of them, with the derivative 0."""
    return torch.copysign(x.new_ones(()), x)


def magnitude(x: Tensor) -> Tensor:
    """Return |x| with the derivative 1 at zero, where `abs` has 0: for mirrored halves that meet there."""
    return torch.where(x < 0, -x, x)


def at_least(x: Tensor, bound: float) -> Tensor:
    """Return x, and the bound where x is below it; the derivative is 1 at the bound.

    That of `clamp` at a bound is a convention, which torch has changed. NaN stays NaN.
    """
    return torch.where(x < bound, bound, x)


def at_most(x: Tensor, bound: float) -> Tensor:
    """Return x, and the bound where x is above it; as `at_least`."""
    return torch.where(x > bound, bound, x)


def within(x: Tensor, low: float, high: float) -> Tensor:
    """Return x, and the nearer of the bounds where x is outside of them; as `at_least`."""
    return at_most(at_least(x, low), high)


def log_ratio(a: Tensor, b: Tensor, gap: Tensor) -> Tensor:
    """Return log(a/b) of a, b ≥ 0 in float64, given gap = a - b before it was rounded; a bound, not inf, at zero.

    The logarithm is taken of 1 plus the gap over the smaller of the two, which loses no digits however near or far
    they are.
    """
    sign = sign_of(gap)
    is_differentiated = torch.is_grad_enabled() or needs_plain_operations()  # where a tie must not be split
    smaller = torch.where(sign > 0, b, a) if is_differentiated else torch.minimum(a, b)
    return sign * torch.log1p(sign * gap / smaller.clamp_min(TINY))


def isd(a: Tensor, b: Tensor, *, series: bool | None = None) -> Tensor:
    """Return the Itakura-Saito divergence a/b - 1 - log(a/b) of positive a and b, in float64.

    Args:
        a: the numerator.
        b: the denominator.
        series: whether a and b may be nearer to one another than float32 numbers can be; by default, whether one of
            them is in float64.

    References:
        *Analysis synthesis telephony based on the maximum likelihood method* (Itakura and Saito, 1968).
    """
    series = has_float64(a, b) if series is None else series
    a, b = a.double(), b.double()
    gap = a - b
    x = gap / b
    # log(b/a) rather than -log(1 + x), for an a far below b; far above it the clamp vanishes beside x.
    far = x + torch.log1p((-gap / a).clamp_min(ABOVE_MINUS_ONE))
    if not series:
        return far
    s = gap / (a + b)
    return torch.where(s.abs() < _MAX_S, _x_minus_log1p_near_zero(x, s), far)


def isd_from_gap(gap: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return a/b - 1 - log(a/b) for a, b > 0, given gap = a - b, which is known better than a and b are."""
    x = gap / b
    s = gap / (a + b)  # log(a/b) = 2 artanh(s), and x = 2s/(1 - s)
    square = s * s
    near = s * (x - 2 * square * horner(square, _ARTANH))
    far = x - torch.sign(gap) * torch.log1p(gap.abs() / torch.minimum(a, b))
    return torch.where(square < 1 / 25, near, far)


def gkl(a: Tensor, b: Tensor, gap: Tensor, *, series: bool) -> Tensor:
    """Return the generalised KL divergence a log(a/b) - a + b of a, b ≥ 0 in float64; inf where only b is 0.

    Args:
        a: the first measure.
        b: the second one.
        gap: a - b, from before a and b were rounded.
        series: whether a and b may be nearer to one another than float32 numbers can be.
    """
    # Where a is far below b, the logarithm and its clamp vanish beside b.
    value = a * torch.log1p((gap / b.clamp_min(TINY)).clamp_min(ABOVE_MINUS_ONE)) - gap
    if series:
        s = gap / (a + b).clamp_min(TINY)
        square = s * s
        near = s * torch.addcmul(gap, a * square, horner(square, _ARTANH), value=2)
        value = torch.where(s.abs() < _MAX_S, near, value)
    return torch.where((b == 0) & (a > 0), torch.inf, value) if may_fall_to(b, 0) else value


def gkl_of_log_ratio(q: Tensor, p: Tensor, z: Tensor) -> Tensor:
    """Return q log(q/p) - q + p, given a finite z = log(p/q) as well, in float64.

    The two forms agree; the first keeps its digits near equality and the second where p is far above q.
    """
    return torch.where(z.abs() < 1, q * _e2_near_zero(z), torch.addcmul(p - q, q, z, value=-1))


def x_minus_log1p(x: Tensor) -> Tensor:
    """Return x - log(1 + x) ≥ 0 of x > -1 in float64."""
    s = x / (2 + x)
    return torch.where(s.abs() < _MAX_S, _x_minus_log1p_near_zero(x, s), x - torch.log1p(x))


def e2(x: Tensor, *, series: bool = True) -> Tensor:
    """Return exp(x) - 1 - x ≥ 0 in float64.

    Near zero it is x² (1 - x g)/(2 - x + x² g) with x coth(x/2) = 2 + x² g, whose series converges fast.

    Args:
        x: any float64 numbers.
        series: whether all digits of float64 are needed. Otherwise ten suffice, and three terms of
            x²/2 + x³/6 + x⁴/24 + … give them up to where the difference is as good.
    """
    if not series:
        near = x * x * (0.5 + x * (1 / 6 + x * (1 / 24)))
        return torch.where(x.abs() < 2.0**-10, near, torch.expm1(x) - x)
    return torch.where(x.abs() < 1, _e2_near_zero(x), torch.expm1(x) - x)


def _e2_near_zero(x: Tensor) -> Tensor:
    """Return exp(x) - 1 - x of |x| < 1, and something finite elsewhere."""
    x = x.clamp(-1, 1)
    square = x * x
    g = horner(square, _COTH)
    return square * (1 - x * g) / torch.addcmul(2 - x, square, g)


def _x_minus_log1p_near_zero(x: Tensor, s: Tensor) -> Tensor:
    """With s = x/(2 + x), log(1 + x) = 2 artanh s and x = 2s/(1 - s): xs - 2s³ (1/3 + s²/5 + s⁴/7 + …)."""
    square = s * s
    return s * torch.addcmul(x, square, horner(square, _ARTANH), value=-2)


def infinity(*parameters: Tensor) -> Tensor:
    """Return inf in the broadcast shape of the parameters, NaN where one of them is; its gradient is 0."""
    value = torch.full((), torch.inf, dtype=parameters[0].dtype, device=parameters[0].device)
    for parameter in parameters:
        value = torch.where(parameter.isnan(), parameter, value)
    return value
