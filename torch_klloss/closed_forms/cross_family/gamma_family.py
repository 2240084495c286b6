"""Families made of a Gamma: its powers, its inverse, the ratio of two."""

from __future__ import annotations

import math
from typing import Any

import torch.distributions as dist

from torch_klloss.closed_forms.cross_family.registration import Family
from torch_klloss.numerics.constants import EULER
from torch_klloss.numerics.rounded import Rounded, digamma, exp, expm1, lgamma, log, positive, square, trigamma, where
from torch_klloss.numerics.rounded_special import gamma_entropy, log_gamma_rest, log_ratio_of_gammas


class _Exponential(Family, of=dist.Exponential, placeholders=(1.0,), needs=("mean",)):
    """An Exponential is the Gamma of shape 1."""

    rate: Rounded

    def entropy(self) -> Rounded:
        return 1 - log(self.rate)

    def second(self) -> Rounded:
        return 2 / square(self.rate)

    def log_power(self, k: Rounded) -> Rounded:
        return lgamma(1 + k) - k * log(self.rate)

    def log(self) -> Rounded:
        return -EULER - log(self.rate)

    def log_variance(self) -> Rounded:
        return math.pi**2 / 6 + 0 * self.rate

    def deviation(self, m: Rounded) -> Rounded:
        """With u = λm it is (u - 1 + 2 exp(-u))/λ, (1 - u)/λ below 0."""
        u = self.rate * m
        inner = u - 1 + 2 * exp(-positive(u))
        return where(u.value > 0, inner, 1 - u) / self.rate

    def cross_entropy(self, q: Any) -> Rounded:
        """It is λ E[x] - log λ."""
        return self.rate * q.mean() - log(self.rate)


class _Gamma(Family, of=dist.Gamma, placeholders=(2.0, 2.0), needs=("mean", "log")):
    """E[x^k] = Γ(α + k)/Γ(α)/β^k, and log x has the mean ψ(α) - log β and the variance ψ'(α)."""

    concentration: Rounded
    rate: Rounded

    def entropy(self) -> Rounded:
        return gamma_entropy(self.concentration) - log(self.rate)

    def second(self) -> Rounded:
        return self.concentration / self.rate * ((1 + self.concentration) / self.rate)

    def log_power(self, k: Rounded) -> Rounded:
        return log_ratio_of_gammas(self.concentration, k) - k * log(self.rate)

    def reciprocal(self) -> Rounded:
        return self.rate / (self.concentration - 1)

    def log(self) -> Rounded:
        return digamma(self.concentration) - log(self.rate)

    def log_variance(self) -> Rounded:
        return trigamma(self.concentration)

    def cross_entropy(self, q: Any) -> Rounded:
        """It is log Γ(α) - α log β - (α - 1) E[log x] + β E[x], grouped so that terms of the order of α cancel."""
        a, rate = self.concentration, self.rate / self.concentration
        return log_gamma_rest(a) + q.log() + a * (rate * q.mean() - 1 - (q.log() + log(rate)))


class _InverseGamma(Family, of=dist.InverseGamma, placeholders=(8.0, 2.0), needs=("log", "reciprocal")):
    """The moments follow from 1/x, a Gamma."""

    concentration: Rounded
    rate: Rounded

    def entropy(self) -> Rounded:
        return gamma_entropy(self.concentration) - 2 * digamma(self.concentration) + log(self.rate)

    def mean(self) -> Rounded:
        return self.rate / (self.concentration - 1)

    def second(self) -> Rounded:
        return self.mean() * (self.rate / (self.concentration - 2))

    def variance(self) -> Rounded:
        return square(self.mean()) / (self.concentration - 2)

    def log_power(self, k: Rounded) -> Rounded:
        return log_ratio_of_gammas(self.concentration, -k) + k * log(self.rate)

    def log(self) -> Rounded:
        return log(self.rate) - digamma(self.concentration)

    def log_variance(self) -> Rounded:
        return trigamma(self.concentration)

    def reciprocal(self) -> Rounded:
        return self.concentration / self.rate

    def cross_entropy(self, q: Any) -> Rounded:
        """It is log Γ(α) - α log β + (α + 1) E[log x] + β E[1/x], grouped so that terms of the order of α cancel."""
        a, rate = self.concentration, self.rate / self.concentration
        return log_gamma_rest(a) + q.log() + a * (rate * q.reciprocal() - 1 + (q.log() - log(rate)))


