"""Pairs of unlike families with formulas of their own: the draws, down to where two families nearly share a member.

The KL comes from the moments of `composed.py`. At 60 digits it needs no care, whatever cancels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mpmath as mp
import numpy as np
import torch
import torch.distributions as dist

from tests.references.composed import FAMILIES, kl_by_moments, xlogx
from tests.references.reference import Exact, Reference, log_uniform
from tests.references.reference import near as nearby

Draw = Callable[[str, int, np.random.Generator], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """The draws of one family; parameters under torch's names.

    Args:
        type: the class.
        draw: (regime, num_draws, rng) -> parameters.
        matched: (mean, standard deviation) of q, arrays -> parameters of the member nearest by moments.
    """

    type: type[dist.Distribution]
    draw: Draw
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


BETA = Family(
    dist.Beta,
    lambda r, n, rng: {key: concentration(r, n, rng) for key in ("concentration1", "concentration0")},
    lambda mean, std: {key: np.ones_like(mean) for key in ("concentration1", "concentration0")},
)
CONTINUOUS_BERNOULLI = Family(
    dist.ContinuousBernoulli,
    lambda r, n, rng: {"logits": log_odds(r, n, rng)},
    lambda mean, std: {"logits": np.where(mean < 0.5, -1 / mean, 1 / (1 - mean))},
)
EXPONENTIAL = Family(
    dist.Exponential, lambda r, n, rng: {"rate": positive(r, n, rng)}, lambda mean, std: {"rate": 1 / mean}
)
GAMMA = Family(
    dist.Gamma,
    lambda r, n, rng: {"concentration": concentration(r, n, rng), "rate": positive(r, n, rng)},
    lambda mean, std: {"concentration": (mean / std) ** 2, "rate": mean / std**2},
)
GUMBEL = Family(dist.Gumbel, location_scale, lambda mean, std: {"loc": mean - 0.45 * std, "scale": 0.78 * std})
LAPLACE = Family(dist.Laplace, location_scale, lambda mean, std: {"loc": mean, "scale": std / np.sqrt(2)})
NORMAL = Family(dist.Normal, location_scale, lambda mean, std: {"loc": mean, "scale": std})
PARETO = Family(
    dist.Pareto,
    lambda r, n, rng: {
        "scale": positive(r, n, rng),
        "alpha": log_uniform(rng, *span(r, (0.5, 20), (1e-6, 1e6), (2.5, 1e5)), n),
    },
    lambda mean, std: {"scale": (mean - 1.7 * std) * 0.999, "alpha": mean / std},
)
UNIFORM = Family(dist.Uniform, interval)


def on(family: Family, draw: Draw) -> Family:
    """Return the family with other draws."""
    return replace(family, draw=draw)


IN_UNIT, AROUND_UNIT = on(UNIFORM, within_unit), on(UNIFORM, around_unit)
FLAT_BETA = on(BETA, lambda r, n, rng: {k: nearby(np.ones(n), rng) for k in ("concentration1", "concentration0")})
FLAT_GAMMA = on(GAMMA, lambda r, n, rng: {"concentration": nearby(np.ones(n), rng), "rate": positive(r, n, rng)})
FLAT_TILT = on(CONTINUOUS_BERNOULLI, lambda r, n, rng: {"logits": nearby(np.zeros(n) + 1, rng) - 1})
EARLY_PARETO = on(
    PARETO,
    lambda r, n, rng: {"scale": positive(r, n, rng) * (1e-7 if r == "wide" else 0.01), "alpha": positive(r, n, rng)},
)


def pair(q: Family, p: Family, near_q: Family | None = None, near_p: Family | None = None) -> Reference:
    """Return the reference of a pair.

    "near" is q, or `near_q`, against `near_p`, or the member of p's family with q's moments.
    """

    def draw(regime: str, n: int, rng: np.random.Generator, dtype: torch.dtype) -> tuple[Any, Any]:
        if regime != "near":
            return q.draw(regime, n, rng), p.draw(regime, n, rng)
        by_q = (near_q or q).draw("near", n, rng)
        if near_p is not None:
            return by_q, near_p.draw("near", n, rng)
        moments = [FAMILIES[q.type].moments({k: mp.mpf(float(x[i])) for k, x in by_q.items()}) for i in range(n)]
        mean, second = (np.array([getattr(m, key)() for m in moments], dtype=object) for key in ("mean", "second"))
        std = np.array([float(mp.sqrt(s - m * m)) for m, s in zip(mean, second, strict=True)])
        with np.errstate(all="ignore"):
            matched = p.matched(mean.astype(float), std)
        return by_q, {key: nearby(x, rng) for key, x in matched.items()}

    name, kl = f"{q.type.__name__}‖{p.type.__name__}", kl_by_moments(q.type, p.type)
    return Reference(name, q.type, p.type, draw, kl, recorded=bool({q.type, p.type} & {dist.Beta, dist.Gamma}))


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
