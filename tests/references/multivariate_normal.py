"""MultivariateNormal and LowRankMultivariateNormal, by their covariances in 60 digits; gradients by the chain rule."""

from dataclasses import replace
from functools import partial
from typing import Any

import mpmath as mp
import numpy as np
import torch
import torch.distributions as dist

from tests.references.reference import Exact, Reference, log_uniform
from tests.references.reference import near as nearby

SIZE = 3


def scales(regime: str, n: int, rng: np.random.Generator) -> Any:
    """Draw how large each component is, `[n, SIZE]`; wide, over twelve orders of magnitude."""
    return log_uniform(rng, *((1e-6, 1e6) if regime == "wide" else (0.3, 3)), (n, SIZE))


def triangular(regime: str, n: int, rng: np.random.Generator) -> dict[str, Any]:
    scale = scales(regime, n, rng)
    factor = np.tril(rng.standard_normal((n, SIZE, SIZE)), -1) + np.eye(SIZE) * rng.uniform(0.5, 2, (n, 1, SIZE))
    return {"loc": scale * rng.standard_normal((n, SIZE)), "scale_tril": scale[..., None] * factor}


def low_rank(regime: str, n: int, rng: np.random.Generator, rank: int) -> dict[str, Any]:
    scale = scales(regime, n, rng)
    size = log_uniform(rng, *((1e-3, 1e3) if regime == "wide" else (0.3, 3)), (n, 1, 1))
    return {
        "loc": scale * rng.standard_normal((n, SIZE)),
        "cov_factor": scale[..., None] * size * rng.standard_normal((n, SIZE, rank)),
        "cov_diag": scale**2 * rng.uniform(0.5, 2, (n, SIZE)),
    }


def perturbed(params: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {key: nearby(x, rng) for key, x in params.items()}


def matrix(x: Any) -> mp.matrix:
    return mp.matrix(np.asarray(x).tolist())


def covariance(p: Exact) -> mp.matrix:
    if "scale_tril" in p:
        factor = matrix(np.tril(p["scale_tril"]))
        return factor * factor.T
    factor = matrix(p["cov_factor"])
    return factor * factor.T + mp.diag(list(p["cov_diag"]))


def kl(q: Exact, p: Exact) -> Any:
    ratio = mp.inverse(covariance(p)) * covariance(q)
    gap = matrix(q["loc"]) - matrix(p["loc"])
    trace = mp.fsum(ratio[i, i] for i in range(SIZE))
    square = (gap.T * mp.inverse(covariance(p)) * gap)[0]
    return (trace - SIZE - mp.log(mp.det(ratio)) + square) / 2


def chain(params: Exact, by_loc: mp.matrix, by_covariance: mp.matrix) -> dict[str, Any]:
    """Return the gradient by the parameters, of which a triangular factor has zeros above its diagonal."""
    gradient = {"loc": np.array(list(by_loc), dtype=object)}
    for key in ("scale_tril", "cov_factor"):
        if key in params:
            factor = np.tril(params[key]) if key == "scale_tril" else params[key]
            by_factor = np.array((2 * by_covariance * matrix(factor)).tolist(), dtype=object)
            gradient[key] = np.tril(by_factor) if key == "scale_tril" else by_factor
    if "cov_diag" in params:
        gradient["cov_diag"] = np.array([by_covariance[i, i] for i in range(SIZE)], dtype=object)
    return gradient


def gradient(q: Exact, p: Exact) -> tuple[Exact, Exact]:
    inverse_q, inverse_p = mp.inverse(covariance(q)), mp.inverse(covariance(p))
    gap = matrix(q["loc"]) - matrix(p["loc"])
    pull = inverse_p * gap
    by_covariance_p = (inverse_p - inverse_p * covariance(q) * inverse_p - pull * pull.T) / 2
    return chain(q, pull, (inverse_p - inverse_q) / 2), chain(p, -pull, by_covariance_p)


def pair(type_q: type[dist.Distribution], type_p: type[dist.Distribution], rank: int) -> Reference:
    """Return the reference of a pair; only equal types, whose parameters can be near, have the near regime."""
    draws = {dist.MultivariateNormal: triangular, dist.LowRankMultivariateNormal: partial(low_rank, rank=rank)}

    def draw(regime: str, n: int, rng: np.random.Generator, dtype: torch.dtype) -> tuple[Any, Any]:
        p = draws[type_p](regime, n, rng)
        if regime == "near":
            return perturbed(p, rng), p
        q = draws[type_q]("moderate", n, rng)
        size = np.abs(p["loc"]) if regime == "wide" else np.ones((n, SIZE))
        powers = {"loc": size, "scale_tril": size[..., None], "cov_factor": size[..., None], "cov_diag": size**2}
        return {key: x * powers[key] for key, x in q.items()}, p

    name = f"{type_q.__name__}‖{type_p.__name__}" if type_q is not type_p else type_q.__name__
    regimes = ("moderate", "wide", "near") if type_q is type_p else ("moderate", "wide")
    return Reference(name, type_q, type_p, draw, kl, gradient=gradient, regimes=regimes)


FULL, LOW = dist.MultivariateNormal, dist.LowRankMultivariateNormal
REFERENCES = [pair(FULL, FULL, rank=1), pair(FULL, LOW, rank=1), pair(LOW, FULL, rank=1), pair(LOW, LOW, rank=1)]
# From half the size on, a rank has another formula.
HALF_RANK = replace(pair(LOW, LOW, rank=2), name="LowRankMultivariateNormal of half rank")
