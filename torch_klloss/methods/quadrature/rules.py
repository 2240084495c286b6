"""Quadrature rules that estimate their own error: Gauss-Legendre panels and the trapezoidal rule."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from torch_klloss.methods.quadrature.coordinates import Coordinate
from torch_klloss.methods.quadrature.integrand import Integrand
from torch_klloss.numerics.devices import constant_on
from torch_klloss.numerics.exponentials import e2, expm1
from torch_klloss.numerics.special import gauss_legendre

ORDER = 16
STRAIGHT = 2.0**40  # a bend so large that v is proportional to t, to the last digit
_NEAR = 0.01  # for a KL above this, the plain form, a sum near 1 less 1, keeps at least 13 digits
_SAFETY = 10.0
_INWARD = 1e-9  # of a panel's width


class Values(NamedTuple):
    """Points x at nodes `[nodes, *integrals]`, their mass, and log q - log p there (0 at points without mass)."""

    x: Tensor
    mass: Tensor
    log_ratio: Tensor


class Sums(NamedTuple):
    """Sums over the nodes of every panel, `[panels, *integrals]`, with m the mass at a node.

    The three that belong to the form for q near p are NaN where that form is not worth its cost.

    Attributes:
        plain: Σ m (log q - log p - 1); the KL is 1 more than the sum over the panels.
        plain_error: the error of `plain`.
        near: Σ m e2(log p - log q) ≥ 0; its sum is the KL where the nodes cover the mass of p too.
        near_error: the error of `near`.
        mass: Σ m.
        mass_gap: p's mass at the nodes less Σ m.
        largest_log_ratio: the largest |log q - log p| at a node with mass.
        size: Σ |m (log q - log p - 1)|.
        has_empty_node: whether a node has no mass.
    """

    plain: Tensor
    plain_error: Tensor
    near: Tensor
    near_error: Tensor
    mass: Tensor
    mass_gap: Tensor
    largest_log_ratio: Tensor
    size: Tensor
    has_empty_node: Tensor


@dataclass(frozen=True)
class Panels:
    """Gauss-Legendre rules on panels between `edges` `[2, panels, *integrals]`.

    Where the integrand is smooth, its Legendre coefficients fall off geometrically. A rule of n nodes integrates the
    first 2n exactly. The last of the first n coefficients serve as its error: they are far larger than the error where
    the integrand is smooth, and about as large near a kink or a narrow peak. What lies between an edge and the node
    next to it shows in none of them: the integrand is evaluated at the edges too, and compared with the polynomial.

    References:
        *Approximation theory and approximation practice* (Trefethen, 2013).
    """

    edges: Tensor

    @property
    def num_nodes(self) -> int:
        """The number of nodes."""
        return ORDER * self.edges.shape[1]

    def nodes(self) -> tuple[Tensor, Tensor]:
        """Return v and the weights, `[panels * ORDER, *integrals]`."""
        low, high = self.edges
        nodes, weights = (
            constant_on(low.device, t).reshape(1, -1, *(1,) * (low.dim() - 1)) for t in gauss_legendre(ORDER)
        )
        half = (high - low).unsqueeze(1) / 2
        return ((high + low).unsqueeze(1) / 2 + half * nodes).flatten(0, 1), (half * weights).flatten(0, 1)

    def checked_nodes(self) -> tuple[Tensor, Tensor]:
        """Return v and the weights with both edges of every panel, `[panels * (ORDER + 2), *integrals]`.

        The weight of an edge, which is no node, is the distance to the nearest node.
        """
        low, high = self.edges
        v, weights = (self.split(t) for t in self.nodes())
        # A jump may lie at the edge itself.
        width = high - low
        ends = torch.stack([low + _INWARD * width, high - _INWARD * width], 1)
        gaps = (_edge_gap() / 2 * width).unsqueeze(1)
        v = torch.cat([ends[:, :1], v, ends[:, 1:]], 1)
        return v.flatten(0, 1), torch.cat([gaps, weights, gaps], 1).flatten(0, 1)

    def split(self, t: Tensor) -> Tensor:
        """Return values at the nodes as `[panels, nodes, *integrals]`."""
        return t.unflatten(0, (len(self.edges[0]), -1))

    def inner(self, t: Tensor) -> Tensor:
        """Return the values at the nodes out of those at the checked nodes, `[panels, nodes, *integrals]`."""
        return t[:, 1:-1]

    def error(self, terms: Tensor, size: Tensor) -> Tensor:
        """Return the error of the sums of `[panels, nodes, *integrals]`, given the sums of their absolute values."""
        return _error(_coefficient_matrix(), terms, size)

    def edge_error(self, terms: Tensor) -> Tensor:
        """Return what the terms at the checked nodes show at the edges: the integrand less the polynomial."""
        return torch.tensordot(constant_on(terms.device, _edge_matrix()), terms, dims=([1], [1])).abs().amax(0)

    def select(self, index: Tensor) -> Panels:
        """Return the panels of some elements of a flat batch."""
        return Panels(self.edges[:, :, index])


@dataclass(frozen=True)
class Trapezoid:
    """The trapezoidal rule in t, with v = bend sinh t, between `ends` `[2, *integrals]` where the integrand vanishes.

    For a smooth integrand its error falls geometrically with the number of nodes, as the Fourier coefficients do. The
    coefficients of the highest frequencies that the nodes resolve are the errors of rules with half as many nodes, and
    serve as its error: several of them, since one may vanish by chance.

    References:
        *The exponentially convergent trapezoidal rule* (Trefethen and Weideman, 2014).
    """

    ends: Tensor
    bend: Tensor
    num_nodes: int

    def nodes(self) -> tuple[Tensor, Tensor]:
        """Return v and the weights, `[num_nodes, *integrals]`."""
        low, high = self.ends
        step = (high - low) / (self.num_nodes - 1)
        t = low + step * torch.arange(self.num_nodes, device=low.device).reshape(-1, *(1,) * low.dim())
        if (self.bend == STRAIGHT).all():
            return STRAIGHT * t, (STRAIGHT * step).expand_as(t)
        sinh = t.sinh()
        return self.bend * sinh, self.bend * step * (1 + sinh * sinh).sqrt()

    def checked_nodes(self) -> tuple[Tensor, Tensor]:
        """Return the nodes: nothing lies outside of them."""
        return self.nodes()

    def split(self, t: Tensor) -> Tensor:
        """Return values at the nodes as `[1, nodes, *integrals]`."""
        return t.unsqueeze(0)

    def inner(self, t: Tensor) -> Tensor:
        """Return all values."""
        return t

    def edge_error(self, terms: Tensor) -> Tensor:
        """Return 0: nothing lies outside of the nodes."""
        return torch.zeros_like(terms[:, 0])

    def error(self, terms: Tensor, size: Tensor) -> Tensor:
        """Return the error of the sums of `[1, nodes, *integrals]`, given the sums of their absolute values."""
        return _error(_frequency_matrix(self.num_nodes), terms, size)

    def select(self, index: Tensor) -> Trapezoid:
        """Return the rule of some elements of a flat batch."""
        return Trapezoid(self.ends[:, index], self.bend[index], self.num_nodes)


Rule = Panels | Trapezoid


def _error(matrix: Tensor, terms: Tensor, size: Tensor) -> Tensor:
    """Return the largest coefficient of the terms, times a safety factor, but no more than the size."""
    coefficients = torch.tensordot(constant_on(terms.device, matrix), terms, dims=([1], [1]))
    return torch.minimum(_SAFETY * coefficients.abs().amax(0), size)


@cache
def _coefficient_matrix() -> Tensor:
    """Return the matrix that maps weighted values at the nodes to the three highest Legendre coefficients."""
    return _coefficients()[-3:]


@cache
def _edge_matrix() -> Tensor:
    """Return the matrix that maps weighted values at the checked nodes to the differences at the edges.

    The values at the edges come with the distance to the nearest node as their weight.
    """
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(ORDER // 2)  # the polynomials at -1
    one = torch.ones(1, dtype=torch.float64)
    low = torch.cat([one, -_edge_gap() / 2 * signs @ _coefficients(), 0 * one])
    return torch.stack([low, low.flip(0)])


def _coefficients() -> Tensor:
    """Return the matrix that maps weighted values at the nodes to all Legendre coefficients."""
    return (2 * torch.arange(ORDER, dtype=torch.float64) + 1).unsqueeze(-1) * _legendre(gauss_legendre(ORDER)[0])


def _legendre(nodes: Tensor) -> Tensor:
    """Return the Legendre polynomials below ORDER at points, `[ORDER, points]`."""
    rows = [torch.ones_like(nodes), nodes]
    for k in range(1, ORDER - 1):
        rows.append(((2 * k + 1) * nodes * rows[k] - k * rows[k - 1]) / (k + 1))
    return torch.stack(rows)


@cache
def _edge_gap() -> float:
    """Return the distance from an edge of [-1, 1] to the nearest node."""
    return 1 - gauss_legendre(ORDER)[0].max().item()


@cache
def _frequency_matrix(num_nodes: int) -> Tensor:
    """Return the matrix that maps values at the nodes to their highest Fourier coefficients, cosines and sines."""
    half = num_nodes // 2
    frequencies = torch.arange(half - num_nodes // 32, half + 1, max(1, num_nodes // 128), dtype=torch.float64)
    phases = 2 * torch.pi / num_nodes * frequencies.unsqueeze(1) * torch.arange(num_nodes)
    return torch.cat([phases.cos(), phases.sin()])


def weigh(f: Integrand, coordinate: Coordinate, v: Tensor, weights: Tensor) -> Values:
    """Return the points at nodes v, their mass, and the log-ratio there."""
    x, log_slope = coordinate.points(v)
    log_mass, log_ratio = f.densities(x)
    mass = weights * (log_mass + log_slope).exp()
    return Values(x, mass, torch.where(mass == 0, 0.0, log_ratio))


def integrate(f: Integrand, coordinate: Coordinate, rule: Rule, is_near: Tensor | None = None) -> tuple[Values, Sums]:
    """Return the values at the nodes of a rule, and the sums over its panels.

    The form for q near p is summed at `is_near`, `[*batch]`; by default where the sums show that it is worth its cost.
    """
    checked = weigh(f, coordinate, *rule.checked_nodes())
    x, mass, log_ratio = (rule.split(t) for t in checked)
    values = Values(*(rule.inner(t).flatten(0, 1) for t in (x, mass, log_ratio)))
    largest_log_ratio = rule.inner(log_ratio).abs().amax(1)
    terms = mass * (log_ratio - 1)
    plain, size = rule.inner(terms).sum(1), terms.abs().sum(1)
    if is_near is None:
        is_near = (f.largest(largest_log_ratio.amax(0)) < 1) & ((1 + f.total(plain.sum(0))).abs() < _NEAR)
    near, near_error, mass_gap = _near_sums(rule, mass, log_ratio, f.per_integral(is_near).expand(f.shape))
    mass = rule.inner(mass)
    error, has_empty_node = _sum_error(rule, terms, size), (mass == 0).any(1)
    sums = Sums(plain, error, near, near_error, mass.sum(1), mass_gap, largest_log_ratio, size, has_empty_node)
    return values, sums


def _sum_error(rule: Rule, terms: Tensor, size: Tensor) -> Tensor:
    """Return the error of the sums, given the terms at the checked nodes and the sums of the absolute values."""
    return torch.maximum(rule.error(rule.inner(terms), size), rule.edge_error(terms))


def _near_sums(rule: Rule, mass: Tensor, log_ratio: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums of the form for q near p, their error, and the mass gap; NaN for integrals outside the mask."""
    near, near_error, mass_gap = (torch.full_like(mass[:, 0], torch.nan) for _ in range(3))
    if mask.any():
        mass, minus = mass[:, :, mask], -log_ratio[:, :, mask]
        terms = mass * e2(minus)
        near[:, mask] = rule.inner(terms).sum(1)
        near_error[:, mask] = _sum_error(rule, terms, near[:, mask])
        mass_gap[:, mask] = rule.inner(mass * expm1(minus)).sum(1)
    return near, near_error, mass_gap
