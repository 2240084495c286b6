"""Quantiles of families without an inverse cdf, with the gradient of the implicit function.

In a coordinate y in which it has one peak and falls off smoothly, the density is tabulated on panels that end where its
logarithm has dropped by 1, 4, 9, … parts. Within a panel it is the polynomial through its Gauss-Legendre nodes, whose
integral gives the cdf F and, with ∂ log f as a factor, its derivatives by the parameters. Newton's method solves
F(y) = u from the solution for a log-linear density; then dy/dθ = -(∂F/∂θ) / f. All in float64: F(y) is u to 1e-11 or
better. The table is made once for a batch element, whatever the number of points. It is made on the CPU where the
device has no float64.

References:
    *Implicit reparameterization gradients* (Figurnov, Mohamed and Mnih, 2018).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from torch_klloss.numerics.devices import constant_on, has_float64
from torch_klloss.numerics.exponentials import expm1
from torch_klloss.numerics.tracing import is_traced

_SIDE = 16  # panels to either side of the peak
_DEGREE = 10  # nodes of a panel
_DROP = 44.0  # of the log-density: beyond exp(-44) lies less than one of 2^52 cells
_NEWTON = 3  # steps, each of which doubles the digits of a start that has two
_BLOCK = 2**18  # nodes or points that are computed at a time: 2 MiB, few enough for caches, enough for few calls


@dataclass(frozen=True)
class Law:
    """Densities on the line, `[batch]` of them.

    Attributes:
        parameters: the θ, `[batch]` each, of an exponential family.
        scores: y `[batch, …]` -> ∂ log f / ∂θ for every parameter, up to a constant that makes it zero at the peak.
        edges: the ends of the panels, ascending, `[batch, panels + 1]`.
    """

    parameters: Sequence[Tensor]
    scores: Callable[[Tensor], Sequence[Tensor]]
    edges: Tensor

    def log_density(self, scores: Sequence[Tensor]) -> Tensor:
        """Return log f from the scores, zero at the peak."""
        terms = [_like(t, s) * s for t, s in zip(self.parameters, scores, strict=True)]
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def log_gamma_quantile(concentration: Tensor, u: Tensor) -> Tensor:
    """Return log x, float64, with P(X ≤ x) = u for X of Gamma(concentration, 1); u is `[n, *batch]`."""
    given = wide(concentration)
    return _quantile(_gamma_law, [given], u) + given.log()


def _gamma_law(a: Tensor) -> Law:
    def relative(y: Tensor) -> Tensor:  # of y = log(x / a), whose log-density is a times this
        return y - expm1(y)

    levels = _levels(a) / a.unsqueeze(-1)
    near = -2 * levels.sqrt()  # relative(y) ≤ -y²/4 for -3/2 ≤ y ≤ 0
    left = torch.where(near > -1.5, torch.maximum(near, -1 - levels), -1 - levels)
    right = torch.log1p(levels + (2 * levels).sqrt())
    ends = [_solved(lambda y: (relative(y) + levels, -expm1(y)), start, 4) for start in (left, right)]
    return Law([a], lambda y: [relative(y)], _edges(*ends))


def logit_beta_quantile(concentration1: Tensor, concentration0: Tensor, u: Tensor) -> Tensor:
    """Return log(x / (1 - x)), float64, with P(X ≤ x) = u for X of Beta; u is `[n, *batch]`."""
    given = wide(concentration1), wide(concentration0)
    a, b = (t.detach() for t in given)
    return _quantile(_beta_law, given, u) + (a / b).log()


def _beta_law(a: Tensor, b: Tensor) -> Law:
    def log_sigmoids(z: Tensor) -> tuple[Tensor, Tensor]:
        """Return log x and log(1 - x) less their values at the peak, which is z = logit x - log(a / b) away."""
        ahead = _like(torch.where(a > 0, a / (a + b), a), z), _like(b / (a + b), z)
        r, rest = torch.where(z < 0, ahead[0], ahead[1]), torch.where(z < 0, ahead[1], ahead[0])
        far = -z.abs()
        c = torch.where(far > -0.5, torch.log1p(r * expm1(far)), (rest + r * far.exp()).log())
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
    ends = [_solved(lambda z: (log_density(z) + levels, slope(z)), start, 6) for start in starts]
    return Law([a, b], log_sigmoids, _edges(*ends))


def _beta_start(a: Tensor, b: Tensor, levels: Tensor) -> Tensor:
    """Return z < 0 where the log-density has dropped by at least as much as the levels say."""
    a, b = a.unsqueeze(-1), b.unsqueeze(-1)
    asymptote = (-levels + (a + b) * (b / (a + b)).log()) / a
    near = -1.82 * (levels * (a + b) / a / b).sqrt()  # by the curvature, which for z ≥ -½ loses less than √e
    return torch.where(near > -0.5, torch.maximum(near, asymptote), asymptote)


def von_mises_quantile(concentration: Tensor, u: Tensor) -> Tensor:
    """Return x in (-π, π), float64, with P(X ≤ x) = u for X of VonMises(0, concentration); u is `[n, *batch]`."""
    return _quantile(_von_mises_law, [wide(concentration)], u)


def _von_mises_law(k: Tensor) -> Law:
    def relative(y: Tensor) -> Tensor:
        return -2 * (y / 2).sin() ** 2

    reach = 2 * (_DROP / (2 * k)).clamp(max=1).sqrt().asin()
    edges = reach.unsqueeze(-1) * torch.linspace(-1, 1, 2 * _SIDE + 1, dtype=k.dtype, device=k.device)
    return Law([k], lambda y: [relative(y)], edges)


def _levels(like: Tensor) -> Tensor:
    return _DROP * torch.arange(1, _SIDE + 1, dtype=like.dtype, device=like.device).div(_SIDE) ** 2


def _like(parameter: Tensor, y: Tensor) -> Tensor:
    return parameter.reshape(parameter.shape + (1,) * (y.dim() - parameter.dim()))


def _solved(function: Callable[[Tensor], tuple[Tensor, Tensor]], y: Tensor, steps: int) -> Tensor:
    """Return an approximate zero of a concave function, from a side where it is negative: no step goes too far."""
    for _ in range(steps):
        value, slope = function(y)
        y = y - value / slope
    return y


def _edges(left: Tensor, right: Tensor) -> Tensor:
    edges = torch.cat([left.flip(-1), torch.zeros_like(left[..., :1]), right], -1)
    return edges.cummax(-1).values


def wide(t: Tensor) -> Tensor:
    """Return t in float64: on its device, or on the CPU if the device has none."""
    return t.double() if has_float64(t.device) else t.cpu().double()


def _quantile(law_of: Callable[..., Law], parameters: Sequence[Tensor], u: Tensor) -> Tensor:
    """Return y `[n, *batch]` with F(y) = u, for the law that `law_of` makes of parameters `[batch]`."""
    u = u.to(parameters[0].device)
    learned = torch.is_grad_enabled() and (is_traced() or any(t.requires_grad for t in parameters))
    with torch.no_grad():
        batch = u.shape[1:]
        flat = [t.detach().expand(batch).reshape(-1) for t in parameters]
        levels = u.detach().reshape(len(u), -1)
        size = max(1, levels.shape[1] if is_traced() else _BLOCK // max(len(u), 2 * _SIDE * _DEGREE))
        blocks = [
            _solve(law_of(*(t[start : start + size] for t in flat)), levels[:, start : start + size], learned)
            for start in range(0, max(levels.shape[1], 1), size)
        ]
        solution, *derivatives = (torch.cat(parts, 1).reshape(u.shape) for parts in zip(*blocks, strict=True))
    for parameter, derivative in zip(parameters, derivatives, strict=False):
        solution = solution + derivative * (parameter - parameter.detach())
    return solution


def _solve(law: Law, u: Tensor, learned: bool) -> list[Tensor]:
    """Return y `[n, batch]` with F(y) = u, and if `learned` its derivatives by the parameters."""
    half = law.edges.diff(dim=-1) / 2
    nodes = law.edges[..., :-1] + half * (_rule(u.device)[0].reshape(-1, 1, 1) + 1)
    nodes = nodes.movedim(0, -1)
    scores = law.scores(nodes)
    density = law.log_density(scores).exp()
    cdf = _tabulate(density, half)
    target = u.T.double() * cdf.before[:, -1:]
    panel = torch.searchsorted(cdf.before[:, 1:-1].contiguous(), target.contiguous())
    t = _solve_panel(law, cdf, panel, target)
    y = law.edges.gather(-1, panel) + half.gather(-1, panel) * (t + 1)
    if not learned:
        return [y.T]
    at_y = law.log_density(law.scores(y)).exp()
    derivatives = []
    for score in scores:
        weighted = density * score
        mean = _tabulate(weighted, half).before[:, -1] / cdf.before[:, -1]
        table = _tabulate(weighted - density * _like(mean, density), half)
        derivatives.append((-_PanelIntegral.of(table, panel).integral(t) / at_y).T)
    return [y.T, *derivatives]


@dataclass(frozen=True)
class _Table:
    """The integral of a function over panels: up to the start of each, and a polynomial within."""

    before: Tensor  # [batch, panels + 1]
    coefficients: Tensor  # [degree + 1, batch, panels], by powers of t, of the integral over (-1, t)


def _tabulate(values: Tensor, half: Tensor) -> _Table:
    """Return the table of a function known at the nodes, `[batch, panels, degree]`."""
    _, weights, to_powers = _rule(values.device)
    coefficients = (values @ to_powers).movedim(-1, 0) * half
    masses = (values @ weights) * half
    return _Table(torch.nn.functional.pad(masses.cumsum(-1), (1, 0)), coefficients)


def _solve_panel(law: Law, cdf: _Table, panel: Tensor, target: Tensor) -> Tensor:
    """Return the t in (-1, 1) at which the integral, up to the panel and on to t within it, is the target."""
    within = _PanelIntegral.of(cdf, panel)
    mass = cdf.before.diff(dim=-1).gather(-1, panel)
    log_ends = law.log_density(law.scores(law.edges)).diff(dim=-1).gather(-1, panel)
    share = ((target - within.before) / mass).clamp(0, 1)
    rise = torch.where(log_ends.abs() < 1e-8, 1e-8, log_ends)
    t = 2 * torch.log1p(share * expm1(rise)) / rise - 1
    for _ in range(_NEWTON):
        integral, density = within(t)
        t = (t - (integral - target) / density).clamp(-1, 1)
    return t


@dataclass(frozen=True)
class _PanelIntegral:
    """The integral up to a point, in one panel for every draw."""

    before: Tensor
    coefficients: list[Tensor]

    @classmethod
    def of(cls, table: _Table, panel: Tensor) -> _PanelIntegral:
        return cls(table.before.gather(-1, panel), [c.gather(-1, panel) for c in table.coefficients])

    def integral(self, t: Tensor) -> Tensor:
        """Return the integral up to t."""
        total = self.coefficients[-1]
        for c in reversed(self.coefficients[:-1]):
            total = torch.addcmul(c, total, t)
        return self.before + total

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the integral up to t, and its derivative by t."""
        total = derivative = self.coefficients[-1]
        for c in reversed(self.coefficients[1:-1]):
            total = torch.addcmul(c, total, t)
            derivative = torch.addcmul(total, derivative, t)
        return self.before + torch.addcmul(self.coefficients[0], total, t), derivative


