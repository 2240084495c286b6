"""Families on the whole line: Normal, Laplace, Gumbel, StudentT, Cauchy."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributions as dist

from torch_klloss.closed_forms.cross_family.registration import Family
from torch_klloss.numerics.constants import EULER, HALF_LOG_2PI
from torch_klloss.numerics.rounded import Rounded, digamma, elementwise, exp, lgamma, log, log1p, square, where
from torch_klloss.numerics.rounded_special import entire_exponential_integral


class _Normal(Family, of=dist.Normal, placeholders=(0.0, 1.0), needs=("mean", "variance")):
    """The entropy is ½ log(2πe σ²)."""

    loc: Rounded
    scale: Rounded

    def cross_entropy(self, q: Any) -> Rounded:
        """It is ½ log(2πσ²) + ½ (variance + (mean - μ)²)/σ²."""
        squares = q.variance() / square(self.scale) + square((q.mean() - self.loc) / self.scale)
        return HALF_LOG_2PI + log(self.scale) + 0.5 * squares


class _Laplace(Family, of=dist.Laplace, placeholders=(0.0, 1.0), needs=("deviation",)):
    """The entropy is 1 + log(2b)."""

    loc: Rounded
    scale: Rounded

    def entropy(self) -> Rounded:
        return 1 + math.log(2) + log(self.scale)

    def mean(self) -> Rounded:
        return self.loc

    def variance(self) -> Rounded:
        return 2 * square(self.scale)

    def log_laplace(self, b: Rounded) -> Rounded:
        return -log((b - self.scale) / b * ((b + self.scale) / b)) - self.loc / b

    def cross_entropy(self, q: Any) -> Rounded:
        """log(2b) + E|x - μ|/b."""
        return math.log(2) + log(self.scale) + q.deviation(self.loc) / self.scale


class _Gumbel(Family, of=dist.Gumbel, placeholders=(0.0, 4.0), needs=("mean", "log_laplace")):
    """The mean is μ + γβ, the variance (πβ)²/6, the entropy log β + 1 + γ."""

    loc: Rounded
    scale: Rounded

    def entropy(self) -> Rounded:
        return 1 + EULER + log(self.scale)

    def mean(self) -> Rounded:
        return self.loc + EULER * self.scale

    def variance(self) -> Rounded:
        return math.pi**2 / 6 * square(self.scale)

    def deviation(self, m: Rounded) -> Rounded:
        """With z = (m - μ)/β it is β (z - γ + 2 Ein(exp(-z))), β (γ - z) far below."""
        z = (m - self.loc) / self.scale
        far = z.value < -5
        near = where(far, 0 * z, z)
        above = elementwise(lambda t: entire_exponential_integral(torch.exp(-t)), torch.ones_like)(near)
        return self.scale * where(far, EULER - z, near - EULER + 2 * above)

    def cross_entropy(self, q: Any) -> Rounded:
        """It is log β + (mean - μ)/β + E[exp(-(x - μ)/β)]."""
        scaled = exp(q.log_laplace(self.scale) + self.loc / self.scale)
        return log(self.scale) + (q.mean() - self.loc) / self.scale + scaled


class _StudentT(Family, of=dist.StudentT, placeholders=(4.0, 0.0, 1.0), needs=("log_square",)):
    """The variance is σ²ν/(ν - 2), for ν > 2."""

    df: Rounded
    loc: Rounded
    scale: Rounded

    def entropy(self) -> Rounded:
        bend = digamma((self.df + 1) / 2) - digamma(self.df / 2)
        return self._log_norm() + (self.df + 1) / 2 * bend

    def mean(self) -> Rounded:
        return self.loc

    def variance(self) -> Rounded:
        return square(self.scale) * (self.df / (self.df - 2))

    def cross_entropy(self, q: Any) -> Rounded:
        """log(σ √ν B(ν/2, ½)) + ½ (ν + 1) (E[log(νσ² + (x - μ)²)] - log(νσ²))."""
        width = self.scale * exp(0.5 * log(self.df))
        rest = q.log_square(self.loc, width) - 2 * log(width)
        return self._log_norm() + (self.df + 1) / 2 * rest

    def _log_norm(self) -> Rounded:
        log_beta = lgamma(self.df / 2) + 0.5 * math.log(math.pi) - lgamma((self.df + 1) / 2)
        return log_beta + log(self.scale) + 0.5 * log(self.df)


class _Cauchy(Family, of=dist.Cauchy, placeholders=(0.0, 1.0), needs=("log_square",)):
    """The entropy is log(4πγ); of the moments here it has none but logarithms."""

    loc: Rounded
    scale: Rounded

    def entropy(self) -> Rounded:
        return math.log(4 * math.pi) + log(self.scale)

    def log_square(self, m: Rounded, c: Rounded) -> Rounded:
        """log((c + γ)² + (x₀ - m)²): 2 log|c + γ + i (x₀ - m)|, for log is harmonic."""
        outer = c + self.scale
        return 2 * log(outer) + log1p(square((self.loc - m) / outer))

    def cross_entropy(self, q: Any) -> Rounded:
        """log(π/γ) + E[log(γ² + (x - x₀)²)]."""
        return math.log(math.pi) - log(self.scale) + q.log_square(self.loc, self.scale)
