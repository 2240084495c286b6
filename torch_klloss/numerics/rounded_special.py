"""Special functions of `Rounded` numbers, which the moments need and torch lacks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_klloss.numerics.constants import EULER, HALF_LOG_2PI
from torch_klloss.numerics.custom_gradient import custom_gradient
from torch_klloss.numerics.devices import constant_on
from torch_klloss.numerics.elementary import at_least, at_most, horner, within
from torch_klloss.numerics.exponentials import expm1
from torch_klloss.numerics.moments import stirling, stirling_slope
from torch_klloss.numerics.rounded import EPS, Rounded, elementwise, log, log1p, where
from torch_klloss.numerics.special import gauss_legendre

_FAR = 40.0  # from here on the exponential integral E1 is below rounding
_GAUSS = gauss_legendre(32)


stirling_rest = elementwise(stirling, stirling_slope)
"""Stirling's remainder lgamma(x) - (x - ½) log x + x - ½ log 2π."""
stirling_rest_slope = elementwise(stirling_slope, lambda t: 1 / t**2)
"""The derivative of Stirling's remainder, ψ(x) - log x + 1/(2x)."""
log_sine = elementwise(lambda t: torch.sin(t).log(), lambda t: 1 / torch.tan(t), floor=1.0)
"""log sin(x) for 0 < x < π."""
log_erfcx = elementwise(
    lambda t: torch.special.erfcx(t).log(),
    lambda t: 2 * t - 2 / math.sqrt(math.pi) / torch.special.erfcx(t),
    floor=1.0,
)
"""log(exp(x²) erfc(x)) for x > 0; its derivative, of the order 1/x, loses x² of its digits."""
log_i0e = elementwise(lambda t: torch.special.i0e(t).log(), torch.ones_like, floor=1.0)
"""log(exp(-x) I0(x)) for x > 0."""


def log_gamma_rest(a: Rounded) -> Rounded:
    """Return lgamma(a) - a log a + a."""
    return stirling_rest(a) + HALF_LOG_2PI - 0.5 * log(a)


def gamma_entropy(a: Rounded) -> Rounded:
    """Return a + lgamma(a) + (1 - a) ψ(a), the entropy of a Gamma of rate 1, without the terms that cancel."""
    return stirling_rest(a) + (1 - a) * stirling_rest_slope(a) + 0.5 * (log(a) - 1 / a) + (HALF_LOG_2PI + 0.5)


def log_ratio_of_gammas(a: Rounded, k: Rounded) -> Rounded:
    """Return lgamma(a + k) - lgamma(a), for a > 0 and k > -a."""
    total, step = a + k, k / a
    near = step.size < 0.5
    growth = where(near, log1p(where(near, step, 0 * step)), log(total / a))
    return (a - 0.5) * growth + k * (log(total) - 1) + stirling_rest(total) - stirling_rest(a)


def _log1p_over_slope(x: Tensor) -> Tensor:
    near = x.abs() < 1e-2
    safe = torch.where(near, 1.0, x)
    series = sum(((-1) ** (k + 1) * (k - 1) / k * x ** (k - 2) for k in range(3, 12)), torch.full_like(x, -0.5))
    return torch.where(near, series, (1 / (1 + safe) - torch.log1p(safe) / safe) / safe)


@custom_gradient(lambda needs, x: (_log1p_over_slope(x),))
def _log1p_over(x: Tensor) -> Tensor:
    safe = torch.where(x == 0, 1.0, x)
    return torch.where(x == 0, 1.0 - x / 2, torch.log1p(safe) / safe)


log1p_over = elementwise(_log1p_over, lambda t: 1 / (1 + t))
"""log(1 + x)/x for x > -1."""


def _slope(w: Tensor) -> Tensor:
    """Return (1 - exp(-w))/w, 1 at w = 0."""
    safe = torch.where(w == 0, 1.0, w)
    return torch.where(w == 0, 1.0, -expm1(-safe) / safe)


@custom_gradient(lambda needs, w: (_slope(w),))
def entire_exponential_integral(w: Tensor) -> Tensor:
    """Return Ein(w) = ∫₀^w (1 - exp(-t))/t dt = E1(w) + log w + γ for w ≥ 0, by a Gauss rule up to 40.

    References:
        *NIST handbook of mathematical functions* (Olver et al., 2010), section 6.2.
    """
    nodes, weights = (constant_on(w.device, t) for t in _GAUSS)
    near = at_most(w, _FAR)
    s = (nodes + 1) / 2
    total = (weights / 2 * -expm1(-near.unsqueeze(-1) * s) / s).sum(-1)
    return torch.where(w < _FAR, total, at_least(w, 1.0).log() + EULER)


def _sinc_slope(x: Tensor) -> Tensor:
    near = x.abs() < 0.5
    safe = torch.where(near, 1.0, x)
    series = x * horner(x * x, (-1 / 3, 1 / 30, -1 / 840, 1 / 45360, -1 / 3991680, 1 / 518918400))
    return torch.where(near, series, (torch.cos(safe) - torch.sin(safe) / safe) / safe)


@custom_gradient(lambda needs, x: (_sinc_slope(x),))
def _sinc(x: Tensor) -> Tensor:
    return torch.sinc(x / math.pi)


sinc = elementwise(_sinc, torch.ones_like)
"""sin(x)/x."""


def kumaraswamy_log1m(a: Rounded, b: Rounded) -> Rounded:
    """Return E[log(1 - x)] of a Kumaraswamy, as an exponentially convergent sum.

    With x = (1 - exp(-t/b))^(1/a), t is an Exponential of rate 1, and t = exp(s - exp(-s)) leaves a function of s that
    falls doubly exponentially at both ends. The trapezoidal rule with the step 1/16 is exact to rounding for a ≥ 0.1,
    and to 4e-11 down to a = 0.02, where a singularity comes near to the real line.

    References:
        *The exponentially convergent trapezoidal rule* (Trefethen and Weideman, 2014), sections 14 and 15.
    """
    steps = torch.arange(-72, 68, dtype=a.value.dtype, device=a.value.device) / 16
    t = torch.exp(steps - torch.exp(-steps))
    weights = torch.exp(-t) * t * (1 + torch.exp(-steps)) / 16
    value = (weights * _log1m_at(t, a.value.unsqueeze(-1), b.value.unsqueeze(-1))).sum(-1)
    size = a.value.detach()
    error = torch.where(size < 0.02, torch.inf, torch.where(size < 0.1, 1e-10, 32 * EPS))
    return Rounded(value, error * (value.detach().abs() + 1))


def _log1m_at(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return log(1 - (1 - exp(-t/b))^(1/a))."""
    y = t / b
    near, middle = at_most(y, 0.7), within(y, 0.7, 30.0)
    log_complement = torch.where(y < 0.7, torch.log(-expm1(-near)), torch.log1p(-torch.exp(-middle)))
    return torch.where(y < 30, torch.log(-expm1(log_complement / a)), -y - a.log())