def _rule(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    nodes, weights, to_powers = (constant_on(device, t) for t in _gauss_legendre())
    return nodes, weights, to_powers


@lru_cache(maxsize=1)
def _gauss_legendre() -> tuple[Tensor, Tensor, Tensor]:
    """Return nodes and weights on (-1, 1), and the matrix from values at the nodes to coefficients of their integral.

    The integral over (-1, t) of the polynomial through the values is taken as a sum of powers of t.
    """
    k = torch.arange(1, _DEGREE, dtype=torch.float64, device="cpu")
    off = k / (4 * k**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(off.diag(1) + off.diag(-1))  # Golub and Welsch, 1969
    weights = 2 * vectors[0] ** 2
    legendre = torch.eye(2, _DEGREE + 1, dtype=torch.float64, device="cpu")  # of every degree, by powers
    for d in range(1, _DEGREE):
        new = ((2 * d + 1) * legendre[-1].roll(1) - d * legendre[-2]) / (d + 1)
        legendre = torch.cat([legendre, new.unsqueeze(0)])
    powers = nodes.unsqueeze(-1) ** torch.arange(_DEGREE + 1, dtype=torch.float64, device="cpu")
    integrals = torch.cat([legendre[:1] + legendre[1:2], legendre[2:] - legendre[:-2]])  # of P_l, times 2l + 1
    return nodes, weights, weights.unsqueeze(-1) * (powers @ legendre[:_DEGREE].T) @ integrals / 2
