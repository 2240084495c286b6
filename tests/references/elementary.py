"""Pairs of one elementary family: the KL by the textbook, in mpmath, and the draws of the parameters.

The formulas are the plain ones, of logarithms and differences: 60 digits forgive what float64 would not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import torch
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Cauchy,
    Exponential,
    Geometric,
    Gumbel,
    HalfCauchy,
    HalfNormal,
    Laplace,
    LogNormal,
    OneHotCategorical,
    Pareto,
    Poisson,
    Uniform,
)

from tests.references.reference import Exact, Reference, log_uniform, near
from torch_klloss import categorical

Arrays = dict[str, Any]
Rng = np.random.Generator
Spread = Callable[[str, int, Rng], Any]  # (regime, size, rng) -> one parameter


def positive(regime: str, size: Any, rng: Rng) -> Any:
    return log_uniform(rng, 1e-6, 1e6, size) if regime == "wide" else rng.uniform(0.1, 3, size)


def real(regime: str, size: Any, rng: Rng) -> Any:
    return rng.normal(0, 2, size)


def probability(regime: str, size: Any, rng: Rng) -> Any:
    """Return probabilities; in the wide regime down to 1e-7 from 0 and from 1."""
    if regime != "wide":
        return rng.uniform(0.02, 0.98, size)
    tail = log_uniform(rng, 1e-7, 0.5, size)
    return np.where(rng.random(size) < 0.5, tail, 1 - tail)


def logit(regime: str, size: Any, rng: Rng) -> Any:
    return rng.uniform(-100, 100, size) if regime == "wide" else rng.normal(0, 2, size)


def drawn(**spreads: Spread) -> Callable[..., tuple[Arrays, Arrays]]:
    """Draw both sides from the same spreads, or p near q."""

    def draw(regime: str, size: int, rng: Rng, dtype: torch.dtype) -> tuple[Arrays, Arrays]:
        q = {key: spread(regime, size, rng) for key, spread in spreads.items()}
        if regime == "near":
            return q, {key: _inside(key, near(x, rng)) for key, x in q.items()}
        return q, {key: spread(regime, size, rng) for key, spread in spreads.items()}

    return draw


def _inside(key: str, x: Any) -> Any:
    return np.minimum(x, 1 - 1e-7) if key == "probs" else x


def _classes(spread: Spread, count: int) -> Spread:
    return lambda regime, size, rng: spread(regime, (size, count), rng)


def _uniforms(regime: str, size: int, rng: Rng, dtype: torch.dtype) -> tuple[Arrays, Arrays]:
    """Draw an interval for q, and for p one that exceeds it by gaps that are small in the near regime."""
    low, width = rng.normal(0, 2, size), positive(regime, size, rng)
    gaps = {
        "moderate": lambda: rng.uniform(0.1, 2, size),
        "wide": lambda: positive(regime, size, rng),
        "near": lambda: log_uniform(rng, 1e-8, 1e-2, size) * width,
    }[regime]
    # Of float32 intervals the ends may round past one another.
    q = {"low": _rounded(low, dtype), "high": _rounded(low + width, dtype)}
    q["high"] = np.maximum(q["high"], _rounded(q["low"] + 1e-3 * (1 + abs(q["low"])), dtype))
    p = {"low": _rounded(q["low"] - gaps(), dtype), "high": _rounded(q["high"] + gaps(), dtype)}
    return q, {"low": np.minimum(p["low"], q["low"]), "high": np.maximum(p["high"], q["high"])}


def _paretos(regime: str, size: int, rng: Rng, dtype: torch.dtype) -> tuple[Arrays, Arrays]:
    """Draw p's scale below q's, so that the KL is finite."""
    q, p = drawn(scale=positive, alpha=positive)(regime, size, rng, dtype)
    scales = _rounded(q["scale"], dtype), _rounded(p["scale"], dtype)
    return {**q, "scale": np.maximum(*scales)}, {**p, "scale": np.minimum(*scales)}


def _rounded(x: Any, dtype: torch.dtype) -> Any:
    return torch.as_tensor(x, dtype=torch.float64).to(dtype).double().numpy()


def _binomials(parameter: str, spread: Spread) -> Callable[..., tuple[Arrays, Arrays]]:
    def draw(regime: str, size: int, rng: Rng, dtype: torch.dtype) -> tuple[Arrays, Arrays]:
        q, p = drawn(**{parameter: spread})(regime, size, rng, dtype)
        count = rng.integers(1, 1000, size).astype(float)
        return {"total_count": count, **q}, {"total_count": count, **p}

    return draw


def exponential(q: Exact, p: Exact) -> Any:
    return mpmath.log(q["rate"] / p["rate"]) + p["rate"] / q["rate"] - 1


def poisson(q: Exact, p: Exact) -> Any:
    return q["rate"] * mpmath.log(q["rate"] / p["rate"]) - q["rate"] + p["rate"]


def laplace(q: Exact, p: Exact) -> Any:
    distance, ratio = abs(q["loc"] - p["loc"]), q["scale"] / p["scale"]
    return -mpmath.log(ratio) + distance / p["scale"] + ratio * mpmath.exp(-distance / q["scale"]) - 1


def normal(q: Exact, p: Exact) -> Any:
    ratio, distance = q["scale"] / p["scale"], (q["loc"] - p["loc"]) / p["scale"]
    return (ratio**2 + distance**2 - 1) / 2 - mpmath.log(ratio)


def half_normal(q: Exact, p: Exact) -> Any:
    return normal({**q, "loc": 0}, {**p, "loc": 0})


def cauchy(q: Exact, p: Exact) -> Any:
    square = (q["scale"] + p["scale"]) ** 2 + (q["loc"] - p["loc"]) ** 2
    return mpmath.log(square / (4 * q["scale"] * p["scale"]))


def half_cauchy(q: Exact, p: Exact) -> Any:
    return cauchy({**q, "loc": 0}, {**p, "loc": 0})


def pareto(q: Exact, p: Exact) -> Any:
    ratio = p["alpha"] / q["alpha"]
    return p["alpha"] * mpmath.log(q["scale"] / p["scale"]) - mpmath.log(ratio) + ratio - 1


def uniform(q: Exact, p: Exact) -> Any:
    return mpmath.log((p["high"] - p["low"]) / (q["high"] - q["low"]))


def uniform_gradient(q: Exact, p: Exact) -> tuple[Exact, Exact]:
    """The derivatives of the branch that holds inside, from which one does not differ at its edge."""
    by_q, by_p = 1 / (q["high"] - q["low"]), 1 / (p["high"] - p["low"])
    return {"low": by_q, "high": -by_q}, {"low": -by_p, "high": by_p}


def gumbel(q: Exact, p: Exact) -> Any:
    ratio, distance = q["scale"] / p["scale"], (q["loc"] - p["loc"]) / p["scale"]
    excess = mpmath.exp(mpmath.loggamma(1 + ratio) - distance)
    return -mpmath.log(ratio) + mpmath.euler * (ratio - 1) + excess - 1 + distance


def gumbel_gradient(q: Exact, p: Exact) -> tuple[Exact, Exact]:
    ratio, distance = q["scale"] / p["scale"], (q["loc"] - p["loc"]) / p["scale"]
    excess = mpmath.exp(mpmath.loggamma(1 + ratio) - distance)
    by_ratio = -1 / ratio + mpmath.euler + excess * mpmath.digamma(1 + ratio)
    by_distance = 1 - excess
    by_p_scale = -(ratio * by_ratio + distance * by_distance) / p["scale"]
    return (
        {"loc": by_distance / p["scale"], "scale": by_ratio / p["scale"]},
        {"loc": -by_distance / p["scale"], "scale": by_p_scale},
    )


def bernoulli(q: Exact, p: Exact) -> Any:
    """From `probs` or `logits`, whichever each side has."""
    (yes, no), (p_yes, p_no) = _odds(q), _odds(p)
    return yes * mpmath.log(yes / p_yes) + no * mpmath.log(no / p_no)


def _odds(d: Exact) -> tuple[Any, Any]:
    if "probs" in d:
        return d["probs"], 1 - d["probs"]
    return 1 / (1 + mpmath.exp(-d["logits"])), 1 / (1 + mpmath.exp(d["logits"]))


def geometric(q: Exact, p: Exact) -> Any:
    return bernoulli(q, p) / _odds(q)[0]


def binomial(q: Exact, p: Exact) -> Any:
    return q["total_count"] * bernoulli(q, p)


def categories(q: Exact, p: Exact) -> Any:
    """From `probs` or `logits`, neither of which need be normalised."""
    return sum(a * mpmath.log(a / b) for a, b in zip(_shares(q), _shares(p), strict=True))


def categories_gradient(q: Exact, p: Exact) -> tuple[Exact, Exact]:
    a, b = _shares(q), _shares(p)
    logs = [mpmath.log(x / y) for x, y in zip(a, b, strict=True)]
    kl = sum(x * log for x, log in zip(a, logs, strict=True))
    by_log_q = [x * (log - kl) for x, log in zip(a, logs, strict=True)]
    by_log_p = [y - x for x, y in zip(a, b, strict=True)]
    return _by_parameter(q, by_log_q), _by_parameter(p, by_log_p)


def _by_parameter(d: Exact, by_log: list[Any]) -> Exact:
    if "probs" in d:
        return {"probs": [x / w for x, w in zip(by_log, d["probs"], strict=True)]}
    return {next(iter(d)): by_log}


def _shares(d: Exact) -> list[Any]:
    """Return the probabilities of a Categorical, whose one parameter is `probs` or the logits by some name."""
    ((key, values),) = d.items()
    weights = [w if key == "probs" else mpmath.exp(w) for w in values]
    total = sum(weights)
    return [w / total for w in weights]


def _categorical(name: str, spread: Spread, count: int) -> Reference:
    """A Categorical as torch's constructor left it: its rounded normalisation belongs to what was given."""
    key = name.split()[1]
    return Reference(
        f"{name} {count}",
        Categorical,
        Categorical,
        drawn(**{key: _classes(spread, count)}),
        categories,
        gradient=categories_gradient,
        held=frozenset({key}),
        digits=_DIGITS,
    )


