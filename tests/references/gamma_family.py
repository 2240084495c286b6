"""Pairs of one family whose KL takes lgamma, Bessel functions or the like: the KL by the textbook, in mpmath."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import torch
from torch import Tensor
from torch.distributions import Beta, ContinuousBernoulli, Dirichlet, Gamma, VonMises, Wishart

from tests.references.reference import Exact, Reference, log_uniform, near

Arrays = dict[str, Any]
Rng = np.random.Generator
Spread = Callable[[str, int, Rng], Any]  # (regime, size, rng) -> one parameter

COMPONENTS = 4
DIM = 3


def concentration(regime: str, size: Any, rng: Rng) -> Any:
    return log_uniform(rng, 0.1, 20, size) if regime == "moderate" else log_uniform(rng, 1e-4, 1e6, size)


def concentrations(regime: str, size: int, rng: Rng) -> Any:
    return concentration(regime, (size, COMPONENTS), rng)


def rate(regime: str, size: int, rng: Rng) -> Any:
    return log_uniform(rng, 0.1, 20, size) if regime == "moderate" else log_uniform(rng, 1e-6, 1e6, size)


def angle(regime: str, size: int, rng: Rng) -> Any:
    return rng.uniform(-10, 10, size) if regime == "wide" else rng.uniform(-np.pi, np.pi, size)


def logit(regime: str, size: int, rng: Rng) -> Any:
    signs = rng.choice([-1, 1], size)
    return rng.uniform(-4, 4, size) if regime == "moderate" else signs * log_uniform(rng, 1e-4, 100, size)


def drawn(**spreads: Spread) -> Callable[..., tuple[Arrays, Arrays]]:
    """Draw q and p apart from one another, or p near q."""

    def draw(regime: str, size: int, rng: Rng, dtype: torch.dtype) -> tuple[Arrays, Arrays]:
        q = {key: spread(regime, size, rng) for key, spread in spreads.items()}
        if regime == "near":
            return q, {key: near(value, rng) for key, value in q.items()}
        return q, {key: spread(regime, size, rng) for key, spread in spreads.items()}

    return draw


def draw_probabilities(regime: str, size: int, rng: Rng, dtype: torch.dtype) -> tuple[Arrays, Arrays]:
    """Draw distances from 0 or 1 down to 1e-7, and every fourth time from ½, down to 1e-9."""
    at_half, flipped = rng.random(size) < 0.25, rng.random(size) < 0.5

    def distance() -> Any:
        low = 0.05 if regime == "moderate" else 1e-7
        return np.where(at_half, log_uniform(rng, 1e-9, 0.1, size), log_uniform(rng, low, 0.5, size))

    def probs(x: Any) -> Arrays:
        sign = np.where(flipped, -1, 1)
        return {"probs": np.where(at_half, 0.5 + sign * x, np.where(flipped, 1 - x, x))}

    q = distance()
    return probs(q), probs(near(q, rng) if regime == "near" else distance())


def draw_wisharts(regime: str, size: int, rng: Rng, dtype: torch.dtype) -> tuple[Arrays, Arrays]:
    """Draw the degrees of freedom by their excess over dim - 1, and factors whose rows have their own scales."""
    is_wide = regime == "wide"

    def one() -> tuple[Any, Any]:
        scale = log_uniform(rng, *((1e-3, 1e3) if is_wide else (0.3, 3)), (size, DIM))
        factor = np.tril(0.5 * rng.standard_normal((size, DIM, DIM)), -1) + np.eye(DIM)
        return log_uniform(rng, *((1e-3, 1e6) if is_wide else (0.1, 20)), size), factor * scale[..., None]

    def params(excess: Any, factor: Any) -> Arrays:
        return {"df": DIM - 1 + excess, "scale_tril": factor}

    q = one()
    return params(*q), params(*(near(value, rng) for value in q)) if regime == "near" else params(*one())


def build_wishart(df: Tensor, scale_tril: Tensor) -> Wishart:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Low df values", category=UserWarning)  # nothing is drawn from it
        return Wishart(df, scale_tril=scale_tril)


def lgamma_divergence(a: Any, b: Any) -> Any:
    """Return lgamma(a) - lgamma(b) - ψ(b) (a - b)."""
    return mpmath.loggamma(a) - mpmath.loggamma(b) - mpmath.psi(0, b) * (a - b)


def gamma(q: Exact, p: Exact) -> Any:
    a, b, c, d = q["concentration"], q["rate"], p["concentration"], p["rate"]
    return lgamma_divergence(c, a) + c * mpmath.log(b / d) + a * (d / b - 1)


def gamma_gradient(q: Exact, p: Exact) -> tuple[Arrays, Arrays]:
    a, b, c, d = q["concentration"], q["rate"], p["concentration"], p["rate"]
    by_q = {"concentration": mpmath.psi(1, a) * (a - c) + d / b - 1, "rate": c / b - a * d / b**2}
    by_p = {"concentration": mpmath.psi(0, c) - mpmath.psi(0, a) + mpmath.log(b / d), "rate": a / b - c / d}
    return by_q, by_p


def dirichlet(q: Exact, p: Exact) -> Any:
    a, b = q["concentration"], p["concentration"]
    parts = mpmath.fsum(lgamma_divergence(y, x) for x, y in zip(a, b, strict=True))
    return parts - lgamma_divergence(mpmath.fsum(b), mpmath.fsum(a))


def dirichlet_gradient(q: Exact, p: Exact) -> tuple[Arrays, Arrays]:
    a, b = q["concentration"], p["concentration"]
    x, y = mpmath.fsum(a), mpmath.fsum(b)
    rest_q = mpmath.psi(1, x) * (x - y)
    rest_p = mpmath.psi(0, y) - mpmath.psi(0, x)
    by_q = [mpmath.psi(1, s) * (s - t) - rest_q for s, t in zip(a, b, strict=True)]
    by_p = [mpmath.psi(0, t) - mpmath.psi(0, s) - rest_p for s, t in zip(a, b, strict=True)]
    return {"concentration": np.array(by_q, dtype=object)}, {"concentration": np.array(by_p, dtype=object)}


def as_dirichlet(d: Exact) -> Exact:
    return {"concentration": np.array([d["concentration1"], d["concentration0"]], dtype=object)}


def beta(q: Exact, p: Exact) -> Any:
    return dirichlet(as_dirichlet(q), as_dirichlet(p))


def beta_gradient(q: Exact, p: Exact) -> tuple[Arrays, Arrays]:
    by_q, by_p = (g["concentration"] for g in dirichlet_gradient(as_dirichlet(q), as_dirichlet(p)))
    return dict(zip(("concentration1", "concentration0"), by_q, strict=True)), dict(
        zip(("concentration1", "concentration0"), by_p, strict=True)
    )


def half_log_odds(d: Exact) -> Any:
    return d["logits"] / 2 if "logits" in d else mpmath.log(d["probs"] / (1 - d["probs"])) / 2


def mean_excess(t: Any) -> Any:
    """Return coth(t) - 1/t, which is twice the mean less 1."""
    return mpmath.coth(t) - 1 / t if t else mpmath.mpf(0)


def continuous_bernoulli(q: Exact, p: Exact) -> Any:
    def log_norm(t: Any) -> Any:
        return mpmath.log(mpmath.sinh(t) / t) if t else mpmath.mpf(0)

    s, t = half_log_odds(q), half_log_odds(p)
    return log_norm(t) - log_norm(s) - mean_excess(s) * (t - s)


def continuous_bernoulli_gradient(q: Exact, p: Exact) -> tuple[Arrays, Arrays]:
    def chain(d: Exact, by_logit: Any) -> Arrays:
        return {"logits": by_logit} if "logits" in d else {"probs": by_logit / (d["probs"] * (1 - d["probs"]))}

    s, t = half_log_odds(q), half_log_odds(p)
    variance = 1 / s**2 - 1 / mpmath.sinh(s) ** 2 if s else mpmath.mpf(1) / 3
    return chain(q, variance * (s - t) / 2), chain(p, (mean_excess(t) - mean_excess(s)) / 2)


def resultant(kappa: Any) -> Any:
    return mpmath.besseli(1, kappa) / mpmath.besseli(0, kappa)


def von_mises(q: Exact, p: Exact) -> Any:
    a, b = q["concentration"], p["concentration"]
    log_norms = mpmath.log(mpmath.besseli(0, b)) - mpmath.log(mpmath.besseli(0, a))
    return log_norms + resultant(a) * (a - b * mpmath.cos(q["loc"] - p["loc"]))


def von_mises_gradient(q: Exact, p: Exact) -> tuple[Arrays, Arrays]:
    a, b, turn = q["concentration"], p["concentration"], q["loc"] - p["loc"]
    mean = resultant(a)
    by_loc = b * mean * mpmath.sin(turn)
    variance = 1 - mean**2 - mean / a
    by_q = {"loc": by_loc, "concentration": variance * (a - b * mpmath.cos(turn))}
    return by_q, {"loc": -by_loc, "concentration": resultant(b) - mean * mpmath.cos(turn)}


def digammas(half_df: Any, order: int = 0) -> Any:
    return mpmath.fsum(mpmath.psi(order, half_df - mpmath.mpf(j) / 2) for j in range(DIM))


def seen_from(q: Exact, p: Exact) -> tuple[Any, Any, Any]:
    """Return Lp⁻¹, Lp⁻¹ Lq and q's factor, as matrices."""
    factor, inverse = mpmath.matrix(q["scale_tril"].tolist()), mpmath.inverse(mpmath.matrix(p["scale_tril"].tolist()))
    return inverse, inverse * factor, factor


