"""The true KL in two dimensions: the double-exponential rule in both coordinates, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from mpmath import inf, mpf

from lib.coverage_densities import Line, Plane, Product, Simplex, normal
from lib.coverage_line import MOMENT, SUPPORT, Truth, diverges, infinite, nodes_between


def kl_on_the_plane(q: Any, p: Any) -> Truth:
    """Integrate over both coordinates, where one of the two is a mixture of Gaussians."""
    parts = [law.parts for law in (q, p) if isinstance(law, Product)]
    if any(part.lower != -inf for part in getattr(p, "parts", ())):
        return infinite(SUPPORT)
    for part in getattr(q, "parts", ()):
        if any(diverges(part, normal(mpf(0), mpf(1)), end) for end in (part.lower, part.upper)):
            return infinite(MOMENT)
    axes = [_axis([each[i] for each in parts]) for i in range(2)]
    return _two_dimensional(axes, [_log_density(law, axes) for law in (q, p)])


def kl_on_the_simplex(q: Simplex, p: Simplex) -> Truth:
    """Integrate over the logits of the first component, and of the second among the rest."""
    axes = [_axis([])] * 2
    u, v = np.meshgrid(axes[0].x, axes[1].x, indexing="ij")
    rest = -np.logaddexp(0, u)
    logs = np.stack((-np.logaddexp(0, -u), rest - np.logaddexp(0, -v), rest - np.logaddexp(0, v)), -1)
    jacobian = logs.sum(-1)  # of the components by the logits
    return _two_dimensional(axes, [law.log_density(logs) for law in (q, p)], jacobian)


@dataclass(frozen=True)
class Axis:
    """The nodes of one coordinate, their weights, and whether the coarse rule has them."""

    x: np.ndarray
    dx: np.ndarray
    is_coarse: np.ndarray


def _axis(parts: Sequence[Line]) -> Axis:
    """Return the rule that respects the kinks and ends of the given laws of one coordinate."""
    lower = max((part.lower for part in parts), default=-inf)
    inner = sorted({kink for part in parts for kink in part.kinks if kink > lower})
    if lower == -inf and not inner:
        inner = [mpf(0)]
    nodes = [node for a, b in pairwise((lower, *inner, inf)) for node in nodes_between(a, b)]
    is_coarse, x, dx = zip(*nodes, strict=True)
    return Axis(np.array(x, dtype=float), np.array(dx, dtype=float), np.array(is_coarse))


def _log_density(law: Any, axes: Sequence[Axis]) -> np.ndarray:
    """Return the log-density on the grid of both coordinates."""
    if isinstance(law, Product):
        logs = [
            np.array([part.log_density(mpf(x)) for x in axis.x], dtype=float)
            for part, axis in zip(law.parts, axes, strict=True)
        ]
        return logs[0][:, None] + logs[1]
    x, y = np.meshgrid(axes[0].x, axes[1].x, indexing="ij")
    if isinstance(law, Plane):
        return law.log_density(x, y)
    gap = np.stack((x, y), -1) - law.mean
    distance = ((gap @ np.linalg.inv(law.cov)) * gap).sum(-1)
    return -distance / 2 - np.log(2 * np.pi) - np.linalg.slogdet(law.cov)[1] / 2


def _two_dimensional(axes: Sequence[Axis], logs: Sequence[np.ndarray], jacobian: Any = 0.0) -> Truth:
    """Return the sum over the grid, with its difference from that over every second line of nodes as the error."""
    mass = np.exp(logs[0] + jacobian) * np.outer(axes[0].dx, axes[1].dx)
    terms = np.where(mass > 0, mass * (logs[0] - np.where(mass > 0, logs[1], 0.0)), 0.0)
    fine, coarse = terms.sum(), 4 * terms[np.ix_(axes[0].is_coarse, axes[1].is_coarse)].sum()
    return Truth("finite", float(fine), float(abs(fine - coarse)) + 1e-13)
