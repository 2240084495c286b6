"""Other families on a half-line: LogNormal, HalfNormal, HalfCauchy, Pareto, GeneralizedPareto."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributions as dist

from torch_klloss.closed_forms.cross_family.registration import Family
from torch_klloss.numerics.constants import EULER, HALF_LOG_2PI
from torch_klloss.numerics.rounded import Rounded, erf, exp, expm1, lgamma, log, log1p, positive, square, where
from torch_klloss.numerics.rounded_special import log1p_over, log_erfcx, log_sine

ROOT_2 = math.sqrt(2)
ROOT_2_OVER_PI = math.sqrt(2 / math.pi)


class _LogNormal(Family, of=dist.LogNormal, placeholders=(0.0, 1.0), needs=("log", "log_variance")):
    """The logarithm is Normal, and E[x^k] = exp(kμ + ½ k²σ²)."""

    loc: Rounded
    scale: Rounded

    def entropy(self) -> Rounded:
        return 0.5 + HALF_LOG_2PI + self.loc + log(self.scale)

    def mean(self) -> Rounded:
        return exp(self.log_power(1.0))

    def second(self) -> Rounded:
        return exp(self.log_power(2.0))

    def variance(self) -> Rounded:
        return square(self.mean()) * expm1(square(self.scale))

    def log_power(self, k: Rounded | float) -> Rounded:
        return k * self.loc + 0.5 * square(k * self.scale)

    def reciprocal(self) -> Rounded:
        return exp(self.log_power(-1.0))

    def log(self) -> Rounded:
        return self.loc

    def log_variance(self) -> Rounded:
        return square(self.scale)

    def deviation(self, m: Rounded) -> Rounded:
        """E[x] erf(d + σ/√2) - m erf(d) with d = (μ - log m)/(σ√2); E[x] - m where m is no positive number."""
        inside = m.value > 0
        kept = where(inside, m, Rounded(torch.ones_like(m.value)))
        d = (self.loc - log(kept)) / (ROOT_2 * self.scale)
        inner = self.mean() * erf(d + self.scale / ROOT_2) - kept * erf(d)
        return where(inside, inner, self.mean() - m)

    def cross_entropy(self, q: Any) -> Rounded:
        """It is ½ log(2πσ²) + E[log x] + ½ (variance + (mean - μ)²)/σ² of log x."""
        squares = q.log_variance() / square(self.scale) + square((q.log() - self.loc) / self.scale)
        return HALF_LOG_2PI + log(self.scale) + q.log() + 0.5 * squares


class _HalfNormal(Family, of=dist.HalfNormal, placeholders=(1.0,), needs=("second",)):
    """The absolute value of a Normal around 0."""

    scale: Rounded

    def entropy(self) -> Rounded:
        return 0.5 * math.log(math.pi / 2) + 0.5 + log(self.scale)

    def mean(self) -> Rounded:
        return ROOT_2_OVER_PI * self.scale

    def variance(self) -> Rounded:
        return (1 - 2 / math.pi) * square(self.scale)

    def log_power(self, k: Rounded) -> Rounded:
        return k * log(ROOT_2 * self.scale) + lgamma((k + 1) / 2) - 0.5 * math.log(math.pi)

    def log(self) -> Rounded:
        return log(self.scale) - 0.5 * (EULER + math.log(2))

    def log_variance(self) -> Rounded:
        return math.pi**2 / 8 + 0 * self.scale

    def log_laplace(self, b: Rounded) -> Rounded:
        return log_erfcx(self.scale / (ROOT_2 * b))

    def deviation(self, m: Rounded) -> Rounded:
        """With u = m/σ it is σ times 2√(2/π) exp(-½u²) - √(2/π) - u + 2u erf(u/√2), and √(2/π) - u below 0."""
        u = m / self.scale
        kept = positive(u)
        inner = 2 * ROOT_2_OVER_PI * exp(-0.5 * square(kept)) - ROOT_2_OVER_PI + kept * (2 * erf(kept / ROOT_2) - 1)
        return self.scale * where(u.value > 0, inner, ROOT_2_OVER_PI - u)

    def cross_entropy(self, q: Any) -> Rounded:
        """It is ½ log(½πσ²) + ½ E[x²]/σ²."""
        return 0.5 * math.log(math.pi / 2) + log(self.scale) + 0.5 * (q.second() / square(self.scale))


class _HalfCauchy(Family, of=dist.HalfCauchy, placeholders=(1.0,), needs=("log_square",)):
    """E[x^k] = γ^k/cos(½πk) for |k| < 1; log x has the mean log γ and the variance ¼π²."""

    scale: Rounded

    def entropy(self) -> Rounded:
        return math.log(2 * math.pi) + log(self.scale)

    def log_power(self, k: Rounded) -> Rounded:
        """The cosine is the sine of ½π(1 - k), which keeps its digits near k = 1."""
        return k * log(self.scale) - log_sine(0.5 * math.pi * (1 - k))

    def log(self) -> Rounded:
        return log(self.scale)

    def log_variance(self) -> Rounded:
        return math.pi**2 / 4 + 0 * self.scale

    def cross_entropy(self, q: Any) -> Rounded:
        """log(½π/γ) + E[log(γ² + x²)]."""
        return math.log(math.pi / 2) - log(self.scale) + q.log_square(0 * self.scale, self.scale)


class _Pareto(Family, of=dist.Pareto, placeholders=(0.125, 8.0), needs=("log",)):
    """E[x^k] = s^k α/(α - k), and log x has the mean log s + 1/α and the variance 1/α²."""

    scale: Rounded
    alpha: Rounded

    def entropy(self) -> Rounded:
        return log(self.scale) - log(self.alpha) + 1 / self.alpha + 1

    def mean(self) -> Rounded:
        return self.scale * (self.alpha / (self.alpha - 1))

    def second(self) -> Rounded:
        return square(self.scale) * (self.alpha / (self.alpha - 2))

    def log_power(self, k: Rounded) -> Rounded:
        return k * log(self.scale) + log(self.alpha / (self.alpha - k))

    def reciprocal(self) -> Rounded:
        return self.alpha / (self.alpha + 1) / self.scale

    def log(self) -> Rounded:
        return log(self.scale) + 1 / self.alpha

    def log_variance(self) -> Rounded:
        return 1 / square(self.alpha)

    def deviation(self, m: Rounded) -> Rounded:
        """E[x] - m up to the start s; beyond, m - E[x] + 2m (s/m)^α/(α - 1)."""
        beyond = m.value > self.scale.value
        kept = where(beyond, m, self.scale)
        above = kept * exp(self.alpha * log(self.scale / kept)) / (self.alpha - 1)
        return where(beyond, m - self.mean() + 2 * above, self.mean() - m)

    def cross_entropy(self, q: Any) -> Rounded:
        """It is (α + 1) E[log x] - α log s - log α."""
        return q.log() - log(self.alpha) + self.alpha * (q.log() - log(self.scale))


class _GeneralizedPareto(Family, of=dist.GeneralizedPareto, placeholders=(0.0, 1.0, -0.5)):
    """The mean is μ + σ/(1 - c), the variance (σ/(1 - c))²/(1 - 2c); c = 0 is an Exponential, c = -1 a Uniform."""

    loc: Rounded
    scale: Rounded
    concentration: Rounded

    def entropy(self) -> Rounded:
        return log(self.scale) + self.concentration + 1

    def mean(self) -> Rounded:
        return self.loc + self.scale / (1 - self.concentration)

    def second(self) -> Rounded:
        return self.variance() + square(self.mean())

    def variance(self) -> Rounded:
        return square(self.scale / (1 - self.concentration)) / (1 - 2 * self.concentration)

    def deviation(self, m: Rounded) -> Rounded:
        """E[x] - m up to μ; beyond, m - E[x] + 2 σ/(1 - c) (1 + cz)^(1 - 1/c) with z = (m - μ)/σ."""
        z = (m - self.loc) / self.scale
        inside = positive(z)
        width, grown = self.scale / (1 - self.concentration), self.concentration * inside
        within = grown.value > -1
        grown = where(within, grown, 0 * grown)
        above = width * exp(log1p(grown) - inside * log1p_over(grown))
        above = where(within, above, 0 * above)
        return where(z.value > 0, m - self.mean() + 2 * above, self.mean() - m)
