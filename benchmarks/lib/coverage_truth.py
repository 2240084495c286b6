"""The true KL of two laws, by sums and integrals that know no formula of the library under test.

Counts: sums until nothing is left. The line, the plane and the simplex: the double-exponential rule. Gaussian and
Wishart laws: matrix formulas. Products: the sum over the components.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import mpmath as mp
import numpy as np
from mpmath import exp, inf, mpf
from scipy.special import digamma, multigammaln

from lib.coverage_densities import (
    Correlation,
    Counts,
    Gaussian,
    Line,
    Plane,
    Product,
    Simplex,
    Vectors,
    WishartLaw,
    normal,
)
from lib.coverage_line import SINGULAR, SUPPORT, UNDEFINED, ZERO, Truth, expectation, infinite, kl_on_the_line
from lib.coverage_plane import kl_on_the_plane, kl_on_the_simplex


def true_kl(q: Any, p: Any) -> Truth:
    """Return KL(q‖p) in nats.

    Raises:
        ValueError: if it cannot be decided whether an integral diverges.
        TypeError: if there is no way to compute the pair.
    """
    if _is_discrete(q) != _is_discrete(p):
        return UNDEFINED
    if _is_discrete(q):
        return _of_counts(q, p)
    for kind, kl in _SAME_KIND.items():
        if isinstance(q, kind) and isinstance(p, kind):
            return kl(q, p)
    manifolds = (Simplex, WishartLaw, Correlation)
    if isinstance(p, manifolds):
        return infinite(SUPPORT)
    if isinstance(q, manifolds):
        return infinite(SINGULAR)
    if isinstance(p, Plane) or isinstance(q, Plane):
        return kl_on_the_plane(q, p)
    return _with_a_gaussian(q, p)


def _is_discrete(law: Any) -> bool:
    first = law.parts[0] if isinstance(law, Product) else law
    return isinstance(first, (Counts, Vectors))


# --- counts -----------------------------------------------------------------------------------------------------------


def _of_counts(q: Any, p: Any) -> Truth:
    if isinstance(q, Product) and isinstance(p, Product):
        return _of_products(q, p)
    if isinstance(q, Counts):
        return _sum_of_counts(q, p)
    points, masses = _points(q), _points(p)
    if points is None:
        return infinite(SUPPORT)
    total = mpf(0)
    for point, log_q in points.items():
        log_p = _log_mass(p, point) if masses is None else masses.get(point, -inf)
        if log_p == -inf:
            return infinite(SUPPORT)
        total += exp(log_q) * (log_q - log_p)
    return Truth("finite", float(total), 1e-16)


def _sum_of_counts(q: Counts, p: Counts) -> Truth:
    if not p.reaches(q.last):
        return infinite(SUPPORT)
    total, k = mpf(0), 0
    while q.last is None or k <= q.last:
        log_q = q.log_mass(k)
        total += exp(log_q) * (log_q - p.log_mass(k))
        k += 1
        if k > 50 and log_q < -150:  # masses that fall at least geometrically
            break
    return Truth("finite", float(total), 1e-16)


def _points(law: Any) -> dict[tuple[int, ...], Any] | None:
    """Return the log-masses of all vectors; None where there are infinitely many."""
    if isinstance(law, Vectors):
        return law.log_mass
    if any(part.last is None for part in law.parts):
        return None
    return {point: _log_mass(law, point) for point in product(*(range(part.last + 1) for part in law.parts))}


def _log_mass(law: Product, point: tuple[int, ...]) -> Any:
    inside = all(part.reaches(k) for part, k in zip(law.parts, point, strict=True))
    return sum(part.log_mass(k) for part, k in zip(law.parts, point, strict=True)) if inside else -inf


# --- several dimensions -----------------------------------------------------------------------------------------------


def _of_products(q: Product, p: Product) -> Truth:
    return sum((true_kl(a, b) for a, b in zip(q.parts, p.parts, strict=True)), ZERO)


def _of_gaussians(q: Gaussian, p: Gaussian) -> Truth:
    precision, gap = np.linalg.inv(p.cov), p.mean - q.mean
    log_dets = np.linalg.slogdet(p.cov)[1] - np.linalg.slogdet(q.cov)[1]
    value = (np.sum(precision * q.cov) + gap @ precision @ gap - len(gap) + log_dets) / 2
    return Truth("finite", float(value), 1e-14)


def _of_wisharts(q: WishartLaw, p: WishartLaw) -> Truth:
    """Take E[log det X] = ψ_d(ν/2) + d log 2 + log det V, E[X] = ν V, and the normalisers."""
    d = len(q.scale)
    mean_log_det = digamma((q.df - np.arange(d)) / 2).sum() + d * np.log(2) + np.linalg.slogdet(q.scale)[1]
    trace = np.sum(np.linalg.inv(p.scale) * q.scale)

    def log_normaliser(w: WishartLaw) -> float:
        return w.df / 2 * (d * np.log(2) + np.linalg.slogdet(w.scale)[1]) + multigammaln(w.df / 2, d)

    value = (q.df - p.df) / 2 * mean_log_det - q.df / 2 * (d - trace) + log_normaliser(p) - log_normaliser(q)
    return Truth("finite", float(value), 1e-13)


def _with_a_gaussian(q: Gaussian | Product, p: Gaussian | Product) -> Truth:
    """Split off the product of the marginals: of q on the left, or of the Gaussian with q's moments on the right."""
    if isinstance(q, Gaussian):
        marginals = _marginals(q)
        as_gaussian = Gaussian(q.mean, np.diag(np.diag(q.cov)))
        return _of_gaussians(q, as_gaussian) + _of_products(marginals, p)
    marginals = _marginals(p)
    own = _of_products(q, marginals)
    if own.kind != "finite":
        return own
    means = [expectation(part, lambda x, _: x)[0] for part in q.parts]
    squares = [expectation(part, lambda x, _: x * x)[0] for part in q.parts]
    matched = Gaussian(np.array(means), np.diag([s - m * m for s, m in zip(squares, means, strict=True)]))
    between = [normal(mpf(m), mp.sqrt(v)) for m, v in zip(means, np.diag(matched.cov), strict=True)]
    return _of_products(q, Product(tuple(between))) + _of_gaussians(matched, p)


def _marginals(g: Gaussian) -> Product:
    return Product(
        tuple(normal(mpf(m), mp.sqrt(v)) for m, v in zip(g.mean.tolist(), np.diag(g.cov).tolist(), strict=True))
    )


_SAME_KIND: dict[type, Any] = {
    Line: kl_on_the_line,
    Product: _of_products,
    Gaussian: _of_gaussians,
    Simplex: kl_on_the_simplex,
    WishartLaw: _of_wisharts,
    Correlation: lambda q, p: kl_on_the_line(q.share, p.share),
}
