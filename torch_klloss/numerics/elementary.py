"""Building blocks of the elementary closed forms: each ≥ 0, exactly 0 at equality, and accurate near it.

They compute in the dtype of what comes in, with about five units in the last place of it, by operations that are quick
on every device: no branch on data, and on the CPU no `where`, which costs there as much as twenty additions. Numbers
are written as floats: torch casts an integer first, which costs as much as another operation.

A function f with f(1) = 0 whose series is good between a half and two is computed as f(r) = near(c) + far(r, c), with
c = clamp(r, ½, 2) and a second term that is exactly 0 where r = c. The derivative does not depend on that of `clamp`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from torch_klloss.numerics import devices
from torch_klloss.numerics.devices import can_be_read
from torch_klloss.numerics.tracing import (
    is_forward_mode,
    is_func_transformed,
    is_traced,
    needs_plain_operations,
    without_func,
)

# Of (artanh(s)/s - 1)/s², in s²: minimax for |s| ≤ ⅓, that is for ratios from a half to two; relative errors 5e-7,
# of a term that is a ninth of the whole, and 1e-16.
_ARTANH = {
    torch.float32: (0.3333331961, 0.2000390271, 0.1411462936, 0.1345224958),
    torch.float64: (
        0.3333333333333333,
        0.2000000000000802,
        0.14285714283362436,
        0.1111111137803498,
        0.0909089375112116,
        0.07692812043242968,
        0.06656631300983523,
        0.060047091905802,
        0.04379156062166165,
        0.08126792782243371,
    ),
}
_ROOT_BITS = 0x3F3504F3  # of the root of ½ in float32
_UNFELT = 1e-250  # in float64, by a number of float32
_LEAST_LOG = -1e3
_SMALL_RATIO = 1e-36  # a float32 with all of its digits, whose reciprocal is one as well
# A parameter below this counts as this much in the derivative of a logarithm, which stays finite at 0.
_TINY = {torch.float32: 1e-30, torch.float64: 1e-280}


def horner(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Return the polynomial of x whose coefficients are given from the constant one up."""
    if needs_plain_operations():  # a compiler prefers numbers
        value = x * coefficients[-1] + coefficients[-2]
        for c in reversed(coefficients[:-2]):
            value = value * x + c
        return value
    *lower, value = constants(tuple(coefficients), x.dtype, x.device)  # one operation a coefficient, not two
    for constant in reversed(lower):
        value = torch.addcmul(constant, value, x)
    return value