def raw_categorical(count: int) -> Reference:
    """Return the Categorical of raw logits of so many classes."""
    return Reference(
        f"Categorical raw logits {count}",
        Categorical,
        Categorical,
        drawn(logits=_classes(logit, count)),
        categories,
        build_q=categorical,
        gradient=categories_gradient,
        digits=_DIGITS,
    )


# Two logits 200 apart make a probability of 1e-87 beside 1; log-odds of 100 make one of 1e-44.
_DIGITS, _ODDS_DIGITS = 240, 120

REFERENCES = [
    Reference("Exponential", Exponential, Exponential, drawn(rate=positive), exponential),
    Reference("Poisson", Poisson, Poisson, drawn(rate=positive), poisson),
    Reference("Laplace", Laplace, Laplace, drawn(loc=real, scale=positive), laplace),
    Reference("LogNormal", LogNormal, LogNormal, drawn(loc=real, scale=positive), normal),
    Reference("HalfNormal", HalfNormal, HalfNormal, drawn(scale=positive), half_normal),
    Reference("Cauchy", Cauchy, Cauchy, drawn(loc=real, scale=positive), cauchy),
    Reference("HalfCauchy", HalfCauchy, HalfCauchy, drawn(scale=positive), half_cauchy),
    Reference("Pareto", Pareto, Pareto, _paretos, pareto),
    Reference("Uniform", Uniform, Uniform, _uniforms, uniform, gradient=uniform_gradient),
    Reference("Gumbel", Gumbel, Gumbel, drawn(loc=real, scale=positive), gumbel, gradient=gumbel_gradient),
    Reference("Bernoulli probs", Bernoulli, Bernoulli, drawn(probs=probability), bernoulli),
    Reference(
        "Bernoulli logits", Bernoulli, Bernoulli, drawn(logits=logit), bernoulli, digits=_ODDS_DIGITS, recorded=True
    ),
    Reference("Geometric probs", Geometric, Geometric, drawn(probs=probability), geometric),
    Reference(
        "Geometric logits", Geometric, Geometric, drawn(logits=logit), geometric, digits=_ODDS_DIGITS, recorded=True
    ),
    Reference(
        "Binomial probs",
        Binomial,
        Binomial,
        _binomials("probs", probability),
        binomial,
        constants=frozenset({"total_count"}),
    ),
    Reference(
        "Binomial logits",
        Binomial,
        Binomial,
        _binomials("logits", logit),
        binomial,
        constants=frozenset({"total_count"}),
        digits=_ODDS_DIGITS,
        recorded=True,
    ),
    _categorical("Categorical probs", probability, 5),
    _categorical("Categorical logits", logit, 5),
    *(raw_categorical(count) for count in (2, 5)),
    Reference(
        "OneHotCategorical raw",
        OneHotCategorical,
        OneHotCategorical,
        drawn(logits=_classes(logit, 4)),
        categories,
        gradient=categories_gradient,
        held=frozenset({"logits"}),
        digits=_DIGITS,
    ),
]
