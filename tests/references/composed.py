"""Families on the line in mpmath: moments as q and the cross-entropy as p, from which the KL of every pair follows.

At 40 digits nothing needs care. Unless a family gives it, the mean of log x is a derivative of E[x^k] at k = 0, and so
is its variance. A moment is infinite where the integral diverges.
"""

from collections.abc import Callable
from typing import Any

import mpmath as mp
import numpy as np
import torch
import torch.distributions as dist

from tests.references.beyond_torch import MOMENTS
from tests.references.moments import (
    Draw,
    Family,
    Moments,
    drawn,
    gamma_ratio,
    half_line,
    location_scale,
    positive,
    real,
    shape,
    spread,
    unit,
    whole_line,
)
from tests.references.reference import Exact, Reference, log_uniform

DIGITS = 40


def interval(low: Callable[..., Any]) -> Draw:
    def draw(rng: np.random.Generator, regime: str, n: int) -> dict[str, Any]:
        start = low(rng, regime, n)
        return {"low": start, "high": start + positive(rng, regime, n)}

    return draw


def beta_moments(p: Exact) -> Moments:
    a, b = p["concentration1"], p["concentration0"]
    return Moments(
        lambda k: gamma_ratio(a, k) / gamma_ratio(a + b, k),
        -a,
        log=lambda: mp.psi(0, a) - mp.psi(0, a + b),
        log1m=lambda: mp.psi(0, b) - mp.psi(0, a + b),
    )


def beta_entropy(a: Any, b: Any) -> Any:
    log_beta = mp.loggamma(a) + mp.loggamma(b) - mp.loggamma(a + b)
    return log_beta - (a - 1) * mp.psi(0, a) - (b - 1) * mp.psi(0, b) + (a + b - 2) * mp.psi(0, a + b)


def normal_deviation(loc: Any, scale: Any, m: Any) -> Any:
    z = (loc - m) / scale
    return scale * (mp.sqrt(2 / mp.pi) * mp.exp(-z * z / 2) + z * mp.erf(z / mp.sqrt(2)))


def half_normal_deviation(s: Any, m: Any) -> Any:
    mean = s * mp.sqrt(2 / mp.pi)
    above = mean * mp.exp(-((m / s) ** 2) / 2) - m * mp.erfc(m / s / mp.sqrt(2))
    return mean - m if m < 0 else m - mean + 2 * above


def log_normal_deviation(loc: Any, scale: Any, m: Any) -> Any:
    mean = mp.exp(loc + scale**2 / 2)
    if m <= 0:
        return mean - m
    d = (loc - mp.log(m)) / scale
    return m - mean + 2 * (mean * mp.ncdf(d + scale) - m * mp.ncdf(d))


def pareto_deviation(s: Any, alpha: Any, m: Any) -> Any:
    if alpha <= 1:
        return mp.inf
    mean = s * alpha / (alpha - 1)
    return mean - m if m < s else m - mean + 2 * m * (s / m) ** alpha / (alpha - 1)


def generalized_pareto_deviation(loc: Any, scale: Any, c: Any, m: Any) -> Any:
    if c >= 1:
        return mp.inf
    mean, base = loc + scale / (1 - c), 1 + c * (m - loc) / scale
    if m < loc:
        return mean - m
    return m - mean + (2 * scale / (1 - c) * base ** (1 - 1 / c) if base > 0 else 0)


def gumbel_deviation(loc: Any, scale: Any, m: Any) -> Any:
    z = (m - loc) / scale
    w = mp.exp(-z)
    return scale * (z - mp.euler + 2 * (mp.e1(w) + mp.log(w) + mp.euler))


def xlogx(x: Any) -> Any:
    return x * mp.log(x) if x else mp.mpf(0)


