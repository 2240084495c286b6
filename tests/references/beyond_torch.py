"""Families whose closed forms torch lacks, by the textbook, in mpmath: the KL of two members, and the moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import torch
from torch import Tensor
from torch.distributions import (
    InverseGamma,
    Kumaraswamy,
    LKJCholesky,
    Multinomial,
    NegativeBinomial,
    Weibull,
)
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli

from tests.references.elementary import bernoulli, categories, categories_gradient, logit, positive, probability, real
from tests.references.gamma_family import concentration, drawn, gamma, gamma_gradient, rate
from tests.references.moments import Family, Moments, gamma_ratio, half_line, spread, unit
from tests.references.moments import drawn as one_side
from tests.references.reference import Exact, Reference, log_uniform
from torch_klloss.distributions.logistic import Logistic

Arrays = dict[str, Any]
Rng = np.random.Generator
Spread = Callable[[str, int, Rng], Any]

DIM = 5
TRIALS = 12


def shape(regime: str, size: int, rng: Rng) -> Any:
    return log_uniform(rng, 1e-2, 1e2, size) if regime == "wide" else rng.uniform(0.3, 5, size)


def count(regime: str, size: int, rng: Rng) -> Any:
    return log_uniform(rng, 1e-3, 1e4, size) if regime == "wide" else rng.integers(1, 50, size).astype(float)


def kept_probability(regime: str, size: int, rng: Rng) -> Any:
    """Return probabilities as far from 0 and 1 as torch keeps them in float32."""
    return np.clip(probability(regime, size, rng), 2e-7, 1 - 2e-7)


def alike(key: str, common: Spread, **spreads: Spread) -> Callable[..., tuple[Arrays, Arrays]]:
    """Draw both sides with one parameter in common."""

    def draw(regime: str, size: int, rng: Rng, dtype: torch.dtype) -> tuple[Arrays, Arrays]:
        q, p = drawn(**spreads)(regime, size, rng, dtype)
        for side in (q, p):
            if "probs" in side:
                side["probs"] = np.minimum(side["probs"], 1 - 2e-7)
        shared = {key: common(regime, size, rng)}
        return {**shared, **q}, {**shared, **p}

    return draw


def weibull(q: Exact, p: Exact) -> Any:
    a, k, b, l = q["scale"], q["concentration"], p["scale"], p["concentration"]  # noqa: E741
    logs = mpmath.log(k) - k * mpmath.log(a) - mpmath.log(l) + l * mpmath.log(b)
    moment = mpmath.exp(l * mpmath.log(a / b) + mpmath.loggamma(l / k + 1))
    return logs + (k - l) * (mpmath.log(a) - mpmath.euler / k) + moment - 1


def weibull_gradient(q: Exact, p: Exact) -> tuple[Exact, Exact]:
    a, k, b, l = q["scale"], q["concentration"], p["scale"], p["concentration"]  # noqa: E741
    moment = mpmath.exp(l * mpmath.log(a / b) + mpmath.loggamma(l / k + 1))
    digamma = mpmath.digamma(l / k + 1)
    by_k = 1 / k - mpmath.euler * l / k**2 - moment * digamma * l / k**2
    by_l = -1 / l + mpmath.log(b / a) + mpmath.euler / k + moment * (mpmath.log(a / b) + digamma / k)
    by_a = (moment - 1) * l / a
    return {"scale": by_a, "concentration": by_k}, {"scale": -by_a * a / b, "concentration": by_l}


def weibull_cross_entropy(p: Exact, q: Any) -> Any:
    k, scale = p["concentration"], p["scale"]
    return k * mpmath.log(scale) - mpmath.log(k) - (k - 1) * q.log() + q.power(k) / scale**k


def kumaraswamy(q: Exact, p: Exact) -> Any:
    ratio = p["concentration0"] / q["concentration0"]
    return ratio - 1 - mpmath.log(ratio)


def kumaraswamy_moments(p: Exact) -> Moments:
    a, b = p["concentration1"], p["concentration0"]

    def log1m() -> Any:
        def at(t: Any) -> Any:
            return mpmath.exp(-t) * mpmath.log(-mpmath.expm1(mpmath.log1p(-mpmath.exp(-t / b)) / a))

        return mpmath.quad(
            at,
            sorted({mpmath.mpf(0), b / 10, b, 10 * b, mpmath.mpf(1), mpmath.mpf(10), mpmath.mpf(40), mpmath.mpf(150)}),
        )

    return Moments(lambda k: b * mpmath.beta(1 + k / a, b), -a, log1m=log1m)


def negative_binomial(q: Exact, p: Exact) -> Any:
    failure = 1 - q["probs"] if "probs" in q else 1 / (1 + mpmath.exp(q["logits"]))
    return q["total_count"] * bernoulli(q, p) / failure


def multinomial(q: Exact, p: Exact) -> Any:
    return TRIALS * categories(q, p)


def multinomial_gradient(q: Exact, p: Exact) -> tuple[Exact, Exact]:
    by_q, by_p = categories_gradient(q, p)
    return tuple({key: [TRIALS * x for x in xs] for key, xs in by.items()} for by in (by_q, by_p))  # type: ignore


def build_multinomial(**params: Tensor) -> Multinomial:
    return Multinomial(TRIALS, **params)


def lkj_log_normaliser(eta: Any, order: int = 0) -> Any:
    """Return the logarithm of the integral of Π L_ii^(dim - i + 2η - 2) but for a constant, or a derivative of it."""

    def lgamma(x: Any) -> Any:
        return mpmath.loggamma(x) if order == 0 else mpmath.psi(order - 1, x)

    top = eta + mpmath.mpf(DIM - 1) / 2
    return mpmath.fsum(lgamma(top - mpmath.mpf(k) / 2) for k in range(1, DIM)) - (DIM - 1) * lgamma(top)


def lkj(q: Exact, p: Exact) -> Any:
    a, b = q["concentration"], p["concentration"]
    return lkj_log_normaliser(b) - lkj_log_normaliser(a) - lkj_log_normaliser(a, 1) * (b - a)


def lkj_gradient(q: Exact, p: Exact) -> tuple[Exact, Exact]:
    a, b = q["concentration"], p["concentration"]
    by_p = lkj_log_normaliser(b, 1) - lkj_log_normaliser(a, 1)
    return {"concentration": lkj_log_normaliser(a, 2) * (a - b)}, {"concentration": by_p}


def build_lkj(concentration: Tensor) -> LKJCholesky:
    return LKJCholesky(DIM, concentration)


def shifted(d: Any) -> Any:
    return d * mpmath.coth(d / 2) - 2 if d else mpmath.mpf(0)


def logistic(q: Exact, p: Exact) -> Any:
    return shifted((q["loc"] - p["loc"]) / q["scale"])


def relaxed(q: Exact, p: Exact) -> Any:
    return shifted(_log_odds(q) - _log_odds(p))


def _log_odds(d: Exact) -> Any:
    return d["logits"] if "logits" in d else mpmath.log(d["probs"] / (1 - d["probs"]))


def _same(name: str, family: Any, *args: Any, **options: Any) -> Reference:
    return Reference(name, family, family, *args, **options)


_COUNTED = {"constants": frozenset({"total_count"}), "digits": 120}
_RELAXED = {"constants": frozenset({"temperature"}), "digits": 120}

REFERENCES = [
    _same("Weibull", Weibull, drawn(scale=positive, concentration=shape), weibull, gradient=weibull_gradient),
    _same(
        "InverseGamma",
        InverseGamma,
        drawn(concentration=concentration, rate=rate),
        gamma,
        gradient=gamma_gradient,
    ),
    _same(
        "Kumaraswamy",
        Kumaraswamy,
        alike("concentration1", shape, concentration0=positive),
        kumaraswamy,
        constants=frozenset({"concentration1"}),
    ),
    _same(
        "NegativeBinomial probs",
        NegativeBinomial,
        alike("total_count", count, probs=probability),
        negative_binomial,
        **_COUNTED,
    ),
    _same(
        "NegativeBinomial logits",
        NegativeBinomial,
        alike("total_count", count, logits=logit),
        negative_binomial,
        recorded=True,
        **_COUNTED,
    ),
    _same(
        "Multinomial raw",
        Multinomial,
        drawn(logits=lambda regime, size, rng: logit(regime, (size, 4), rng)),
        multinomial,
        build_q=build_multinomial,
        gradient=multinomial_gradient,
        held=frozenset({"logits"}),
        digits=240,
    ),
    _same(
        "LKJCholesky",
        LKJCholesky,
        drawn(concentration=concentration),
        lkj,
        build_q=build_lkj,
        gradient=lkj_gradient,
        recorded=True,
    ),
    _same(
        "Logistic",
        Logistic,
        alike("scale", positive, loc=real),
        logistic,
        constants=frozenset({"scale"}),
    ),
    _same(
        "LogitRelaxedBernoulli logits",
        LogitRelaxedBernoulli,
        alike("temperature", positive, logits=logit),
        relaxed,
        **_RELAXED,
    ),
    _same(
        "LogitRelaxedBernoulli probs",
        LogitRelaxedBernoulli,
        alike("temperature", positive, probs=kept_probability),
        relaxed,
        **_RELAXED,
    ),
]

MOMENTS = {
    InverseGamma: Family(
        one_side(concentration=spread(0.3, 20, 1e-2, 1e3), rate=spread(0.2, 5, 1e-3, 1e3)),
        half_line,
        lambda p: (
            p["concentration"]
            + mpmath.log(p["rate"])
            + mpmath.loggamma(p["concentration"])
            - (1 + p["concentration"]) * mpmath.psi(0, p["concentration"])
        ),
        lambda p: Moments(
            lambda k: gamma_ratio(p["concentration"], -k) * p["rate"] ** k, -mpmath.inf, p["concentration"]
        ),
        lambda p, q: (
            mpmath.loggamma(p["concentration"])
            - p["concentration"] * mpmath.log(p["rate"])
            + (p["concentration"] + 1) * q.log()
            + p["rate"] * q.power(-1)
        ),
    ),
    Kumaraswamy: Family(
        one_side(concentration1=spread(0.3, 10, 0.05, 50), concentration0=spread(0.3, 10, 0.05, 50)),
        unit,
        lambda p: (
            (1 - 1 / p["concentration0"])
            + (1 - 1 / p["concentration1"]) * (mpmath.psi(0, p["concentration0"] + 1) + mpmath.euler)
            - mpmath.log(p["concentration1"] * p["concentration0"])
        ),
        kumaraswamy_moments,
    ),
    Weibull: Family(
        one_side(scale=spread(0.2, 5, 1e-3, 1e3), concentration=spread(0.4, 5, 0.1, 30)),
        half_line,
        lambda p: mpmath.euler * (1 - 1 / p["concentration"]) + mpmath.log(p["scale"] / p["concentration"]) + 1,
        lambda p: Moments(lambda k: p["scale"] ** k * mpmath.gamma(1 + k / p["concentration"]), -p["concentration"]),
        weibull_cross_entropy,
    ),
}
