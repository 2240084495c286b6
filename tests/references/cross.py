"""Pairs of unlike families: each q brings its moments, each p says what its cross-entropy is made of.

At 60 digits nothing here needs care: KL = E_q[-log p] - entropy, whatever cancels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mpmath as mp
import numpy as np
import torch
import torch.distributions as dist

from tests.references.harness import Exact, Reference, log_uniform
from tests.references.harness import near as nearby

Draw = Callable[[str, int, np.random.Generator], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """One family in mpmath, as q (moments) and as p (cross-entropy); parameters under torch's names.

    Args:
        type: the class.
        draw: (regime, num_draws, rng) -> parameters.
        support: parameters -> its two ends.
        entropy: parameters -> differential entropy.
        moments: parameters -> functions that give what a cross-entropy may ask for: mean, second, log, log1m (of
            1 - x), laplace(t) = E[exp(-t x)], deviation(m) = E|x - m|.
        cross_entropy: (parameters, moments of q) -> E_q[-log p].
        matched: (mean, standard deviation) of q, arrays -> parameters of the member nearest by moments.
    """

    type: type[dist.Distribution]
    draw: Draw
    support: Callable[[Exact], tuple[Any, Any]]
    entropy: Callable[[Exact], Any] | None = None
    moments: Callable[[Exact], dict[str, Callable[..., Any]]] | None = None
    cross_entropy: Callable[[Exact, dict[str, Callable[..., Any]]], Any] | None = None
    matched: Callable[[Any, Any], dict[str, Any]] | None = None


Span = tuple[float, float]


def span(regime: str, moderate: Span, wide: Span, near: Span | None = None) -> Span:
    return {"moderate": moderate, "wide": wide, "near": near or moderate}[regime]


def positive(regime: str, n: int, rng: np.random.Generator) -> Any:
    return log_uniform(rng, *span(regime, (0.1, 10), (1e-6, 1e6)), n)


def concentration(regime: str, n: int, rng: np.random.Generator) -> Any:
    return log_uniform(rng, *span(regime, (0.2, 20), (1e-4, 1e6), (0.2, 1e6)), n)


def real(regime: str, n: int, rng: np.random.Generator) -> Any:
    return rng.choice([-1, 1], n) * log_uniform(rng, *span(regime, (0.1, 5), (1e-6, 1e6)), n)


def log_odds(regime: str, n: int, rng: np.random.Generator) -> Any:
    return rng.choice([-1, 1], n) * log_uniform(rng, *span(regime, (0.05, 6), (1e-6, 100), (1e-3, 60)), n)


def location_scale(regime: str, n: int, rng: np.random.Generator) -> dict[str, Any]:
    return {"loc": real(regime, n, rng), "scale": positive(regime, n, rng)}


def interval(regime: str, n: int, rng: np.random.Generator) -> dict[str, Any]:
    low = positive(regime, n, rng)
    return {"low": low, "high": low * (1 + log_uniform(rng, *span(regime, (0.1, 10), (1e-3, 1e3)), n))}


def within_unit(regime: str, n: int, rng: np.random.Generator) -> dict[str, Any]:
    """Draw intervals in [0, 1]; near, they fall short of it by as little as 1e-8."""
    if regime == "near":
        return {"low": log_uniform(rng, 1e-8, 1e-2, n), "high": 1 - log_uniform(rng, 1e-8, 1e-2, n)}
    ends = np.sort(rng.uniform(size=(2, n)), 0)
    if regime == "wide":
        ends[1] = ends[0] + (1 - ends[0]) * log_uniform(rng, 1e-6, 1, n)
    return {"low": ends[0], "high": ends[1]}


def around_unit(regime: str, n: int, rng: np.random.Generator) -> dict[str, Any]:
    """Draw intervals that contain [0, 1]; near, by as little as 1e-8."""
    gaps = log_uniform(rng, *((1e-8, 1e-2) if regime == "near" else span(regime, (0.1, 10), (1e-6, 1e6))), (2, n))
    return {"low": -gaps[0], "high": 1 + gaps[1]}


def xlogx(x: Any) -> Any:
    return x * mp.log(x) if x else mp.mpf(0)


def normal_moments(p: Exact) -> dict[str, Callable[..., Any]]:
    def deviation(m: Any) -> Any:
        z = (p["loc"] - m) / p["scale"]
        return p["scale"] * (mp.sqrt(2 / mp.pi) * mp.exp(-z * z / 2) + z * mp.erf(z / mp.sqrt(2)))

    return {
        "mean": lambda: p["loc"],
        "second": lambda: p["loc"] ** 2 + p["scale"] ** 2,
        "laplace": lambda t: mp.exp(t * t * p["scale"] ** 2 / 2 - t * p["loc"]),
        "deviation": deviation,
    }


def uniform_moments(p: Exact) -> dict[str, Callable[..., Any]]:
    low, high = p["low"], p["high"]
    width = high - low
    return {
        "mean": lambda: (low + high) / 2,
        "second": lambda: (low**2 + low * high + high**2) / 3,
        "log": lambda: (xlogx(high) - xlogx(low)) / width - 1,
        "log1m": lambda: (xlogx(1 - low) - xlogx(1 - high)) / width - 1,
        "laplace": lambda t: (mp.exp(-t * low) - mp.exp(-t * high)) / (t * width),
    }


def beta_moments(p: Exact) -> dict[str, Callable[..., Any]]:
    a, b = p["concentration1"], p["concentration0"]
    return {
        "mean": lambda: a / (a + b),
        "second": lambda: a * (a + 1) / ((a + b) * (a + b + 1)),
        "log": lambda: mp.digamma(a) - mp.digamma(a + b),
        "log1m": lambda: mp.digamma(b) - mp.digamma(a + b),
    }


def beta_cross_entropy(p: Exact, q: dict[str, Callable[..., Any]]) -> Any:
    a, b = p["concentration1"], p["concentration0"]
    log_norm = mp.loggamma(a) + mp.loggamma(b) - mp.loggamma(a + b)
    return log_norm - (a - 1) * q["log"]() - (b - 1) * q["log1m"]()


def beta_entropy(p: Exact) -> Any:
    return beta_cross_entropy(p, beta_moments(p))


def gamma_moments(p: Exact) -> dict[str, Callable[..., Any]]:
    a, rate = p["concentration"], p["rate"]
    return {
        "mean": lambda: a / rate,
        "second": lambda: a * (a + 1) / rate**2,
        "log": lambda: mp.digamma(a) - mp.log(rate),
        "laplace": lambda t: mp.exp(-a * mp.log1p(t / rate)),
    }


def gamma_cross_entropy(p: Exact, q: dict[str, Callable[..., Any]]) -> Any:
    a, rate = p["concentration"], p["rate"]
    return mp.loggamma(a) - a * mp.log(rate) - (a - 1) * q["log"]() + rate * q["mean"]()


def as_gamma(p: Exact) -> Exact:
    return {"concentration": mp.mpf(1), "rate": p["rate"]}


def tilt_moments(p: Exact) -> dict[str, Callable[..., Any]]:
    t = p["logits"]
    mean = 1 / (1 - mp.exp(-t)) - 1 / t
    return {"mean": lambda: mean, "second": lambda: 1 / t**2 - mp.exp(t) / mp.expm1(t) ** 2 + mean**2}


def tilt_cross_entropy(p: Exact, q: dict[str, Callable[..., Any]]) -> Any:
    t = p["logits"]
    return mp.log(mp.expm1(t) / t) - t * q["mean"]()


def pareto_moments(p: Exact) -> dict[str, Callable[..., Any]]:
    start, alpha = p["scale"], p["alpha"]
    return {
        "mean": lambda: alpha * start / (alpha - 1) if alpha > 1 else mp.inf,
        "second": lambda: alpha * start**2 / (alpha - 2) if alpha > 2 else mp.inf,
        "log": lambda: mp.log(start) + 1 / alpha,
    }


def normal_cross_entropy(p: Exact, q: dict[str, Callable[..., Any]]) -> Any:
    if q["second"]() == mp.inf:
        return mp.inf
    square = q["second"]() - 2 * p["loc"] * q["mean"]() + p["loc"] ** 2
    return mp.log(2 * mp.pi * p["scale"] ** 2) / 2 + square / (2 * p["scale"] ** 2)


def gumbel_cross_entropy(p: Exact, q: dict[str, Callable[..., Any]]) -> Any:
    scale = p["scale"]
    return mp.log(scale) + (q["mean"]() - p["loc"]) / scale + mp.exp(p["loc"] / scale) * q["laplace"](1 / scale)


def whole_line(p: Exact) -> tuple[Any, Any]:
    return -mp.inf, mp.inf


BETA = Family(
    dist.Beta,
    lambda r, n, rng: {key: concentration(r, n, rng) for key in ("concentration1", "concentration0")},
    lambda p: (0, 1),
    beta_entropy,
    beta_moments,
    beta_cross_entropy,
    lambda mean, std: {key: np.ones_like(mean) for key in ("concentration1", "concentration0")},
)
CONTINUOUS_BERNOULLI = Family(
    dist.ContinuousBernoulli,
    lambda r, n, rng: {"logits": log_odds(r, n, rng)},
    lambda p: (0, 1),
    lambda p: tilt_cross_entropy(p, tilt_moments(p)),
    tilt_moments,
    tilt_cross_entropy,
    lambda mean, std: {"logits": np.where(mean < 0.5, -1 / mean, 1 / (1 - mean))},
)
EXPONENTIAL = Family(
    dist.Exponential,
    lambda r, n, rng: {"rate": positive(r, n, rng)},
    lambda p: (0, mp.inf),
    lambda p: 1 - mp.log(p["rate"]),
    lambda p: gamma_moments(as_gamma(p)),
    lambda p, q: q["mean"]() * p["rate"] - mp.log(p["rate"]),
    lambda mean, std: {"rate": 1 / mean},
)
GAMMA = Family(
    dist.Gamma,
    lambda r, n, rng: {"concentration": concentration(r, n, rng), "rate": positive(r, n, rng)},
    lambda p: (0, mp.inf),
    lambda p: gamma_cross_entropy(p, gamma_moments(p)),
    gamma_moments,
    gamma_cross_entropy,
    lambda mean, std: {"concentration": (mean / std) ** 2, "rate": mean / std**2},
)
GUMBEL = Family(
    dist.Gumbel,
    location_scale,
    whole_line,
    lambda p: mp.log(p["scale"]) + 1 + mp.euler,
    lambda p: {
        "mean": lambda: p["loc"] + mp.euler * p["scale"],
        "second": lambda: (p["loc"] + mp.euler * p["scale"]) ** 2 + (mp.pi * p["scale"]) ** 2 / 6,
    },
    gumbel_cross_entropy,
    lambda mean, std: {"loc": mean - 0.45 * std, "scale": 0.78 * std},
)
LAPLACE = Family(
    dist.Laplace,
    location_scale,
    whole_line,
    lambda p: mp.log(2 * p["scale"]) + 1,
    lambda p: {"mean": lambda: p["loc"], "second": lambda: p["loc"] ** 2 + 2 * p["scale"] ** 2},
    lambda p, q: mp.log(2 * p["scale"]) + q["deviation"](p["loc"]) / p["scale"],
    lambda mean, std: {"loc": mean, "scale": std / np.sqrt(2)},
)
NORMAL = Family(
    dist.Normal,
    location_scale,
    whole_line,
    lambda p: mp.log(2 * mp.pi * mp.e * p["scale"] ** 2) / 2,
    normal_moments,
    normal_cross_entropy,
    lambda mean, std: {"loc": mean, "scale": std},
)
PARETO = Family(
    dist.Pareto,
    lambda r, n, rng: {
        "scale": positive(r, n, rng),
        "alpha": log_uniform(rng, *span(r, (0.5, 20), (1e-6, 1e6), (2.5, 1e5)), n),
    },
    lambda p: (p["scale"], mp.inf),
    lambda p: mp.log(p["scale"] / p["alpha"]) + 1 + 1 / p["alpha"],
    pareto_moments,
    lambda p, q: (p["alpha"] + 1) * q["log"]() - mp.log(p["alpha"]) - p["alpha"] * mp.log(p["scale"]),
    lambda mean, std: {"scale": (mean - 1.7 * std) * 0.999, "alpha": mean / std},
)
UNIFORM = Family(
    dist.Uniform,
    interval,
    lambda p: (p["low"], p["high"]),
    lambda p: mp.log(p["high"] - p["low"]),
    uniform_moments,
    lambda p, q: mp.log(p["high"] - p["low"]),
)


def on(family: Family, draw: Draw) -> Family:
    """Return the family with other draws."""
    return Family(**{**vars(family), "draw": draw})


IN_UNIT, AROUND_UNIT = on(UNIFORM, within_unit), on(UNIFORM, around_unit)
FLAT_BETA = on(BETA, lambda r, n, rng: {k: nearby(np.ones(n), rng) for k in ("concentration1", "concentration0")})
FLAT_GAMMA = on(GAMMA, lambda r, n, rng: {"concentration": nearby(np.ones(n), rng), "rate": positive(r, n, rng)})
FLAT_TILT = on(CONTINUOUS_BERNOULLI, lambda r, n, rng: {"logits": nearby(np.zeros(n) + 1, rng) - 1})
EARLY_PARETO = on(
    PARETO,
    lambda r, n, rng: {"scale": positive(r, n, rng) * (1e-7 if r == "wide" else 0.01), "alpha": positive(r, n, rng)},
)


def pair(q: Family, p: Family, near_q: Family | None = None, near_p: Family | None = None) -> Reference:
    """Describe a pair; "near" is q, or `near_q`, against `near_p`, or the member of p's family with q's moments."""

    def kl(by_q: Exact, by_p: Exact) -> Any:
        (low, high), (p_low, p_high) = q.support(by_q), p.support(by_p)
        if low < p_low or high > p_high:
            return mp.inf
        return p.cross_entropy(by_p, q.moments(by_q)) - q.entropy(by_q)

    def draw(regime: str, n: int, rng: np.random.Generator, dtype: torch.dtype) -> tuple[Any, Any]:
        if regime != "near":
            return q.draw(regime, n, rng), p.draw(regime, n, rng)
        by_q = (near_q or q).draw("near", n, rng)
        if near_p is not None:
            return by_q, near_p.draw("near", n, rng)
        moments = [q.moments({key: mp.mpf(float(x[i])) for key, x in by_q.items()}) for i in range(n)]
        mean, second = (np.array([m[key]() for m in moments], dtype=object) for key in ("mean", "second"))
        std = np.array([float(mp.sqrt(s - m * m)) for m, s in zip(mean, second, strict=True)])
        with np.errstate(all="ignore"):
            matched = p.matched(mean.astype(float), std)
        return by_q, {key: nearby(x, rng) for key, x in matched.items()}

    return Reference(f"{q.type.__name__}‖{p.type.__name__}", q.type, p.type, draw, kl)


def entropy_of_bernoulli(one: Any) -> Any:
    return -xlogx(one) - xlogx(1 - one)


def bernoulli_poisson() -> Reference:
    def kl(q: Exact, p: Exact) -> Any:
        one = 1 / (1 + mp.exp(-q["logits"]))
        return p["rate"] - one * mp.log(p["rate"]) - entropy_of_bernoulli(one)

    def draw(regime: str, n: int, rng: np.random.Generator, dtype: torch.dtype) -> tuple[Any, Any]:
        logits = log_odds("moderate" if regime == "near" else regime, n, rng)
        rate = nearby(1 / (1 + np.exp(-logits)), rng) if regime == "near" else positive(regime, n, rng)
        return {"logits": logits}, {"rate": rate}

    return Reference("Bernoulli‖Poisson", dist.Bernoulli, dist.Poisson, draw, kl)


REFERENCES = [
    bernoulli_poisson(),
    pair(BETA, CONTINUOUS_BERNOULLI, FLAT_BETA, FLAT_TILT),
    pair(BETA, EXPONENTIAL),
    pair(BETA, GAMMA),
    pair(BETA, NORMAL),
    pair(BETA, AROUND_UNIT, FLAT_BETA, AROUND_UNIT),
    pair(CONTINUOUS_BERNOULLI, EXPONENTIAL),
    pair(CONTINUOUS_BERNOULLI, NORMAL),
    pair(CONTINUOUS_BERNOULLI, AROUND_UNIT, FLAT_TILT, AROUND_UNIT),
    pair(EXPONENTIAL, GAMMA),
    pair(EXPONENTIAL, GUMBEL),
    pair(EXPONENTIAL, NORMAL),
    pair(GAMMA, EXPONENTIAL, FLAT_GAMMA),
    pair(GAMMA, GUMBEL),
    pair(GAMMA, NORMAL),
    pair(GUMBEL, NORMAL),
    pair(LAPLACE, NORMAL),
    pair(NORMAL, GUMBEL),
    pair(NORMAL, LAPLACE),
    pair(PARETO, EXPONENTIAL),
    pair(PARETO, GAMMA),
    pair(PARETO, NORMAL),
    pair(IN_UNIT, BETA, IN_UNIT, FLAT_BETA),
    pair(IN_UNIT, CONTINUOUS_BERNOULLI, IN_UNIT, FLAT_TILT),
    pair(UNIFORM, EXPONENTIAL),
    pair(UNIFORM, GAMMA),
    pair(UNIFORM, GUMBEL),
    pair(UNIFORM, NORMAL),
    pair(UNIFORM, EARLY_PARETO),
]
