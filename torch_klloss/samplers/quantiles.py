"""Quantiles of families without an inverse cdf, with the gradient of the implicit function.

In a coordinate y in which it has one peak and falls off smoothly, the density is tabulated on panels that end where its
logarithm has dropped by 1, 4, 9, … parts. Within a panel it is the polynomial through its Gauss-Legendre nodes, whose
integral gives the cdf F and, with ∂ log f as a factor, its derivatives by the parameters. Newton's method solves
F(y) = u from the solution for a log-linear density; then dy/dθ = -(∂F/∂θ) / f. All in float64: F(y) is u to 1e-11 or
better. The table is made once for a batch element, whatever the number of points.

References:
    *Implicit reparameterization gradients* (Figurnov, Mohamed and Mnih, 2018).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from torch_klloss.tracing import is_traced

_SIDE = 16  # panels to either side of the peak
_DEGREE = 10  # nodes of a panel
_DROP = 44.0  # of the log-density: beyond exp(-44) lies less than one of 2^52 cells
_NEWTON = 3  # steps, each of which doubles the digits of a start that has two


@dataclass(frozen=True)
class Law:
    """Hold densities on the line, `[*batch]` of them.

    Attributes:
        log_density: y `[*batch, …]` -> log f, up to a constant that makes it zero at the peak.
        scores: y -> ∂ log f / ∂θ for every parameter, up to what does not depend on y.
        edges: the ends of the panels, ascending, `[*batch, panels + 1]`.
        parameters: the θ that a gradient flows to, of shapes that broadcast to the batch.
    """

    log_density: Callable[[Tensor], Tensor]
    scores: Callable[[Tensor], Sequence[Tensor]]
    edges: Tensor
    parameters: Sequence[Tensor]


def log_gamma_quantile(concentration: Tensor, u: Tensor) -> Tensor:
    """Return log x, float64, with P(X ≤ x) = u for X of Gamma(concentration, 1); u is `[n, *batch]`."""
    given = concentration.double()
    a = given.detach().expand(u.shape[1:])

    def relative(y: Tensor) -> Tensor:  # of y = log(x / a), whose log-density is a times this
        return y - torch.expm1(y)

    levels = _levels(a) / a.unsqueeze(-1)
    near = -2 * levels.sqrt()  # relative(y) ≤ -y²/4 for -3/2 ≤ y ≤ 0
    left = torch.where(near > -1.5, torch.maximum(near, -1 - levels), -1 - levels)
    right = torch.log1p(levels + (2 * levels).sqrt())
    ends = [_solved(lambda y: (relative(y) + levels, -torch.expm1(y)), start) for start in (left, right)]
    law = Law(lambda y: _like(a, y) * relative(y), lambda y: [relative(y)], _edges(*ends), [given])
    return _quantile(law, u) + given.log()


def logit_beta_quantile(concentration1: Tensor, concentration0: Tensor, u: Tensor) -> Tensor:
    """Return log(x / (1 - x)), float64, with P(X ≤ x) = u for X of Beta; u is `[n, *batch]`."""
    given = concentration1.double(), concentration0.double()
    a, b = (t.detach().expand(u.shape[1:]) for t in given)

    def log_sigmoids(z: Tensor) -> tuple[Tensor, Tensor]:
        """Return log x and log(1 - x), less what they are at the peak, z = logit x - log(a / b) away from it."""
        ahead = _like(torch.where(a > 0, a / (a + b), a), z), _like(b / (a + b), z)
        r, rest = torch.where(z < 0, ahead[0], ahead[1]), torch.where(z < 0, ahead[1], ahead[0])
        far = -z.abs()
        c = torch.where(far > -0.5, torch.log1p(r * torch.expm1(far)), (rest + r * far.exp()).log())
        return z.clamp(max=0) - c, -z.clamp(min=0) - c

    def log_density(z: Tensor) -> Tensor:
        log_x, log_rest = log_sigmoids(z)
        return _like(a, z) * log_x + _like(b, z) * log_rest

    peak = (a / b).log()

    def slope(z: Tensor) -> Tensor:
        y = _like(peak, z) + z
        return _like(a, z) * (-y).sigmoid() - _like(b, z) * y.sigmoid()

    levels = _levels(a)
    starts = _beta_start(a, b, levels), -_beta_start(b, a, levels)
    ends = [_solved(lambda z: (log_density(z) + levels, slope(z)), start) for start in starts]
    return _quantile(Law(log_density, log_sigmoids, _edges(*ends), given), u) + peak


def _beta_start(a: Tensor, b: Tensor, levels: Tensor) -> Tensor:
    """Return z < 0 where the log-density has dropped by at least as much as the levels say."""
    a, b = a.unsqueeze(-1), b.unsqueeze(-1)
    asymptote = (-levels + (a + b) * (b / (a + b)).log()) / a
    near = -1.82 * (levels * (a + b) / a / b).sqrt()  # by the curvature, which for z ≥ -½ loses less than √e
    return torch.where(near > -0.5, torch.maximum(near, asymptote), asymptote)


def von_mises_quantile(concentration: Tensor, u: Tensor) -> Tensor:
    """Return x in (-π, π), float64, with P(X ≤ x) = u for X of VonMises(0, concentration); u is `[n, *batch]`."""
    given = concentration.double()
    k = given.detach().expand(u.shape[1:])

    def relative(y: Tensor) -> Tensor:
        return -2 * (y / 2).sin() ** 2

    reach = 2 * (_DROP / (2 * k)).clamp(max=1).sqrt().asin()
    edges = reach.unsqueeze(-1) * torch.linspace(-1, 1, 2 * _SIDE + 1, dtype=k.dtype, device=k.device)
    return _quantile(Law(lambda y: _like(k, y) * relative(y), lambda y: [relative(y)], edges, [given]), u)


def _levels(like: Tensor) -> Tensor:
    return _DROP * torch.arange(1, _SIDE + 1, dtype=like.dtype, device=like.device).div(_SIDE) ** 2


def _like(parameter: Tensor, y: Tensor) -> Tensor:
    return parameter.reshape(parameter.shape + (1,) * (y.dim() - parameter.dim()))


def _solved(function: Callable[[Tensor], tuple[Tensor, Tensor]], y: Tensor) -> Tensor:
    """Return about where a concave function is zero, from a side where it is negative: no step goes too far."""
    for _ in range(6):
        value, slope = function(y)
        y = y - value / slope
    return y


def _edges(left: Tensor, right: Tensor) -> Tensor:
    edges = torch.cat([left.flip(-1), torch.zeros_like(left[..., :1]), right], -1)
    return edges.cummax(-1).values


@dataclass(frozen=True)
class _Table:
    """The integral of a function over panels: up to the start of each, and Legendre coefficients within."""

    before: Tensor  # [*batch, panels + 1]
    coefficients: Tensor  # [degree, *batch, panels], of the integral over t in (-1, t)


def _tabulate(values: Tensor, half: Tensor) -> _Table:
    """Return the table of a function known at the nodes, `[*batch, panels, degree]`."""
    _, _, to_legendre = _rule(values.device)
    coefficients = (values @ to_legendre).movedim(-1, 0) * half
    masses = 2 * coefficients[0]
    return _Table(torch.nn.functional.pad(masses.cumsum(-1), (1, 0)), coefficients)


def _quantile(law: Law, u: Tensor) -> Tensor:
    """Return y `[n, *batch]` with F(y) = u."""
    with torch.no_grad():
        half = law.edges.diff(dim=-1) / 2
        nodes = law.edges[..., :-1, None] + half[..., None] * (_rule(u.device)[0] + 1)
        density = law.log_density(nodes).exp()
        cdf = _tabulate(density, half)
        target = u.double().movedim(0, -1) * cdf.before[..., -1:]
        panel = torch.searchsorted(cdf.before[..., 1:-1].contiguous(), target.contiguous())
        t = _solve_panel(law, cdf, panel, target)
        y = law.edges.gather(-1, panel) + half.gather(-1, panel) * (t + 1)
    learned = torch.is_grad_enabled() and (is_traced() or any(t.requires_grad for t in law.parameters))
    solution = y.movedim(-1, 0)
    if not learned:
        return solution
    with torch.no_grad():
        at_y = law.log_density(y).exp()
        derivatives = []
        for score in law.scores(nodes):
            weighted = density * score
            mean = _tabulate(weighted, half).before[..., -1] / cdf.before[..., -1]
            table = _tabulate(weighted - density * _like(mean, density), half)
            derivatives.append(-_Within.of(table, panel)(t)[0] / at_y)
    for parameter, derivative in zip(law.parameters, derivatives, strict=True):
        solution = solution + derivative.movedim(-1, 0) * (parameter - parameter.detach())
    return solution


def _solve_panel(law: Law, cdf: _Table, panel: Tensor, target: Tensor) -> Tensor:
    """Return the t in (-1, 1) at which the integral, up to the panel and on to t within it, is the target."""
    within = _Within.of(cdf, panel)
    log_ends = law.log_density(law.edges).diff(dim=-1).gather(-1, panel)
    share = ((target - within.before) / (2 * within.coefficients[0])).clamp(0, 1)
    rise = torch.where(log_ends.abs() < 1e-8, 1e-8, log_ends)
    t = 2 * torch.log1p(share * torch.expm1(rise)) / rise - 1
    for _ in range(_NEWTON):
        integral, density = within(t)
        t = (t - (integral - target) / density).clamp(-1, 1)
    return t


@dataclass(frozen=True)
class _Within:
    """The integral up to a point of one panel, of which there is one for every draw."""

    before: Tensor
    coefficients: list[Tensor]

    @classmethod
    def of(cls, table: _Table, panel: Tensor) -> _Within:
        return cls(table.before.gather(-1, panel), [c.gather(-1, panel) for c in table.coefficients])

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the integral up to t, and its derivative by t."""
        c = self.coefficients
        total, derivative = torch.addcmul(self.before, c[0], t + 1), c[0]
        older, old = torch.ones_like(t), t  # Legendre polynomials P_{l-1} and P_l; ∫P_l = (P_{l+1} - P_{l-1}) / (2l+1)
        for degree in range(1, _DEGREE):
            new = torch.addcmul(older * (-degree / (degree + 1)), t, old, value=(2 * degree + 1) / (degree + 1))
            derivative = torch.addcmul(derivative, c[degree], old)
            total = torch.addcmul(total, c[degree], new - older, value=1 / (2 * degree + 1))
            older, old = old, new
        return total, derivative


def _rule(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    nodes, weights, to_legendre = (t.to(device) for t in _gauss_legendre())
    return nodes, weights, to_legendre


@lru_cache(maxsize=1)
def _gauss_legendre() -> tuple[Tensor, Tensor, Tensor]:
    """Return nodes and weights on (-1, 1), and the matrix from values at the nodes to Legendre coefficients."""
    k = torch.arange(1, _DEGREE, dtype=torch.float64, device="cpu")
    off = k / (4 * k**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(off.diag(1) + off.diag(-1))  # Golub and Welsch, 1969
    weights = 2 * vectors[0] ** 2
    polynomials = [torch.ones_like(nodes), nodes]
    for d in range(1, _DEGREE - 1):
        polynomials.append(((2 * d + 1) * nodes * polynomials[-1] - d * polynomials[-2]) / (d + 1))
    norms = (2 * torch.arange(_DEGREE, dtype=torch.float64, device="cpu") + 1) / 2
    return nodes, weights, weights.unsqueeze(-1) * torch.stack(polynomials, -1) * norms