def uniform_moments(p: Exact) -> Moments:
    low, high = p["low"], p["high"]
    width = high - low

    def power(k: Any) -> Any:
        if k == -1:
            return mp.log(high / low) / width
        return (high ** (k + 1) - low ** (k + 1)) / (k + 1) / width

    def between(primitive: Any) -> Any:
        return (primitive(high) - primitive(low)) / width

    def deviation(m: Any) -> Any:
        return between(lambda x: (x - m) * abs(x - m) / 2)

    def log_square(m: Any, c: Any) -> Any:
        return between(lambda x: (x - m) * mp.log(c**2 + (x - m) ** 2) - 2 * (x - m) + 2 * c * mp.atan((x - m) / c))

    return Moments(
        power,
        mean=lambda: (low + high) / 2,
        second=lambda: (low**2 + low * high + high**2) / 3,
        deviation=deviation,
        log=lambda: between(xlogx) - 1,
        log1m=lambda: (xlogx(1 - low) - xlogx(1 - high)) / width - 1,
        laplace=lambda t: (mp.exp(-t * low) - mp.exp(-t * high)) / (t * width),
        log_square=log_square,
        log_affine=lambda c: between(lambda x: (1 + c * x) * mp.log(1 + c * x) / c - x),
        cosine=lambda m: between(lambda x: mp.sin(x - m)),
    )


def tilt(p: Exact) -> Moments:
    t = p["logits"]

    def laplace(s: Any) -> Any:
        return mp.expm1(t - s) / (t - s) * t / mp.expm1(t)

    mean = mp.exp(t) / mp.expm1(t) - 1 / t
    return Moments(
        mean=lambda: mean,
        second=lambda: mp.exp(t) / mp.expm1(t) - 2 * mean / t,
        laplace=laplace,
    )


def generalized_pareto_support(p: Exact) -> tuple[Any, Any]:
    loc, scale, c = p["loc"], p["scale"], p["concentration"]
    return loc, loc - scale / c if c < 0 else mp.inf


def gamma_cross_entropy(a: Any, rate: Any, log: Any, mean: Any) -> Any:
    return mp.loggamma(a) - a * mp.log(rate) - (a - 1) * log + rate * mean


def student_t_cross_entropy(p: Exact, q: Any) -> Any:
    nu, scale = p["df"], p["scale"]
    log_norm = mp.log(mp.beta(nu / 2, mp.mpf(1) / 2)) + mp.log(nu) / 2 + mp.log(scale)
    c = scale * mp.sqrt(nu)
    return log_norm + (nu + 1) / 2 * (q.log_square(p["loc"], c) - 2 * mp.log(c))


def fisher_cross_entropy(p: Exact, q: Any) -> Any:
    a, b = p["df1"] / 2, p["df2"] / 2
    return mp.log(mp.beta(a, b)) - a * mp.log(a / b) - (a - 1) * q.log() + (a + b) * q.log_affine(a / b)


def log_normal_cross_entropy(p: Exact, q: Any) -> Any:
    loc, scale, log = p["loc"], p["scale"], q.log()
    return log + mp.log(2 * mp.pi * scale**2) / 2 + (q.log_second() - 2 * loc * log + loc**2) / scale**2 / 2


def normal_cross_entropy(p: Exact, q: Any) -> Any:
    second = q.second()
    if mp.isinf(second):
        return mp.inf
    return (
        mp.log(2 * mp.pi * p["scale"] ** 2) / 2
        + (second - 2 * p["loc"] * q.mean() + p["loc"] ** 2) / p["scale"] ** 2 / 2
    )


def fisher_entropy(p: Exact) -> Any:
    a, b = p["df1"] / 2, p["df2"] / 2
    bend = (1 - a) * mp.psi(0, a) - (1 + b) * mp.psi(0, b) + (a + b) * mp.psi(0, a + b)
    return mp.log(mp.beta(a, b)) + bend + mp.log(b / a)


