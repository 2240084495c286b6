"""Laws by formulas of textbooks, from which the true KLs of the coverage are computed; nothing comes from the library.

Densities on the line are functions of mpmath numbers, so that points may come as near to an end of the support as 100
digits allow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mpmath as mp
import numpy as np
import torch.distributions as dist
from mpmath import exp, inf, log, log1p, loggamma, mpf, pi

Density = Callable[[Any], Any]


@dataclass(frozen=True, eq=False)
class Line:
    """A density on (lower, upper): its log by an mpmath number, and the kinks in between."""

    log_density: Density
    lower: Any = -inf
    upper: Any = inf
    kinks: tuple[Any, ...] = ()
    normal: tuple[float, float] | None = None  # mean and standard deviation, where it is one

    def reaches(self, x: Any) -> bool:
        """Return whether x is in the closure of the support."""
        return bool(self.lower <= x <= self.upper)


@dataclass(frozen=True, eq=False)
class Counts:
    """A law on 0, 1, …, `last`: its log-mass by an integer, -inf where it has none."""

    log_mass: Density
    last: int | None

    def reaches(self, k: int | None) -> bool:
        """Return whether k, or with None every count, is in the support."""
        return self.last is None or (k is not None and k <= self.last)


@dataclass(frozen=True, eq=False)
class Product:
    """Independent components, each a `Line` or each `Counts`."""

    parts: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A Gaussian with a covariance."""

    mean: np.ndarray
    cov: np.ndarray


@dataclass(frozen=True, eq=False)
class Plane:
    """A density on the plane: its log by two arrays of coordinates."""

    log_density: Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Simplex:
    """A density on three components that sum to one, by the logs of the components; of the first two coordinates."""

    log_density: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Vectors:
    """A law on finitely many vectors of counts: the log-mass of each."""

    log_mass: dict[tuple[int, ...], Any]


@dataclass(frozen=True, eq=False)
class WishartLaw:
    """A Wishart law: degrees of freedom and scale."""

    df: float
    scale: np.ndarray


@dataclass(frozen=True, eq=False)
class Correlation:
    """A 2x2 Cholesky factor of a correlation matrix; (1 + r)/2 follows the law `share`."""

    share: Line


LAWS: dict[type, Callable[[Any], Any]] = {}
"""The law of an instance, by its class."""


