"""Two rules that say how well they resolve what they integrate: one trapezoid, and Gauss-Legendre panels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from torch_klloss.methods.quadrature.coordinates import Coordinate
from torch_klloss.methods.quadrature.integrand import Integrand
from torch_klloss.numerics.elementary import e2
from torch_klloss.numerics.special import gauss_legendre

ORDER = 16
STRAIGHT = 2.0**17  # a bend that cannot be told from none: the sinh of t below 1e-4
_NEAR = 0.01  # a KL that the plain form, which is a sum to 1 less 1, leaves at least 13 digits of
_SAFETY = 10.0


@dataclass(frozen=True)
class Sums:
    """Hold what panels `[panels, *lanes]` add up to.

    Attributes:
        plain: of m (log q - log p - 1), with m the lane's mass: the KL is 1 more than their sum.
        plain_error: its error.
        near: of m e2(log p - log q) ≥ 0, whose sum is the KL wherever the nodes cover p's mass too.
        near_error: its error.
        mass: of m.
        gap: of p's mass over the nodes less m.
        farthest: the largest |log q - log p| at a node that has mass.
        size: of the absolute values of what `plain` adds up.
        is_holed: whether there is a node without mass.

    The three that belong to the form for q near p are NaN where it is not worth its cost.
    """

    plain: Tensor
    plain_error: Tensor
    near: Tensor
    near_error: Tensor
    mass: Tensor
    gap: Tensor
    farthest: Tensor
    size: Tensor
    is_holed: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        """Return the sums, in the order above."""
        return iter(vars(self).values())


@dataclass(frozen=True)
class Panels:
    """Gauss-Legendre rules on panels between `edges` `[2, panels, *lanes]`.

    The coefficients of the integrand in Legendre polynomials fall off geometrically where it is smooth. A rule of n
    nodes integrates the first 2n exactly; the last ones of the first n, which are far above its error there, and about
    as large as it beside a kink or something narrow, are taken for it.

    References:
        *Approximation theory and approximation practice* (Trefethen, 2013).
    """

    edges: Tensor

    @property
    def count(self) -> int:
        """The number of nodes."""
        return ORDER * self.edges.shape[1]

    def nodes(self) -> tuple[Tensor, Tensor]:
        """Return v and the weights, `[panels * ORDER, *lanes]`."""
        low, high = self.edges
        nodes, weights = (t.to(low.device).reshape(1, -1, *(1,) * (low.dim() - 1)) for t in gauss_legendre(ORDER))
        half = (high - low).unsqueeze(1) / 2
        return ((high + low).unsqueeze(1) / 2 + half * nodes).flatten(0, 1), (half * weights).flatten(0, 1)

    def split(self, t: Tensor) -> Tensor:
        """Return values at the nodes as `[panels, nodes, *lanes]`."""
        return t.unflatten(0, (-1, ORDER))

    def error(self, terms: Tensor, size: Tensor) -> Tensor:
        """Return the error of the sums of `[panels, nodes, *lanes]`, given those of their absolute values."""
        tail = torch.tensordot(_coefficient_matrix().to(terms.device), terms, dims=([1], [1])).abs().amax(0)
        return torch.minimum(_SAFETY * tail, size)

    def select(self, index: Tensor) -> Panels:
        """Return the panels of some elements of a flat batch."""
        return Panels(self.edges[:, :, index])


@dataclass(frozen=True)
class Trapezoid:
    """The trapezoidal rule in t, with v = bend sinh t, between `ends` `[2, *lanes]` where the integrand is nothing.

    Its error falls geometrically with the number of nodes for a smooth integrand, as its Fourier coefficients do. Those
    of the highest frequencies that the nodes can tell are the errors of rules with half as many of them, and taken
    for its own: several, since one may vanish by chance.

    References:
        *The exponentially convergent trapezoidal rule* (Trefethen and Weideman, 2014).
    """

    ends: Tensor
    bend: Tensor
    num_nodes: int

    @property
    def count(self) -> int:
        """The number of nodes."""
        return self.num_nodes

    def nodes(self) -> tuple[Tensor, Tensor]:
        """Return v and the weights, `[num_nodes, *lanes]`."""
        low, high = self.ends
        step = (high - low) / (self.num_nodes - 1)
        t = low + step * torch.arange(self.num_nodes, device=low.device).reshape(-1, *(1,) * low.dim())
        if (self.bend == STRAIGHT).all():
            return STRAIGHT * t, (STRAIGHT * step).expand_as(t)
        sinh = t.sinh()
        return self.bend * sinh, self.bend * step * (1 + sinh * sinh).sqrt()

    def split(self, t: Tensor) -> Tensor:
        """Return values at the nodes as `[1, nodes, *lanes]`."""
        return t.unsqueeze(0)

    def error(self, terms: Tensor, size: Tensor) -> Tensor:
        """Return the error of the sums of `[1, nodes, *lanes]`, given those of their absolute values."""
        matrix = _frequency_matrix(self.num_nodes).to(terms.device)
        highest = torch.tensordot(matrix, terms, dims=([1], [1])).abs().amax(0)
        return torch.minimum(_SAFETY * highest, size)

    def select(self, index: Tensor) -> Trapezoid:
        """Return the rule of some elements of a flat batch."""
        return Trapezoid(self.ends[:, index], self.bend[index], self.num_nodes)


Rule = Panels | Trapezoid


@cache
def _coefficient_matrix() -> Tensor:
    """Return the matrix that maps weighted values at the nodes to the three highest Legendre coefficients."""
    nodes, _ = gauss_legendre(ORDER)
    rows = [torch.ones_like(nodes), nodes]
    for k in range(1, ORDER - 1):
        rows.append(((2 * k + 1) * nodes * rows[k] - k * rows[k - 1]) / (k + 1))
    return torch.stack([(2 * k + 1) * rows[k] for k in range(ORDER - 3, ORDER)])


@cache
def _frequency_matrix(num_nodes: int) -> Tensor:
    """Return the matrix that maps values at the nodes to their highest Fourier coefficients, cosines and sines."""
    half = num_nodes // 2
    frequencies = torch.arange(half - num_nodes // 32, half + 1, max(1, num_nodes // 128), dtype=torch.float64)
    phases = 2 * torch.pi / num_nodes * frequencies.unsqueeze(1) * torch.arange(num_nodes)
    return torch.cat([phases.cos(), phases.sin()])


class Values(NamedTuple):
    """Hold what is known at nodes `[nodes, *lanes]`: where they are, their mass, and log q - log p, 0 without mass."""

    x: Tensor
    mass: Tensor
    log_ratio: Tensor


def weigh(f: Integrand, coordinate: Coordinate, v: Tensor, weights: Tensor) -> Values:
    """Return what the nodes v have of the mass, and the logarithm of the ratio there."""
    x, log_slope = coordinate.points(v)
    log_mass, log_ratio = f.densities(x)
    mass = weights * (log_mass + log_slope).exp()
    return Values(x, mass, torch.where(mass == 0, 0.0, log_ratio))


def integrate(f: Integrand, values: Values, rule: Rule, is_near: Tensor | None = None) -> Sums:
    """Return the sums over the panels of a rule.

    Args:
        f: the integrand.
        values: at the nodes of the rule.
        rule: where the nodes are.
        is_near: where the form for q near p is worth its cost, `[*batch]`; by default told by the sums themselves.
    """
    mass, log_ratio = rule.split(values.mass), rule.split(values.log_ratio)
    farthest = log_ratio.abs().amax(1)
    terms = mass * (log_ratio - 1)
    plain, size = terms.sum(1), terms.abs().sum(1)
    if is_near is None:
        is_near = (f.widest(farthest.amax(0)) < 1) & ((1 + f.total(plain.sum(0))).abs() < _NEAR)
    near, near_error, gap = _near_sums(rule, mass, log_ratio, f.per_lane(is_near).expand(f.lanes))
    error, is_holed = rule.error(terms, size), (mass == 0).any(1)
    return Sums(plain, error, near, near_error, mass.sum(1), gap, farthest, size, is_holed)


def _near_sums(rule: Rule, mass: Tensor, log_ratio: Tensor, lanes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums of the form for q near p, their error, and the gap between the masses; NaN in other lanes."""
    near, near_error, gap = (torch.full_like(mass[:, 0], torch.nan) for _ in range(3))
    if lanes.any():
        mass, minus = mass[:, :, lanes], -log_ratio[:, :, lanes]
        terms = mass * e2(minus)
        near[:, lanes] = terms.sum(1)
        near_error[:, lanes] = rule.error(terms, near[:, lanes])
        gap[:, lanes] = (mass * torch.expm1(minus)).sum(1)
    return near, near_error, gap
