"""The Normal, the VAE's own pair, and a MultivariateNormal that is given by its covariance, by the textbook."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import torch
from torch.distributions import MultivariateNormal, Normal

from tests.references.elementary import drawn, normal, positive, real
from tests.references.reference import Exact, Reference, log_uniform, near
from torch_klloss.distributions.families import LogVarNormal, StandardNormal

Arrays = dict[str, Any]
Rng = np.random.Generator

DIM = 3


def draw_posteriors(regime: str, size: int, rng: Rng, dtype: torch.dtype) -> tuple[Arrays, Arrays]:
    """Draw what an encoder gives; near, it has collapsed to the prior."""
    loc, logvar = rng.standard_normal((2, size))
    if regime == "wide":
        loc, logvar = loc * log_uniform(rng, 1e-6, 1e6, size), rng.uniform(-25, 25, size)
    if regime == "near":
        loc, logvar = loc * log_uniform(rng, 1e-8, 1e-2, size), logvar * log_uniform(rng, 1e-8, 1e-2, size)
    return {"loc": loc, "logvar": logvar}, {}


def posterior(q: Exact, p: Exact) -> Any:
    return (q["loc"] ** 2 + mpmath.exp(q["logvar"]) - 1 - q["logvar"]) / 2


def draw_priors(regime: str, size: int, rng: Rng, dtype: torch.dtype) -> tuple[Arrays, Arrays]:
    """Draw a posterior and a learned prior, which may be near it."""
    q, _ = draw_posteriors("wide" if regime == "wide" else "moderate", size, rng, dtype)
    if regime == "near":
        return q, {key: near(x, rng) for key, x in q.items()}
    return q, draw_posteriors(regime, size, rng, dtype)[0]


def log_variances(q: Exact, p: Exact) -> Any:
    ratio = mpmath.exp(q["logvar"] - p["logvar"])
    distance = (q["loc"] - p["loc"]) ** 2 / mpmath.exp(p["logvar"])
    return (distance + ratio - 1 - mpmath.log(ratio)) / 2


def draw_covariances(regime: str, size: int, rng: Rng, dtype: torch.dtype) -> tuple[Arrays, Arrays]:
    """Draw factors whose rows have their own scales, and their products; near, the factors are near."""

    def draw_one() -> tuple[Any, Any]:
        scale = log_uniform(rng, *((1e-3, 1e3) if regime == "wide" else (0.3, 3)), (size, DIM, 1))
        below = np.tril(rng.standard_normal((size, DIM, DIM)) / 2, -1)
        return 2 * rng.standard_normal((size, DIM)), scale * (np.eye(DIM) + below)

    def given(loc: Any, factor: Any) -> Arrays:
        # Rounded before it is mirrored, so that it is symmetric in the dtype.
        lower = torch.as_tensor(factor @ factor.swapaxes(-1, -2)).to(dtype).double().tril()
        return {"loc": loc, "covariance_matrix": (lower + lower.tril(-1).mT).numpy()}

    q = draw_one()
    p = tuple(near(x, rng) for x in q) if regime == "near" else draw_one()
    return given(*q), given(*p)


def multivariate_normal(q: Exact, p: Exact) -> Any:
    """By the Cholesky factors of the covariances."""
    factor, inverse = _factor(q), mpmath.inverse(_factor(p))
    g, distance = inverse * factor, inverse * mpmath.matrix((q["loc"] - p["loc"]).tolist())
    squares = mpmath.fsum(g[i, j] ** 2 for i in range(DIM) for j in range(DIM)) + mpmath.fsum(x**2 for x in distance)
    return (squares - DIM) / 2 - mpmath.fsum(mpmath.log(g[i, i]) for i in range(DIM))


def _factor(d: Exact) -> Any:
    return mpmath.cholesky(mpmath.matrix(d["covariance_matrix"].tolist()))


REFERENCES = [
    Reference("Normal", Normal, Normal, drawn(loc=real, scale=positive), normal),
    Reference(
        "diagonal_normal",
        LogVarNormal,
        StandardNormal,
        draw_posteriors,
        posterior,
        build_p=lambda: StandardNormal(()),
    ),
    Reference("diagonal_normal, learned prior", LogVarNormal, LogVarNormal, draw_priors, log_variances),
    Reference(
        "MultivariateNormal, covariance",
        MultivariateNormal,
        MultivariateNormal,
        draw_covariances,
        multivariate_normal,
        constants=frozenset({"covariance_matrix"}),  # the Cholesky factor that torch takes of it has rounded
    ),
]