def law(cls: type, *parameters: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the law of a class, as a function of the named parameters of an instance."""

    def decorator(make: Callable[..., Any]) -> Callable[..., Any]:
        LAWS[cls] = lambda d: make(*(mpf(float(getattr(d, name))) for name in parameters))
        return make

    return decorator


# --- on the line ------------------------------------------------------------------------------------------------------


@law(dist.Normal, "loc", "scale")
def normal(m: Any, s: Any) -> Line:
    """Return N(m, s²)."""
    norm = log(s) + log(2 * pi) / 2
    return Line(lambda x: -(((x - m) / s) ** 2) / 2 - norm, normal=(float(m), float(s)))


@law(dist.Laplace, "loc", "scale")
def laplace(m: Any, b: Any) -> Line:
    return Line(lambda x: -abs(x - m) / b - log(2 * b), kinks=(m,))


@law(dist.StudentT, "df", "loc", "scale")
def student(df: Any, m: Any, s: Any) -> Line:
    norm = loggamma((df + 1) / 2) - loggamma(df / 2) - log(df * pi) / 2 - log(s)
    return Line(lambda x: norm - (df + 1) / 2 * log1p(((x - m) / s) ** 2 / df))


@law(dist.Gumbel, "loc", "scale")
def gumbel(m: Any, b: Any) -> Line:
    return Line(lambda x: -(x - m) / b - exp(-(x - m) / b) - log(b))


@law(dist.VonMises, "loc", "concentration")
def von_mises(m: Any, c: Any) -> Line:
    norm = log(2 * pi * mp.besseli(0, c))
    return Line(lambda x: c * mp.cos(x - m) - norm, -pi, +pi)


@law(dist.Gamma, "concentration", "rate")
def gamma(a: Any, rate: Any) -> Line:
    norm = a * log(rate) - loggamma(a)
    return Line(lambda x: norm + (a - 1) * log(x) - rate * x, mpf(0))


def half(whole: Line) -> Line:
    return Line(lambda x: log(mpf(2)) + whole.log_density(x), mpf(0))


def exponential_of(law: Line) -> Line:
    """Return the law of exp(x) for x of the law."""
    return Line(lambda y: law.log_density(log(y)) - log(y), mpf(0), inf, tuple(exp(kink) for kink in law.kinks))


@law(dist.Weibull, "scale", "concentration")
def weibull(s: Any, k: Any) -> Line:
    return Line(lambda x: log(k / s) + (k - 1) * log(x / s) - (x / s) ** k, mpf(0))


@law(dist.InverseGamma, "concentration", "rate")
def inverse_gamma(a: Any, b: Any) -> Line:
    norm = a * log(b) - loggamma(a)
    return Line(lambda x: norm - (a + 1) * log(x) - b / x, mpf(0))


@law(dist.FisherSnedecor, "df1", "df2")
def fisher(m: Any, n: Any) -> Line:
    norm = m / 2 * log(m / n) - log(mp.beta(m / 2, n / 2))
    return Line(lambda x: norm + (m / 2 - 1) * log(x) - (m + n) / 2 * log1p(m * x / n), mpf(0))


@law(dist.Pareto, "scale", "alpha")
def pareto(s: Any, a: Any) -> Line:
    return Line(lambda x: log(a) + a * log(s) - (a + 1) * log(x), s)


@law(dist.GeneralizedPareto, "loc", "scale", "concentration")
def generalized_pareto(m: Any, s: Any, c: Any) -> Line:
    upper = m - s / c if c < 0 else inf
    return Line(lambda x: -log(s) - (1 + 1 / c) * log1p(c * (x - m) / s), m, upper)


@law(dist.Beta, "concentration1", "concentration0")
def beta(a: Any, b: Any) -> Line:
    norm = log(mp.beta(a, b))
    return Line(lambda x: (a - 1) * log(x) + (b - 1) * log(1 - x) - norm, mpf(0), mpf(1))


@law(dist.Kumaraswamy, "concentration1", "concentration0")
def kumaraswamy(a: Any, b: Any) -> Line:
    return Line(lambda x: log(a * b) + (a - 1) * log(x) + (b - 1) * log(1 - x**a), mpf(0), mpf(1))


@law(dist.ContinuousBernoulli, "probs")
def continuous_bernoulli(p: Any) -> Line:
    norm = log(2 * mp.atanh(1 - 2 * p) / (1 - 2 * p))
    return Line(lambda x: norm + x * log(p) + (1 - x) * log(1 - p), mpf(0), mpf(1))


@law(dist.Uniform, "low", "high")
def uniform(a: Any, b: Any) -> Line:
    return Line(lambda x: -log(b - a), a, b)


@law(dist.RelaxedBernoulli, "temperature", "probs")
def relaxed_bernoulli(t: Any, p: Any) -> Line:
    """The density of the binary Concrete (Maddison et al., 2017), α = p/(1 - p)."""
    a = p / (1 - p)

    def log_density(x: Any) -> Any:
        mass = a * x**-t + (1 - x) ** -t
        return log(t * a) - (t + 1) * (log(x) + log(1 - x)) - 2 * log(mass)

    return Line(log_density, mpf(0), mpf(1))


# --- counts -----------------------------------------------------------------------------------------------------------


@law(dist.Binomial, "total_count", "probs")
def binomial(n: Any, p: Any) -> Counts:
    return Counts(lambda k: log(mp.binomial(n, k)) + k * log(p) + (n - k) * log(1 - p), int(n))


@law(dist.NegativeBinomial, "total_count", "probs")
def negative_binomial(r: Any, p: Any) -> Counts:
    return Counts(lambda k: log(mp.binomial(k + r - 1, k)) + r * log(1 - p) + k * log(p), None)


@law(dist.Poisson, "rate")
def poisson(rate: Any) -> Counts:
    return Counts(lambda k: k * log(rate) - rate - loggamma(k + 1), None)


# --- special cases ----------------------------------------------------------------------------------------------------

law(dist.Bernoulli, "probs")(lambda p: binomial(1, p))
law(dist.Cauchy, "loc", "scale")(lambda m, s: student(mpf(1), m, s))
law(dist.Chi2, "df")(lambda df: gamma(df / 2, mpf(1) / 2))
law(dist.Exponential, "rate")(lambda rate: gamma(mpf(1), rate))
law(dist.Geometric, "probs")(lambda p: negative_binomial(mpf(1), 1 - p))
law(dist.HalfCauchy, "scale")(lambda s: half(student(mpf(1), mpf(0), s)))
law(dist.HalfNormal, "scale")(lambda s: half(normal(mpf(0), s)))
law(dist.LogNormal, "loc", "scale")(lambda m, s: exponential_of(normal(m, s)))
