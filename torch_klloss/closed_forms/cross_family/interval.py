"""Families on an interval: Uniform, Beta, Kumaraswamy, ContinuousBernoulli; and VonMises, on the circle."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributions as dist
from torch import Tensor

from torch_klloss.closed_forms.continuous_bernoulli import logits_of
from torch_klloss.closed_forms.cross_family.registration import Family
from torch_klloss.distributions.given import as_given
from torch_klloss.numerics.constants import EULER
from torch_klloss.numerics.elementary import log_ratio, magnitude
from torch_klloss.numerics.moments import tilt_divergence, tilt_log_norm, tilt_mean, tilt_std, uniform_log_drop
from torch_klloss.numerics.rounded import (
    EPS,
    Rounded,
    atan,
    cos,
    digamma,
    elementwise,
    exp,
    expm1,
    lgamma,
    log,
    log1p,
    square,
    trigamma,
    where,
)
from torch_klloss.numerics.rounded_special import (
    gamma_entropy,
    kumaraswamy_log1m,
    log_gamma_rest,
    log_i0e,
    log_ratio_of_gammas,
    sinc,
)

# Added to a lower end, which may be 0: small enough to be lost beside any other, and its square is a float64.
_LEAST = 1e-150


class _Uniform(Family, of=dist.Uniform, placeholders=(0.25, 0.75), needs=()):
    """Every moment is a difference of an antiderivative."""

    low: Rounded
    high: Rounded

    def entropy(self) -> Rounded:
        return log(self.high - self.low)

    def mean(self) -> Rounded:
        return (self.low + self.high) / 2

    def second(self) -> Rounded:
        return self.variance() + square(self.mean())

    def variance(self) -> Rounded:
        return square(self.high - self.low) / 12

    def log(self) -> Rounded:
        drop = uniform_log_drop(self.low.value, (self.high - self.low).value)
        return log(self.high) - Rounded(drop, 16 * EPS * torch.ones_like(drop).detach())

    def log_variance(self) -> Rounded:
        """1 - (t/sinh t)² with t = ½ log(high/low), and 1 where low is 0."""
        t = self._log_ratio() / 2
        return 1 - square(t / (0.5 * (exp(t) - exp(-t))))

    def log_power(self, k: Rounded) -> Rounded:
        grown = -expm1(-(k + 1) * self._log_ratio())
        return k * log(self.high) + log(grown / (k + 1)) - log((self.high - self.low) / self.high)

    def reciprocal(self) -> Rounded:
        return self._log_ratio() / (self.high - self.low)

    def deviation(self, m: Rounded) -> Rounded:
        within = (m.value > self.low.value) & (m.value < self.high.value)
        inner = (square(self.high - m) + square(m - self.low)) / (2 * (self.high - self.low))
        outer = self.mean() - m
        return where(within, inner, where(outer.value < 0, -outer, outer))

    def log_square(self, m: Rounded, c: Rounded) -> Rounded:
        def primitive(u: Rounded) -> Rounded:
            return u * (2 * log(c) + log1p(square(u / c)) - 2) + 2 * c * atan(u / c)

        return (primitive(self.high - m) - primitive(self.low - m)) / (self.high - self.low)

    def log_affine(self, c: Rounded) -> Rounded:
        def primitive(y: Rounded) -> Rounded:
            return (1 + y) * log1p(y) - y

        return (primitive(c * self.high) - primitive(c * self.low)) / (c * (self.high - self.low))

    def cosine(self, m: Rounded) -> Rounded:
        return cos(self.mean() - m) * sinc((self.high - self.low) / 2)

    def cross_entropy(self, q: Any) -> Rounded:
        """log(width)."""
        return log(self.high - self.low)

    def _log_ratio(self) -> Rounded:
        low, high = self.low.value + _LEAST, self.high.value
        ratio = log_ratio(high, low, high - low)
        return Rounded(ratio, 4 * EPS * ratio.detach().abs())


class _Beta(Family, of=dist.Beta, placeholders=(2.0, 2.0), needs=("log", "log1m")):
    """E[x^k] = Γ(a + k)/Γ(a) Γ(S)/Γ(S + k) with S = a + b; log x has the mean ψ(a) - ψ(S)."""

    concentration1: Rounded
    concentration0: Rounded

    def entropy(self) -> Rounded:
        a, b, total = self._shapes()
        return gamma_entropy(a) + gamma_entropy(b) - gamma_entropy(total) - digamma(total)

    def mean(self) -> Rounded:
        a, _, total = self._shapes()
        return a / total

    def second(self) -> Rounded:
        a, _, total = self._shapes()
        return a / total * ((a + 1) / (total + 1))

    def log(self) -> Rounded:
        a, _, total = self._shapes()
        return digamma(a) - digamma(total)

    def log_variance(self) -> Rounded:
        a, _, total = self._shapes()
        return trigamma(a) - trigamma(total)

    def log_power(self, k: Rounded) -> Rounded:
        a, _, total = self._shapes()
        return log_ratio_of_gammas(a, k) - log_ratio_of_gammas(total, k)

    def reciprocal(self) -> Rounded:
        a, b, _ = self._shapes()
        return 1 + b / (a - 1)

    def cross_entropy(self, q: Any) -> Rounded:
        """It is log B(a, b) - (a - 1) E[log x] - (b - 1) E[log(1 - x)], grouped so that terms of order a + b cancel."""
        (a, b, total), left, right = self._shapes(), q.log(), q.log1m()
        log_beta_rest = log_gamma_rest(a) + log_gamma_rest(b) - log_gamma_rest(total)
        return log_beta_rest + left + right + a * (log(a / total) - left) + b * (log(b / total) - right)

    def _shapes(self) -> tuple[Rounded, Rounded, Rounded]:
        return self.concentration1, self.concentration0, self.concentration1 + self.concentration0


class _Kumaraswamy(Family, of=dist.Kumaraswamy, placeholders=(2.0, 2.0)):
    """x^a is a Beta(1, b): E[x^k] = b B(1 + k/a, b), and log x has the mean -(ψ(b + 1) + γ)/a."""

    concentration1: Rounded
    concentration0: Rounded

    def entropy(self) -> Rounded:
        a, b = self.concentration1, self.concentration0
        return (1 - 1 / b) + (1 - 1 / a) * self._harmonic() - log(a) - log(b)

    def mean(self) -> Rounded:
        return self._power(1.0)

    def second(self) -> Rounded:
        return self._power(2.0)

    def variance(self) -> Rounded:
        return self.second() - square(self.mean())

    def log(self) -> Rounded:
        return -self._harmonic() / self.concentration1

    def log1m(self) -> Rounded:
        return kumaraswamy_log1m(self.concentration1, self.concentration0)

    def log_variance(self) -> Rounded:
        spread = math.pi**2 / 6 - trigamma(self.concentration0 + 1)
        return spread / square(self.concentration1)

    def log_power(self, k: Rounded) -> Rounded:
        a, b = self.concentration1, self.concentration0
        return lgamma((a + k) / a) - log_ratio_of_gammas(b + 1, k / a)

    def reciprocal(self) -> Rounded:
        return self._power(-1.0)

    def _power(self, k: float) -> Rounded:
        return exp(self.log_power(Rounded(torch.full_like(self.concentration1.value, k))))

    def _harmonic(self) -> Rounded:
        """Return ψ(b + 1) + γ."""
        return digamma(self.concentration0 + 1) + EULER


class _ContinuousBernoulli(Family, of=dist.ContinuousBernoulli, placeholders=(1.0,), needs=("mean",)):
    """The Uniform on [0, 1], tilted by exp(x log-odds)."""

    logits: Rounded

    @classmethod
    def parameters_of(cls, d: Any) -> tuple[Tensor, ...]:
        return (logits_of(*as_given(d)).double(),)

    def entropy(self) -> Rounded:
        return -self._of_size(tilt_divergence)

    def mean(self) -> Rounded:
        from_end = self._of_size(lambda t: tilt_mean(t)[0])
        return where(self.logits.value < 0, from_end, 1 - from_end)

    def second(self) -> Rounded:
        return square(self._of_size(lambda t: tilt_std(t)[0])) + square(self.mean())

    def log_laplace(self, b: Rounded) -> Rounded:
        log_norm = elementwise(lambda s: tilt_log_norm(magnitude(s)), lambda s: torch.full_like(s, 0.5))
        return log_norm(self.logits - 1 / b) - self._of_size(tilt_log_norm) - 0.5 / b

    def cross_entropy(self, q: Any) -> Rounded:
        """It is log of the norm, less the log-odds times the distance of E[x] from ½."""
        return self._of_size(tilt_log_norm) - self.logits * (q.mean() - 0.5)

    def _of_size(self, f: Any) -> Rounded:
        """Return f of the magnitude of the log-odds, which is exact."""
        return elementwise(lambda s: f(magnitude(s)), torch.zeros_like)(self.logits)


class _VonMises(Family, of=dist.VonMises, placeholders=(0.0, 1.0), needs=("cosine",)):
    """The density is exp(κ cos(x - μ))/(2π I0(κ)) on (-π, π)."""

    loc: Rounded
    concentration: Rounded

    def cross_entropy(self, q: Any) -> Rounded:
        """log(2π I0(κ)) - κ E[cos(x - μ)]."""
        missing = 1 - q.cosine(self.loc)
        return math.log(2 * math.pi) + log_i0e(self.concentration) + self.concentration * missing
