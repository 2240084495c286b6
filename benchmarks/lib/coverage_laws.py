"""Laws of distributions that are made of others or have several dimensions; nothing comes from the library."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import mpmath as mp
import numpy as np
import torch
import torch.distributions as dist
from mpmath import exp, log, log1p, loggamma, mpf

from lib.coverage_densities import (
    LAWS,
    Correlation,
    Counts,
    Gaussian,
    Line,
    Plane,
    Product,
    Simplex,
    Vectors,
    WishartLaw,
    beta,
    exponential_of,
)


def law_of(d: Any) -> Any:
    """Return the law of a distribution that has no batch.

    Raises:
        TypeError: if no law is written for its class.
    """
    if type(d) not in LAWS:
        raise TypeError(
            f"no law is written for {type(d).__name__}: add one to benchmarks/lib/coverage_densities.py or, of several "
            "dimensions, to benchmarks/lib/coverage_laws.py."
        )
    return LAWS[type(d)](d)


def _categorical(d: dist.Categorical) -> Counts:
    masses = [mpf(each) for each in d.probs.tolist()]
    total = sum(masses)
    return Counts(lambda k: log(masses[k] / total), len(masses) - 1)


# --- made of others ---------------------------------------------------------------------------------------------------


def _elements(d: Any) -> list[Any]:
    """Return the law of every batch element of d."""
    names = [key for key in d.arg_constraints if key != "logits"]
    if isinstance(d, dist.MultivariateNormal):
        names = ["loc", "scale_tril"]
    columns = []
    for key in names:
        value, event_dims = getattr(d, key), d.arg_constraints[key].event_dim
        event = value.shape[value.dim() - event_dims :]
        columns.append(value.expand(d.batch_shape + event).reshape(-1, *event))
    return [law_of(type(d)(**dict(zip(names, each, strict=True)))) for each in zip(*columns, strict=True)]


def _independent(d: Any) -> Any:
    while isinstance(d, dist.Independent):
        d = d.base_dist
    return _joined(_elements(d))


def _joined(parts: list[Any]) -> Any:
    """Return the law of independent parts: of one Gaussian, or a product that has no products inside."""
    if all(isinstance(part, Gaussian) for part in parts):
        size = sum(len(part.mean) for part in parts)
        cov = np.zeros((size, size))
        at = 0
        for part in parts:
            end = at + len(part.mean)
            cov[at:end, at:end] = part.cov
            at = end
        return Gaussian(np.concatenate([part.mean for part in parts]), cov)
    flat = [inner for part in parts for inner in (part.parts if isinstance(part, Product) else (part,))]
    return Product(tuple(flat))


def _mixture(d: dist.MixtureSameFamily) -> Any:
    if d.event_shape:
        return Plane(_by_torch(d))
    parts = _elements(d.component_distribution)
    weights = [mpf(each) for each in d.mixture_distribution.probs.tolist()]

    def log_sum(log_densities: list[Any]) -> Any:
        top = max(log_densities)
        return top + log(sum(w * exp(each - top) for w, each in zip(weights, log_densities, strict=True)))

    if isinstance(parts[0], Counts):
        return Counts(lambda k: log_sum([part.log_mass(k) for part in parts]), parts[0].last)
    return Line(lambda x: log_sum([part.log_density(x) for part in parts]), parts[0].lower, parts[0].upper)


def _by_torch(d: Any) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    def log_density(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return d.log_prob(torch.from_numpy(np.stack((x, y), -1))).numpy()

    return log_density


def _transformed(d: dist.TransformedDistribution) -> Any:
    law = law_of(d.base_dist)
    for transform in d.transforms:
        law = _pushed(law, transform)
    return law


def _pushed(law: Any, t: Any) -> Any:
    """Return the law of t(x) for x of the law."""
    if isinstance(law, Product):
        scales = [(mpf(m), mpf(s)) for m, s in zip(t.loc.tolist(), t.scale.tolist(), strict=True)]
        return Product(tuple(_affine(part, *each) for part, each in zip(law.parts, scales, strict=True)))
    if isinstance(t, dist.AffineTransform):
        return _affine(law, mpf(float(t.loc)), mpf(float(t.scale)))
    if isinstance(t, dist.ExpTransform):
        return exponential_of(law)
    if isinstance(t, type(dist.SigmoidTransform().inv)) and isinstance(t.inv, dist.SigmoidTransform):
        # The density of a logit: σ(y) (1 - σ(y)) times the density of σ(y), by terms that do not round to 0.
        return Line(lambda y: law.log_density(1 / (1 + exp(-y))) - abs(y) - 2 * log1p(exp(-abs(y))))
    raise TypeError(f"no law is written for the transform {t}.")


def _affine(law: Line, m: Any, s: Any) -> Line:
    ends = sorted(m + s * end for end in (law.lower, law.upper))
    moved = None if law.normal is None else (float(m + s * law.normal[0]), float(abs(s) * law.normal[1]))
    kinks = tuple(m + s * kink for kink in law.kinks)
    return Line(lambda y: law.log_density((y - m) / s) - log(abs(s)), *ends, kinks, moved)


# --- several dimensions -----------------------------------------------------------------------------------------------


def _gaussian(d: Any) -> Gaussian:
    return Gaussian(d.loc.numpy(), d.covariance_matrix.numpy())


def _dirichlet(d: dist.Dirichlet) -> Simplex:
    a = d.concentration.numpy()
    norm = float(loggamma(mpf(float(a.sum()))) - sum(loggamma(mpf(each)) for each in a.tolist()))
    return Simplex(lambda logs: norm + np.tensordot(logs, a - 1, 1))


def _logistic_normal(d: dist.LogisticNormal) -> Simplex:
    """Return the law of the stick-breaking of Normals, whose k-th logit torch moves by log(number of pieces left)."""
    base = d.base_dist.base_dist
    loc, scale = base.loc.numpy(), base.scale.numpy()

    def log_density(logs: np.ndarray) -> np.ndarray:
        rest = np.logaddexp(logs[..., 1], logs[..., 2])  # log of what the first piece leaves
        logits = np.stack((logs[..., 0] - rest + log2, logs[..., 1] - logs[..., 2]), -1)
        z = (logits - loc) / scale
        normals = (-z * z / 2 - np.log(scale) - np.log(2 * np.pi) / 2).sum(-1)
        return normals - logs.sum(-1)  # the logits by the first two components: a determinant of 1/(x₁ x₂ x₃)

    log2 = np.log(2.0)
    return Simplex(log_density)


def _relaxed_one_hot(d: dist.RelaxedOneHotCategorical) -> Simplex:
    """Return the Concrete law (Maddison et al., 2017)."""
    t, a = float(d.temperature), d.probs.numpy()

    def log_density(logs: np.ndarray) -> np.ndarray:
        powers = np.log(a) - t * logs
        mass = np.logaddexp.reduce(powers, -1)
        return np.log(2.0) + 2 * np.log(t) + (powers - logs).sum(-1) - 3 * mass

    return Simplex(log_density)


def _one_hot(d: dist.OneHotCategorical) -> Vectors:
    masses = _categorical(d._categorical)
    return Vectors({tuple(int(i == k) for i in range(3)): masses.log_mass(k) for k in range(3)})


def _multinomial(d: dist.Multinomial) -> Vectors:
    n, share = d.total_count, _categorical(d._categorical)
    found = {}
    for counts in product(range(n + 1), repeat=3):
        if sum(counts) == n:
            ways = mp.factorial(n) / mp.fprod(mp.factorial(k) for k in counts)
            found[counts] = log(ways) + sum(k * share.log_mass(i) for i, k in enumerate(counts))
    return Vectors(found)


def _correlation(d: dist.LKJCholesky) -> Correlation:
    """Take the law of the one correlation: (1 + r)/2 ~ Beta(η, η) (Lewandowski, Kurowicka and Joe, 2009)."""
    b = mpf(float(d.concentration))
    return Correlation(beta(b, b))


LAWS |= {
    dist.Categorical: _categorical,
    dist.TransformedDistribution: _transformed,
    dist.MixtureSameFamily: _mixture,
    dist.Independent: _independent,
    dist.MultivariateNormal: _gaussian,
    dist.LowRankMultivariateNormal: _gaussian,
    dist.Dirichlet: _dirichlet,
    dist.LogisticNormal: _logistic_normal,
    dist.RelaxedOneHotCategorical: _relaxed_one_hot,
    dist.OneHotCategorical: _one_hot,
    dist.OneHotCategoricalStraightThrough: _one_hot,
    dist.Multinomial: _multinomial,
    dist.Wishart: lambda d: WishartLaw(float(d.df), d.covariance_matrix.numpy()),
    dist.LKJCholesky: _correlation,
}