def wishart(q: Exact, p: Exact) -> Any:
    a, b = q["df"], p["df"]
    _, g, _ = seen_from(q, p)
    trace = mpmath.fsum(g[i, j] ** 2 for i in range(DIM) for j in range(DIM))
    log_det = 2 * mpmath.fsum(mpmath.log(g[i, i]) for i in range(DIM))
    halves = [mpmath.mpf(j) / 2 for j in range(DIM)]
    lgammas = mpmath.fsum(mpmath.loggamma(b / 2 - h) - mpmath.loggamma(a / 2 - h) for h in halves)
    return (a * (trace - DIM) - b * log_det + (a - b) * digammas(a / 2)) / 2 + lgammas


def wishart_gradient(q: Exact, p: Exact) -> tuple[Arrays, Arrays]:
    a, b = q["df"], p["df"]
    inverse, g, factor = seen_from(q, p)
    trace = mpmath.fsum(g[i, j] ** 2 for i in range(DIM) for j in range(DIM))
    log_det = 2 * mpmath.fsum(mpmath.log(g[i, i]) for i in range(DIM))

    def lower(by_trace: Any, diagonal: list[Any]) -> Any:
        entries = np.full((DIM, DIM), mpmath.mpf(0), dtype=object)
        for i, j in zip(*np.tril_indices(DIM), strict=True):
            entries[i, j] = by_trace[i, j] + (diagonal[i] if i == j else 0)
        return entries

    by_q_factor = lower(a * inverse.T * g, [-b / factor[i, i] for i in range(DIM)])
    by_p_factor = lower(-a * inverse.T * g * g.T, [b * inverse[i, i] for i in range(DIM)])
    by_q = {"df": (trace - DIM) / 2 + (a - b) / 4 * digammas(a / 2, 1), "scale_tril": by_q_factor}
    by_p = {"df": (digammas(b / 2) - digammas(a / 2) - log_det) / 2, "scale_tril": by_p_factor}
    return by_q, by_p