class _Weibull(Family, of=dist.Weibull, placeholders=(1.0, 1.5), needs=("log", "log_power")):
    """E[x^j] = λ^j Γ(1 + j/k), and log x has the mean log λ - γ/k and the variance π²/(6k²)."""

    scale: Rounded
    concentration: Rounded

    def entropy(self) -> Rounded:
        k = self.concentration
        return EULER * (1 - 1 / k) + log(self.scale) - log(k) + 1

    def mean(self) -> Rounded:
        return self.scale * exp(lgamma(1 + 1 / self.concentration))

    def second(self) -> Rounded:
        return square(self.scale) * exp(lgamma(1 + 2 / self.concentration))

    def variance(self) -> Rounded:
        r = 1 / self.concentration
        return square(self.mean()) * expm1(lgamma(1 + 2 * r) - 2 * lgamma(1 + r))

    def log_power(self, k: Rounded) -> Rounded:
        return k * log(self.scale) + lgamma(1 + k / self.concentration)

    def reciprocal(self) -> Rounded:
        return exp(lgamma((self.concentration - 1) / self.concentration)) / self.scale

    def log(self) -> Rounded:
        return log(self.scale) - EULER / self.concentration

    def log_variance(self) -> Rounded:
        return math.pi**2 / 6 / square(self.concentration)

    def cross_entropy(self, q: Any) -> Rounded:
        """It is k log λ - log k - (k - 1) E[log x] + E[x^k]/λ^k."""
        k, log_scale = self.concentration, log(self.scale)
        return k * (log_scale - q.log()) + q.log() - log(k) + exp(q.log_power(k) - k * log_scale)


class _FisherSnedecor(Family, of=dist.FisherSnedecor, placeholders=(4.0, 12.0), needs=("log", "log_affine")):
    """b/a times a ratio of Gammas of the shapes a = ½ df1 and b = ½ df2."""

    df1: Rounded
    df2: Rounded

    def entropy(self) -> Rounded:
        a, b = self._halves()
        of_ratio = gamma_entropy(a) + gamma_entropy(b) - 2 * digamma(b)
        return of_ratio - gamma_entropy(a + b) + digamma(a + b) + log(b / a)

    def mean(self) -> Rounded:
        return self.df2 / (self.df2 - 2)

    def second(self) -> Rounded:
        a, b = self._halves()
        return self.mean() * (b / (b - 2)) * ((a + 1) / a)

    def variance(self) -> Rounded:
        a, b = self._halves()
        return square(self.mean()) * ((a + b - 1) / a) / (b - 2)

    def log_power(self, k: Rounded) -> Rounded:
        a, b = self._halves()
        return k * log(b / a) + log_ratio_of_gammas(a, k) + log_ratio_of_gammas(b, -k)

    def reciprocal(self) -> Rounded:
        return self.df1 / (self.df1 - 2)

    def log(self) -> Rounded:
        a, b = self._halves()
        return log(b / a) + digamma(a) - digamma(b)

    def log_variance(self) -> Rounded:
        a, b = self._halves()
        return trigamma(a) + trigamma(b)

    def cross_entropy(self, q: Any) -> Rounded:
        """It is log B(a, b) - a log(a/b) - (a - 1) E[log x] + (a + b) E[log(1 + x a/b)]."""
        a, b = self._halves()
        ratio = a / b
        return self._log_beta() - a * log(ratio) - (a - 1) * q.log() + (a + b) * q.log_affine(ratio)

    def _halves(self) -> tuple[Rounded, Rounded]:
        return self.df1 / 2, self.df2 / 2

    def _log_beta(self) -> Rounded:
        a, b = self._halves()
        return lgamma(a) + lgamma(b) - lgamma(a + b)