FAMILIES: dict[type[dist.Distribution], Family] = {
    **MOMENTS,
    dist.Beta: Family(
        drawn(concentration1=shape, concentration0=shape),
        unit,
        lambda p: beta_entropy(p["concentration1"], p["concentration0"]),
        beta_moments,
        lambda p, q: (
            mp.log(mp.beta(p["concentration1"], p["concentration0"]))
            - (p["concentration1"] - 1) * q.log()
            - (p["concentration0"] - 1) * q.log1m()
        ),
    ),
    dist.Cauchy: Family(
        location_scale(),
        whole_line,
        lambda p: mp.log(4 * mp.pi * p["scale"]),
        lambda p: Moments(log_square=lambda m, c: mp.log((c + p["scale"]) ** 2 + (p["loc"] - m) ** 2)),
        lambda p, q: mp.log(mp.pi / p["scale"]) + q.log_square(p["loc"], p["scale"]),
    ),
    dist.ContinuousBernoulli: Family(
        drawn(logits=lambda rng, regime, n: rng.choice([-1, 1], n) * log_uniform(rng, 0.1, 20, n)),
        unit,
        lambda p: -p["logits"] * tilt(p).mean() + mp.log(mp.expm1(p["logits"]) / p["logits"]),
        tilt,
        lambda p, q: mp.log(mp.expm1(p["logits"]) / p["logits"]) - p["logits"] * q.mean(),
    ),
    dist.Exponential: Family(
        drawn(rate=positive),
        half_line,
        lambda p: 1 - mp.log(p["rate"]),
        lambda p: Moments(
            lambda k: mp.gamma(1 + k) / p["rate"] ** k,
            -1,
            log=lambda: -mp.euler - mp.log(p["rate"]),
            laplace=lambda t: p["rate"] / (p["rate"] + t),
            deviation=lambda m: (
                (1 / p["rate"] - m) if m < 0 else m - 1 / p["rate"] + 2 * mp.exp(-p["rate"] * m) / p["rate"]
            ),
        ),
        lambda p, q: p["rate"] * q.mean() - mp.log(p["rate"]),
    ),
    dist.FisherSnedecor: Family(
        drawn(df1=shape, df2=spread(5, 30, 1e-1, 1e3)),
        half_line,
        fisher_entropy,
        lambda p: Moments(
            lambda k: (p["df2"] / p["df1"]) ** k * gamma_ratio(p["df1"] / 2, k) * gamma_ratio(p["df2"] / 2, -k),
            -p["df1"] / 2,
            p["df2"] / 2,
        ),
        fisher_cross_entropy,
    ),
    dist.Gamma: Family(
        drawn(concentration=shape, rate=positive),
        half_line,
        lambda p: (
            p["concentration"]
            - mp.log(p["rate"])
            + mp.loggamma(p["concentration"])
            + (1 - p["concentration"]) * mp.psi(0, p["concentration"])
        ),
        lambda p: Moments(
            lambda k: gamma_ratio(p["concentration"], k) / p["rate"] ** k,
            -p["concentration"],
            log=lambda: mp.psi(0, p["concentration"]) - mp.log(p["rate"]),
            laplace=lambda t: mp.exp(-p["concentration"] * mp.log1p(t / p["rate"])),
        ),
        lambda p, q: gamma_cross_entropy(p["concentration"], p["rate"], q.log(), q.mean()),
    ),
    dist.GeneralizedPareto: Family(
        drawn(
            loc=positive,
            scale=positive,
            concentration=lambda rng, regime, n: rng.uniform(-0.9, 0.9 if regime == "wide" else 0.4, n),
        ),
        generalized_pareto_support,
        lambda p: mp.log(p["scale"]) + p["concentration"] + 1,
        lambda p: Moments(
            mean=lambda: p["loc"] + p["scale"] / (1 - p["concentration"]) if p["concentration"] < 1 else mp.inf,
            second=lambda: (
                (p["loc"] + p["scale"] / (1 - p["concentration"])) ** 2
                + (p["scale"] / (1 - p["concentration"])) ** 2 / (1 - 2 * p["concentration"])
                if 2 * p["concentration"] < 1
                else mp.inf
            ),
            deviation=lambda m: generalized_pareto_deviation(p["loc"], p["scale"], p["concentration"], m),
        ),
    ),
    dist.Gumbel: Family(
        location_scale(),
        whole_line,
        lambda p: mp.log(p["scale"]) + 1 + mp.euler,
        lambda p: Moments(
            mean=lambda: p["loc"] + mp.euler * p["scale"],
            second=lambda: (p["loc"] + mp.euler * p["scale"]) ** 2 + (mp.pi * p["scale"]) ** 2 / 6,
            deviation=lambda m: gumbel_deviation(p["loc"], p["scale"], m),
        ),
        lambda p, q: (
            mp.log(p["scale"])
            + (q.mean() - p["loc"]) / p["scale"]
            + q.laplace(1 / p["scale"]) * mp.exp(p["loc"] / p["scale"])
        ),
    ),
    dist.HalfCauchy: Family(
        drawn(scale=positive),
        half_line,
        lambda p: mp.log(2 * mp.pi * p["scale"]),
        lambda p: Moments(lambda k: p["scale"] ** k / mp.cos(mp.pi * k / 2), -1, 1),
        lambda p, q: mp.log(mp.pi / 2 / p["scale"]) + q.log_square(mp.mpf(0), p["scale"]),
    ),
    dist.HalfNormal: Family(
        drawn(scale=positive),
        half_line,
        lambda p: mp.log(mp.pi * mp.e * p["scale"] ** 2 / 2) / 2,
        lambda p: Moments(
            lambda k: (mp.sqrt(2) * p["scale"]) ** k * mp.gamma((k + 1) / mp.mpf(2)) / mp.sqrt(mp.pi),
            -1,
            laplace=lambda t: mp.exp((t * p["scale"]) ** 2 / 2) * mp.erfc(t * p["scale"] / mp.sqrt(2)),
            deviation=lambda m: half_normal_deviation(p["scale"], m),
        ),
        lambda p, q: mp.log(mp.pi * p["scale"] ** 2 / 2) / 2 + q.second() / p["scale"] ** 2 / 2,
    ),
    dist.Laplace: Family(
        location_scale(),
        whole_line,
        lambda p: 1 + mp.log(2 * p["scale"]),
        lambda p: Moments(
            mean=lambda: p["loc"],
            second=lambda: p["loc"] ** 2 + 2 * p["scale"] ** 2,
            laplace=lambda t: mp.exp(-t * p["loc"]) / (1 - (t * p["scale"]) ** 2) if t * p["scale"] < 1 else mp.inf,
        ),
        lambda p, q: mp.log(2 * p["scale"]) + q.deviation(p["loc"]) / p["scale"],
    ),
    dist.LogNormal: Family(
        drawn(loc=spread(0.2, 3, 1e-2, 10), scale=spread(0.2, 2, 1e-2, 5)),
        half_line,
        lambda p: p["loc"] + mp.log(2 * mp.pi * mp.e * p["scale"] ** 2) / 2,
        lambda p: Moments(
            lambda k: mp.exp(k * p["loc"] + (k * p["scale"]) ** 2 / 2),
            deviation=lambda m: log_normal_deviation(p["loc"], p["scale"], m),
        ),
        log_normal_cross_entropy,
    ),
    dist.Normal: Family(
        location_scale(),
        whole_line,
        lambda p: mp.log(2 * mp.pi * mp.e * p["scale"] ** 2) / 2,
        lambda p: Moments(
            mean=lambda: p["loc"],
            second=lambda: p["loc"] ** 2 + p["scale"] ** 2,
            laplace=lambda t: mp.exp((t * p["scale"]) ** 2 / 2 - t * p["loc"]),
            deviation=lambda m: normal_deviation(p["loc"], p["scale"], m),
        ),
        normal_cross_entropy,
    ),
    dist.Pareto: Family(
        drawn(scale=positive, alpha=spread(0.5, 20, 1e-2, 1e3)),
        lambda p: (p["scale"], mp.inf),
        lambda p: mp.log(p["scale"] / p["alpha"]) + 1 / p["alpha"] + 1,
        lambda p: Moments(
            lambda k: p["scale"] ** k * p["alpha"] / (p["alpha"] - k),
            -mp.inf,
            p["alpha"],
            log=lambda: mp.log(p["scale"]) + 1 / p["alpha"],
            deviation=lambda m: pareto_deviation(p["scale"], p["alpha"], m),
        ),
        lambda p, q: (p["alpha"] + 1) * q.log() - mp.log(p["alpha"]) - p["alpha"] * mp.log(p["scale"]),
    ),
    dist.StudentT: Family(
        drawn(df=spread(0.5, 20, 1e-1, 1e3), loc=real, scale=positive),
        whole_line,
        lambda p: (
            (p["df"] + 1) / 2 * (mp.psi(0, (p["df"] + 1) / 2) - mp.psi(0, p["df"] / 2))
            + mp.log(mp.beta(p["df"] / 2, mp.mpf(1) / 2) * mp.sqrt(p["df"]) * p["scale"])
        ),
        lambda p: Moments(
            mean=lambda: p["loc"],
            second=lambda: p["loc"] ** 2 + p["scale"] ** 2 * p["df"] / (p["df"] - 2) if p["df"] > 2 else mp.inf,
        ),
        student_t_cross_entropy,
    ),
    dist.Uniform: Family(
        interval(positive),
        lambda p: (p["low"], p["high"]),
        lambda p: mp.log(p["high"] - p["low"]),
        uniform_moments,
        lambda p, q: mp.log(p["high"] - p["low"]),
    ),
    dist.VonMises: Family(
        drawn(loc=lambda rng, regime, n: rng.uniform(-3, 3, n), concentration=positive),
        lambda p: (-mp.pi, mp.pi),
        lambda p: (
            mp.log(2 * mp.pi * mp.besseli(0, p["concentration"]))
            - p["concentration"] * mp.besseli(1, p["concentration"]) / mp.besseli(0, p["concentration"])
        ),
        lambda p: Moments(),
        lambda p, q: mp.log(2 * mp.pi * mp.besseli(0, p["concentration"])) - p["concentration"] * q.cosine(p["loc"]),
    ),
}