@cache
def constants(coefficients: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Return numbers on a device, kept there, and written without a copy that would be waited for."""
    with torch.inference_mode(False), without_func():
        return tuple(torch.full((), c, dtype=dtype, device=device) for c in coefficients)


def tiny(x: Tensor) -> float:
    """Return what a parameter below it counts as, in the derivative of a logarithm, which stays finite at 0."""
    return _TINY[x.dtype]


def largest(x: Tensor) -> float:
    """Return the largest finite number of the dtype of x."""
    return torch.finfo(x.dtype).max


def above_minus_one(x: Tensor) -> float:
    """Return the number next to -1, at which log(1 + x) is finite."""
    return torch.finfo(x.dtype).eps / 2 - 1


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
    return not can_be_read(x) or not (x.numel() == 0 or x.amin().item() > bound)


def may_be_negative(x: Tensor) -> bool:
    """Return whether the case of a negative x must be computed: there is one, or x cannot be read."""
    return not can_be_read(x) or (x.numel() > 0 and x.amin().item() < 0)


def may_be_infinite(x: Tensor) -> bool:
    """Return whether an element of x may not be finite, from the sum, which is the cheapest to read."""
    return not can_be_read(x) or not math.isfinite(x.sum().item())


def is_differentiated() -> bool:
    """Return whether autograd may differentiate what is computed, instead of a hand-written derivative."""
    return torch.is_grad_enabled() or is_forward_mode()


def chooses(x: Tensor) -> bool:
    """Return whether one of two forms is chosen by `where`, which is cheap on an accelerator and in a graph.

    It costs a few units in the last place, which a graph in float64 has no reason to pay.
    """
    return not (is_differentiated() or can_be_read(x) or (is_traced() and x.dtype == torch.float64))


def sign_of(x: Tensor) -> Tensor:
    """Return 1 or -1, at zero one of them, with the derivative 0."""
    one = x.new_ones(()) if needs_plain_operations() else constants((1.0,), x.dtype, x.device)[0]
    return torch.copysign(one, x)


def magnitude(x: Tensor) -> Tensor:
    """Return |x| with the derivative 1 at zero, where `abs` has 0: for mirrored halves that meet there."""
    return torch.where(x < 0, -x, x)


def nan_below_zero(x: Tensor) -> Tensor:
    """Return x, NaN where it is below 0, by one operation."""
    return torch.threshold(x, -torch.finfo(x.dtype).smallest_normal, math.nan)


def replaced(x: Tensor, where: Tensor, number: float) -> Tensor:
    """Return x with a number in the places of a mask, by one operation."""
    if needs_plain_operations():
        return torch.where(where, number, x)
    return torch.where(where, constants((number,), x.dtype, x.device)[0], x)


def product(x: Tensor, y: Tensor, *, times: float) -> Tensor:
    """Return xy times a number, by one operation."""
    if needs_plain_operations():
        return x * y * times
    (zero,) = constants((0.0,), x.dtype, x.device)
    return torch.addcmul(zero, x, y, value=times)


def quotient(x: Tensor, y: Tensor, *, times: float) -> Tensor:
    """Return x/y times a number, by one operation."""
    if needs_plain_operations():
        return x / y * times
    (zero,) = constants((0.0,), x.dtype, x.device)
    return torch.addcdiv(zero, x, y, value=times)


def at_least(x: Tensor, bound: float) -> Tensor:
    """Return x, and the bound where x is below it; the derivative is 1 at the bound.

    That of `clamp` at a bound is a convention, which torch has changed. NaN stays NaN.
    """
    return torch.where(x < bound, bound, x) if is_differentiated() else x.clamp_min(bound)


def at_most(x: Tensor, bound: float) -> Tensor:
    """Return x, and the bound where x is above it; as `at_least`."""
    return torch.where(x > bound, bound, x) if is_differentiated() else x.clamp_max(bound)


def within(x: Tensor, low: float, high: float) -> Tensor:
    """Return x, and the nearer of the bounds where x is outside of them; as `at_least`."""
    return at_most(at_least(x, low), high)


def log_ratio(a: Tensor, b: Tensor, gap: Tensor) -> Tensor:
    """Return log(a/b) of a, b ≥ 0, given gap = a - b before it was rounded; a bound, not inf, at zero.

    The logarithm is taken of 1 plus the gap over the smaller of the two, which loses no digits however near or far
    they are.
    """
    sign = sign_of(gap)
    smaller = torch.where(sign > 0, b, a) if is_differentiated() else torch.minimum(a, b)  # a tie must not be split
    return sign * torch.log1p(sign * gap / smaller.clamp_min(tiny(gap)))


def widened(x: Tensor) -> Tensor:
    """Return x in the dtype to compute in: float64 for float32 in eager mode, where the device has it, else its own.

    Two float32 numbers have a relative distance of at least 6e-8, or none, which float64 subtracts without a series,
    and few operations count more there than narrow numbers.
    """
    return x.double() if has_digits_to_spare(x) else x


def narrowed(x: Tensor, like: Tensor) -> Tensor:
    """Return x in the dtype of another tensor: what `widened` has been used for."""
    if x.dtype is like.dtype:
        return x
    return x.float() if like.dtype is torch.float32 else x.to(like.dtype)  # the quicker of two spellings


def has_digits_to_spare(x: Tensor) -> bool:
    """Return whether `widened` gives x digits that it does not have."""
    return x.dtype == torch.float32 and not is_traced() and (x.is_cpu or devices.has_float64(x.device))


def excess(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return r = a/b, x = r - 1 and x - log(1 + x) ≥ 0 of positive a and b, all widened."""
    if has_digits_to_spare(a):
        ratio = a.double() / b
        x = ratio - 1.0
        return ratio, x, x - torch.log(ratio)  # both of the rounded ratio, whose rounding drops out
    gap = a - b
    ratio, x = a / b, gap / b
    return ratio, x, _excess_by_parts(a, b, gap, x) if _takes_parts(a) else lag(x, ratio)


def excess_of_squares(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return half of r² - 1 and that less log r, which is ≥ 0, of r = a/b; a and b positive and in one dtype."""
    if has_digits_to_spare(a):
        ratio = a.double() / b
        x = ratio - 1.0
        half = torch.addcmul(x, x, x, value=0.5)
        return narrowed(half, a), narrowed(half - torch.log(ratio), a)  # as in `excess`
    if _takes_parts(a):
        gap = a - b
        x = gap / b
        square = 0.5 * (x * x)
        return x + square, _excess_by_parts(a, b, gap, x, square)
    _, x, spread = excess(a, b)
    return torch.addcmul(x, x, x, value=0.5), torch.addcmul(spread, x, x, value=0.5)


def lag(x: Tensor, ratio: Tensor) -> Tensor:
    """Return x - log(1 + x) ≥ 0 of x > -1, given 1 + x as well, with the digits that it has where x is near -1.

    With s = x/(2 + x), log(1 + x) = 2 artanh(s) and x - 2s = xs.
    """
    if chooses(x):
        s, square, third = artanh_terms(x)
        return torch.where(
            square < 1 / 9, torch.addcmul(third * -2.0, s, x), x - torch.log(ratio.clamp_max(largest(x)))
        )
    near = within(x, -0.5, 1.0) if is_differentiated() else x.clamp(-0.5, 1.0)
    s = near / (near + 2.0)
    square = s * s
    lead = torch.addcmul(near, square, horner(square, _ARTANH[x.dtype]), value=-2)
    ratio = ratio.clamp_max(largest(x))
    if is_differentiated():  # x and 1 + x may be rounded to two sides of a bound
        far = torch.log(ratio) - torch.log(ratio.detach().clamp(0.5, 2.0))
        rest = torch.where(near == x, 0.0, far)
    else:
        rest = torch.log(ratio / ratio.clamp(0.5, 2.0))
    return torch.addcmul((x - near) - rest, s, lead)


def _takes_parts(x: Tensor) -> bool:
    """Return whether a compiler for the CPU shall take a logarithm apart, which it fuses and does not call."""
    is_traced_alone = torch.compiler.is_compiling() and not torch.compiler.is_exporting() and not is_func_transformed()
    return is_traced_alone and x.is_cpu and x.dtype == torch.float32 and not is_differentiated()


def _excess_by_parts(a: Tensor, b: Tensor, gap: Tensor, x: Tensor, more: Tensor | float = 0.0) -> Tensor:
    """Return x + `more` - log(a/b) with x = a/b - 1; inf where a is 0, and NaN below."""
    is_near, s, third, powers = _logarithm_by_parts(a, b, gap)
    powers = torch.where(a > 0, powers, torch.where(a == 0, -torch.inf, torch.nan))
    return torch.where(is_near, s * x, x - powers - 2 * s) + more - 2 * third


def _logarithm_by_parts(a: Tensor, b: Tensor, gap: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return where a and b are near, s, artanh(s) - s, and c, which is 0 there: log(a/b) = c + 2 artanh(s).

    Elsewhere c is that of the powers of two, and s that of the mantissas. A number too small to have all of its digits
    in float32 is taken for one of about its size, and 0 for 5.9e-39.
    """
    (a_power, a_mantissa), (b_power, b_mantissa) = _power_and_mantissa(a), _power_and_mantissa(b)
    total = a + b
    is_near = 3 * gap.abs() < total
    s = torch.where(is_near, gap, a_mantissa - b_mantissa) / torch.where(is_near, total, a_mantissa + b_mantissa)
    square = s * s
    third = s * square * horner(square, _ARTANH[a.dtype])
    return is_near, s, third, torch.where(is_near, 0.0, a_power - b_power) * math.log(2)


def _power_and_mantissa(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return k and m of positive float32 numbers 2^k m, m between the roots of ½ and 2; of 0 they are -127 and 1."""
    bits = x.view(torch.int32)
    power = (bits - _ROOT_BITS) >> 23
    return power.to(x.dtype), (bits - (power << 23)).view(x.dtype)


def log1p(x: Tensor) -> Tensor:
    """Return log(1 + x) of x ≥ 0."""
    if not _takes_parts(x):
        return torch.log1p(x)
    total = 1 + x
    _, s, third, powers = _logarithm_by_parts(total, torch.ones_like(x), x)
    return torch.where(total < torch.inf, powers + 2 * (s + third), total)


def artanh_terms(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return s = x/(2 + x), s² and artanh(s) - s, which is half of log(1 + x) less s, for 1 + x from ½ to 2."""
    s = x / (x + 2.0)
    square = s * s
    return s, square, s * square * horner(square, _ARTANH[x.dtype])


def isd_from_gap(gap: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return a/b - 1 - log(a/b) for a, b > 0, given gap = a - b, which is known better than a and b are."""
    return lag(gap / b, a / b)


def gkl(a: Tensor, b: Tensor, gap: Tensor) -> Tensor:
    """Return the generalised KL divergence a log(a/b) - a + b of a, b ≥ 0; inf where only b is 0.

    Args:
        a: the first measure.
        b: the second one.
        gap: a - b, from before a and b were rounded.
    """
    return gkl_and_log(a, b, gap)[0]


def gkl_and_log(a: Tensor, b: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
    """Return `gkl` and log(b/a), which is kept finite at zeros.

    The first is a (x - log(1 + x)) with x = (b - a)/a where b is near a, and as written in what b has beyond that.
    """
    if _takes_parts(a):
        is_near, s, third, powers = _logarithm_by_parts(b, a, -gap)
        value = torch.where(is_near, -gap * s, -gap - a * (powers + 2 * s)) - 2 * a * third
        return torch.where((b == 0) & (a > 0), torch.inf, value), powers + 2 * (s + third)
    if chooses(a):
        return _chosen_gkl_and_log(a, b, gap)
    least, half = torch.finfo(a.dtype).smallest_normal * torch.finfo(a.dtype).eps, 0.5 * a
    if is_differentiated():  # as in `lag`
        near_gap = torch.where(gap > half, half, torch.where(gap < -a, -a, gap))
        near_b = torch.where(near_gap == gap, b, a - near_gap)
    else:
        near_gap, near_b = torch.clamp(gap, -a, half), torch.clamp(b, half, 2.0 * a)
    x = -near_gap / a.clamp_min(least)
    s = x / (x + 2.0)
    square = s * s
    lead = s * torch.addcmul(x, square, horner(square, _ARTANH[x.dtype]), value=-2)
    rest = _log_of_quotient(b.clamp_min(least), near_b.clamp_min(least))
    value = torch.addcmul(near_gap - gap, a, lead - rest)
    value = torch.where((b == 0) & (a > 0), torch.inf, value) if may_fall_to(b, 0) else value
    return value, (x - lead) + rest


def _chosen_gkl_and_log(a: Tensor, b: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
    least = torch.finfo(a.dtype).smallest_normal * torch.finfo(a.dtype).eps
    s = -gap / (a + b).clamp_min(least)
    square = s * s
    third = s * square * horner(square, _ARTANH[a.dtype])
    is_near = square < 1 / 9
    log = torch.where(is_near, 2.0 * (s + third), _log_of_quotient(b.clamp_min(least), a.clamp_min(least)))
    value = torch.where(is_near, torch.addcmul(-gap * s, a, third, value=-2), torch.addcmul(-gap, a, log, value=-1))
    return replaced(value, (b == 0) & (a > 0), torch.inf), log


def spare_gkl_and_log(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return `gkl_and_log` as it is written, in float64 of numbers that have the digits of float32.

    Both are raised by what no such number feels where a is 0, so that their ratio is 1 where b is 0 as well.
    """
    raised = a + _UNFELT
    b = b + (raised - a)
    ratio = b / raised
    log = torch.log(ratio)
    return raised * ((ratio - 1.0) - log), log.clamp_min(_LEAST_LOG)


def _log_of_quotient(a: Tensor, b: Tensor) -> Tensor:
    """Return log(a/b), exactly 0 for equal a and b, where float32 cannot hold a quotient as small as that."""
    if a.dtype == torch.float64:
        return torch.log((a / b).clamp_max(largest(a)))
    if chooses(a):
        root = _SMALL_RATIO**0.5
        is_small = a * (1 / root) < b * root
        log = torch.log((torch.where(is_small, a * (1 / _SMALL_RATIO), a) / b).clamp_max(largest(a)))
        return log + torch.where(is_small, math.log(_SMALL_RATIO), 0.0)
    ratio = (a / b).clamp_max(largest(a))
    return torch.log(ratio.clamp_min(_SMALL_RATIO)) + torch.log((a / _SMALL_RATIO / b).clamp_max(1))


def x_minus_log1p(x: Tensor) -> Tensor:
    """Return x - log(1 + x) ≥ 0 of x > -1."""
    return lag(x, 1.0 + x)


def infinity(*parameters: Tensor) -> Tensor:
    """Return inf in the broadcast shape of the parameters, NaN where one of them is; its gradient is 0."""
    value = torch.full((), torch.inf, dtype=parameters[0].dtype, device=parameters[0].device)
    for parameter in parameters:
        value = torch.where(parameter.isnan(), parameter, value)
    return value