def _continuous_bernoulli(name: str, draw: Callable[..., tuple[Arrays, Arrays]], **kwargs: Any) -> Reference:
    types = ContinuousBernoulli, ContinuousBernoulli
    return Reference(name, *types, draw, continuous_bernoulli, gradient=continuous_bernoulli_gradient, **kwargs)


REFERENCES = [
    Reference("Gamma", Gamma, Gamma, drawn(concentration=concentration, rate=rate), gamma, gradient=gamma_gradient),
    Reference(
        "Beta",
        Beta,
        Beta,
        drawn(concentration1=concentration, concentration0=concentration),
        beta,
        gradient=beta_gradient,
        recorded=True,
    ),
    Reference(
        "Dirichlet",
        Dirichlet,
        Dirichlet,
        drawn(concentration=concentrations),
        dirichlet,
        gradient=dirichlet_gradient,
        recorded=True,
    ),
    _continuous_bernoulli("ContinuousBernoulli logits", drawn(logits=logit)),
    _continuous_bernoulli("ContinuousBernoulli probs", draw_probabilities, held=frozenset({"probs"})),
    Reference(
        "VonMises",
        VonMises,
        VonMises,
        drawn(loc=angle, concentration=rate),
        von_mises,
        gradient=von_mises_gradient,
    ),
    Reference("Wishart", Wishart, Wishart, draw_wisharts, wishart, build_q=build_wishart, gradient=wishart_gradient),
]