def kl_by_moments(type_q: type[dist.Distribution], type_p: type[dist.Distribution]) -> Callable[[Exact, Exact], Any]:
    """Return the KL of two families as a function of their parameters: the cross-entropy less the entropy of q."""
    q, p = FAMILIES[type_q], FAMILIES[type_p]

    def kl(by_q: Exact, by_p: Exact) -> Any:
        (low, high), (p_low, p_high) = q.support(by_q), p.support(by_p)
        if low < p_low or high > p_high:
            return mp.inf
        cross_entropy = p.cross_entropy(by_p, q.moments(by_q))
        return mp.inf if mp.isinf(cross_entropy) else cross_entropy - q.entropy(by_q)

    return kl


def before(rng: np.random.Generator, regime: str, n: int) -> Any:
    return -4 - positive(rng, regime, n)


# The draws of p where its support is to contain that of q.
AS_P: dict[type[dist.Distribution], Draw] = {
    dist.GeneralizedPareto: drawn(loc=before, scale=positive, concentration=positive),
    dist.Uniform: drawn(low=before, high=lambda rng, regime, n: 2 + positive(rng, regime, n)),
}


def pair(type_q: type[dist.Distribution], type_p: type[dist.Distribution]) -> Reference:
    """Return the reference of a pair; a Uniform p is drawn around [-4, 2]."""
    q, p = FAMILIES[type_q], FAMILIES[type_p]

    def draw(regime: str, n: int, rng: np.random.Generator, dtype: torch.dtype) -> tuple[Any, Any]:
        return q.draw(rng, regime, n), AS_P.get(type_p, p.draw)(rng, regime, n)

    name, kl = f"{type_q.__name__}‖{type_p.__name__}", kl_by_moments(type_q, type_p)
    return Reference(name, type_q, type_p, draw, kl, regimes=("moderate", "wide"), digits=DIGITS, recorded=True)
