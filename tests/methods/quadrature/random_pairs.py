"""Random pairs of one-dimensional families with an independent reference: whether the KL is infinite, and its value.

Every density is written here once more, at points that know the logarithms of their distances to 0 and to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributions as dist
from numpy.polynomial.legendre import leggauss
from torch import Tensor
from torch.distributions import Distribution, TransformedDistribution, constraints
from torch.distributions import transforms as maps
from torch.nn.functional import logsigmoid, softplus

from torch_klloss.distributions.logistic import Logistic

INF, LINE, HALF, UNIT = math.inf, "line", "half line", "unit interval"
LOG_TWO_PI = math.log(2 * math.pi)


class Point(NamedTuple):
    """Points with log x, of positive ones, and log(1 - x), of those in the unit interval."""

    x: Tensor
    log: Tensor | None = None
    log_rest: Tensor | None = None

    def log_x(self) -> Tensor:
        return self.x.clamp_min(0).log() if self.log is None else self.log

    def log_1m_x(self) -> Tensor:
        return torch.log1p(-self.x.clamp_max(1)) if self.log_rest is None else self.log_rest


class Tail(NamedTuple):
    """E[yᵏ] < ∞ for k < order, E[exp(t y)] < ∞ for t < rate; -log density ~ y^growth, or exp(speed y) at growth ∞."""

    order: Tensor | float = INF
    rate: Tensor | float = 0.0
    growth: Tensor | float = 0.0
    speed: Tensor | float = INF


@dataclass(frozen=True)
class Family:
    """A family: its support, parameters `[n]` from uniform numbers, torch's object, log-density, and both tails."""

    support: str
    parameters: Callable[[Callable[[], Tensor]], tuple[Tensor, ...]]
    build: Callable[..., Distribution]
    log_density: Callable[..., Tensor]
    tails: Callable[..., tuple[Tail, Tail]]


class Hidden(Distribution):
    """A member of a family without its class: its density and its support are all that is known."""

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, family: Family, parameters: tuple[Tensor, ...]):
        self.family = family
        for i, each in enumerate(parameters):
            setattr(self, f"parameter{i}", each)
        super().__init__(parameters[0].shape, validate_args=False)

    @property
    def support(self):
        known = {LINE: constraints.real, HALF: constraints.positive, UNIT: constraints.unit_interval}
        return known[self.family.support]

    def log_prob(self, x):
        values = vars(self)
        parameters = [values[name] for name in sorted(values) if name.startswith("parameter")]
        return self.family.log_density(Point(x), *parameters)


def _location(u):
    return 4 * u() - 2, 10 ** (2 * u() - 1)


def _shape(u):
    raw = u()
    return torch.where(u() < 0.2, 1.0, 10 ** (1.6 * raw - 0.7))


def _power(order):
    return Tail(order=order)


def _exponential(rate):
    return Tail(rate=rate, growth=1.0)


_GAUSSIAN, _LOG_NORMAL, _FLAT = Tail(rate=INF, growth=2.0), Tail(), Tail(order=1.0)


def _logistic(t, m, s):
    z = (t.x - m) / s
    return logsigmoid(z) + logsigmoid(-z) - s.log()


def _gumbel(t, m, s):
    z = (t.x - m) / s
    return -z - torch.exp(-z) - s.log()


def _student(t, df, m, s):
    norm = torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2) - (df * math.pi).log() / 2 - s.log()
    z = (t.x - m).abs() / s / df.sqrt()
    return norm - (df + 1) * torch.hypot(torch.ones_like(z), z).log()


def _weibull(t, s, k):
    z = t.log_x() - s.log()
    return k.log() - s.log() + (k - 1) * z - torch.exp(k * z)


def _weibull_tails(s, k):
    return _power(k), Tail(rate=torch.where(k > 1, INF, torch.where(k < 1, 0.0, 1 / s)), growth=k)


def _relaxed(t, temperature, logits):
    z = logits - temperature * (t.log_x() - t.log_1m_x())
    return temperature.log() + logsigmoid(z) + logsigmoid(-z) - t.log_x() - t.log_1m_x()


def _kumaraswamy(t, a, b):
    near_one = t.log_1m_x() < -36
    log_power = a * torch.where(t.log_1m_x() < -1, torch.log1p(-t.log_1m_x().exp()), t.log_x())
    safe = torch.where(near_one, -1.0, log_power)
    rest = torch.where(near_one, a.log() + t.log_1m_x(), torch.log(-torch.expm1(safe)))
    return a.log() + b.log() + (a - 1) * t.log_x() + (b - 1) * rest


def _f_ratio(t, a, b):
    lgamma, z = torch.lgamma, (a / b).log() + t.log_x()
    norm = lgamma((a + b) / 2) - lgamma(a / 2) - lgamma(b / 2)
    return norm + a / 2 * z - t.log_x() - (a + b) / 2 * softplus(z, threshold=1000)


def _image(log_density, inverse, log_slope):
    """Return the log-density of an image, given the inverse and the log of its slope at a point of the image."""
    return lambda t, *parameters: log_density(Point(inverse(t)), *parameters) + log_slope(t)


def _of_exp(log_density):
    return _image(log_density, lambda t: t.log_x(), lambda t: -t.log_x())


def _of_sigmoid(log_density):
    return _image(log_density, lambda t: t.log_x() - t.log_1m_x(), lambda t: -t.log_x() - t.log_1m_x())


def _normal(t, m, s):
    return -(((t.x - m) / s) ** 2) / 2 - s.log() - LOG_TWO_PI / 2


def _laplace(t, m, s):
    return -(t.x - m).abs() / s - (2 * s).log()


def _transformed(base, *transforms):
    return lambda *parameters: TransformedDistribution(base(*parameters), list(transforms))


_EXP, _SIGMOID = maps.ExpTransform(), maps.SigmoidTransform()

FAMILIES = {
    "Normal": Family(LINE, _location, dist.Normal, _normal, lambda m, s: (_GAUSSIAN, _GAUSSIAN)),
    "Laplace": Family(LINE, _location, dist.Laplace, _laplace, lambda m, s: (_exponential(1 / s),) * 2),
    "Logistic": Family(LINE, _location, Logistic, _logistic, lambda m, s: (_exponential(1 / s),) * 2),
    "StudentT": Family(
        LINE, lambda u: (0.7 + 5 * u(), *_location(u)), dist.StudentT, _student, lambda df, m, s: (_power(df),) * 2
    ),
    "Gumbel": Family(
        LINE, _location, dist.Gumbel, _gumbel,
        lambda m, s: (Tail(rate=INF, growth=INF, speed=1 / s), _exponential(1 / s)),
    ),
    "log-Gamma": Family(
        LINE, lambda u: (_shape(u), 10 ** (2 * u() - 1)), _transformed(dist.Gamma, _EXP.inv),
        lambda t, a, r: a * r.log() - torch.lgamma(a) + a * t.x - r * t.x.exp(),
        lambda a, r: (_exponential(a), Tail(rate=INF, growth=INF, speed=1.0)),
    ),
    "Gamma": Family(
        HALF, lambda u: (_shape(u), 10 ** (2 * u() - 1)), dist.Gamma,
        lambda t, a, r: a * r.log() - torch.lgamma(a) + (a - 1) * t.log_x() - r * t.x,
        lambda a, r: (_power(a), _exponential(r)),
    ),
    "InverseGamma": Family(
        HALF, lambda u: (_shape(u), 10 ** (2 * u() - 1)), dist.InverseGamma,
        lambda t, a, r: a * r.log() - torch.lgamma(a) - (a + 1) * t.log_x() - r * (-t.log_x()).exp(),
        lambda a, r: (_exponential(r), _power(a)),
    ),
    "HalfNormal": Family(
        HALF, lambda u: (10 ** (2 * u() - 1),), dist.HalfNormal,
        lambda t, s: -((t.x / s) ** 2) / 2 - s.log() + math.log(2) - LOG_TWO_PI / 2,
        lambda s: (_FLAT, _GAUSSIAN),
    ),
    "Weibull": Family(HALF, lambda u: (10 ** (2 * u() - 1), _shape(u)), dist.Weibull, _weibull, _weibull_tails),
    "FisherSnedecor": Family(
        HALF, lambda u: (2 * _shape(u), 2 * _shape(u)), dist.FisherSnedecor, _f_ratio,
        lambda a, b: (_power(a / 2), _power(b / 2)),
    ),
    "LogNormal": Family(
        HALF, _location, _transformed(dist.Normal, _EXP), _of_exp(_normal), lambda m, s: (_LOG_NORMAL,) * 2
    ),
    "log-logistic": Family(
        HALF, _location, _transformed(Logistic, _EXP), _of_exp(_logistic), lambda m, s: (_power(1 / s),) * 2
    ),
    "Frechet": Family(
        HALF, _location, _transformed(dist.Gumbel, _EXP), _of_exp(_gumbel),
        lambda m, s: (Tail(rate=INF, growth=1 / s), _power(1 / s)),
    ),
    "Beta": Family(
        UNIT, lambda u: (_shape(u), _shape(u)), dist.Beta,
        lambda t, a, b: (
            torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b) + (a - 1) * t.log_x() + (b - 1) * t.log_1m_x()
        ),
        lambda a, b: (_power(a), _power(b)),
    ),
    "Kumaraswamy": Family(
        UNIT, lambda u: (_shape(u), _shape(u)), dist.Kumaraswamy, _kumaraswamy, lambda a, b: (_power(a), _power(b))
    ),
    "RelaxedBernoulli": Family(
        UNIT, lambda u: (_shape(u), 6 * u() - 3), lambda t, logits: dist.RelaxedBernoulli(t, logits=logits), _relaxed,
        lambda t, logits: (_power(t), _power(t)),
    ),
    "logit-Normal": Family(
        UNIT, _location, _transformed(dist.Normal, _SIGMOID), _of_sigmoid(_normal), lambda m, s: (_LOG_NORMAL,) * 2
    ),
    "logit-Laplace": Family(
        UNIT, _location, _transformed(dist.Laplace, _SIGMOID), _of_sigmoid(_laplace), lambda m, s: (_power(1 / s),) * 2
    ),
}  # fmt: skip

_WITHIN = {(LINE, LINE), (HALF, HALF), (UNIT, UNIT), (HALF, LINE), (UNIT, HALF), (UNIT, LINE)}
_SHARED_ENDS = {(LINE, LINE): (True, True), (HALF, HALF): (True, True), (UNIT, UNIT): (True, True),
                (HALF, LINE): (False, True), (UNIT, HALF): (True, False), (UNIT, LINE): (False, False)}  # fmt: skip
PAIRS = [(q, p) for q in FAMILIES for p in FAMILIES if (FAMILIES[q].support, FAMILIES[p].support) in _WITHIN]


def draw_parameters(family: Family, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return random parameters `[count]` in float64."""
    return family.parameters(lambda: torch.rand(count, generator=generator, dtype=torch.float64))


def is_infinite(q: Family, of_q: tuple[Tensor, ...], p: Family, of_p: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return where KL(q‖p) is infinite, and where that is too close to call, or the integral to sum to its end."""
    infinite, close = (torch.zeros(len(of_q[0]), dtype=torch.bool) for _ in range(2))
    for at_end, tail, other in zip(_SHARED_ENDS[q.support, p.support], q.tails(*of_q), p.tails(*of_p), strict=True):
        order, rate, growth, speed = (
            torch.as_tensor(value, dtype=torch.float64).expand_as(infinite)
            for value in (tail.order, tail.rate, other.growth, other.speed)
        )
        is_fast = growth.isinf()
        diverges = torch.where(is_fast, rate <= speed, growth >= order)
        near = torch.where(is_fast, (rate - speed).abs() < 0.1 * speed, (growth - order).abs() < 0.1)
        infinite, close = infinite | (at_end & diverges), close | (at_end & near)
    return infinite, close


def dense_kl(q: Family, of_q: tuple[Tensor, ...], p: Family, of_p: tuple[Tensor, ...], step: float) -> Tensor:
    """Return the KLs by Gauss-Legendre panels in u, with x = sinh u, exp u or sigmoid u, that grow with |u|.

    Where the density of q has a kink, or that of p, panels shrink towards it from both sides.
    """
    end = 345.0 if q.support == LINE else 690.0
    grid = torch.cat([torch.zeros(1), (step * (1.07 ** torch.arange(0, 200, dtype=torch.float64))).cumsum(0)])
    grid = torch.cat([-grid.flip(0), grid[1:]]).clamp(-end, end)
    edges = grid.expand(len(of_q[0]), -1)
    for family, parameters in ((q, of_q), (p, of_p)):
        if family.log_density in (_laplace, FAMILIES["logit-Laplace"].log_density):
            kink = _kink(q.support, family.support, parameters[0]).clamp(-end, end)
            edges = torch.cat([edges, kink.unsqueeze(1)], 1)
    edges = edges.sort(1).values
    nodes, weights = (torch.as_tensor(t) for t in leggauss(16))
    low, high = edges[:, :-1, None], edges[:, 1:, None]
    u = ((low + high) / 2 + (high - low) / 2 * nodes).flatten(1)
    point, log_slope = _points(q.support, u)
    of_q, of_p = ([t.unsqueeze(1) for t in parameters] for parameters in (of_q, of_p))
    log_q = q.log_density(point, *of_q)
    mass = ((high - low) / 2 * weights).flatten(1) * (log_q + log_slope).exp()
    return (mass * torch.where(mass == 0, 0.0, log_q - p.log_density(point, *of_p))).sum(1)


def _points(support: str, u: Tensor) -> tuple[Point, Tensor]:
    """Return the points at u, and log dx/du."""
    if support == LINE:
        return Point(u.sinh()), u.abs() + torch.log1p(torch.exp(-2 * u.abs())) - math.log(2)
    if support == HALF:
        return Point(u.exp(), u), u
    return Point(u.sigmoid(), logsigmoid(u), logsigmoid(-u)), logsigmoid(u) + logsigmoid(-u)


def _kink(support: str, of_kink: str, at: Tensor) -> Tensor:
    """Return the u of a kink, which lies at `at` on the line, or at sigmoid(at)."""
    if of_kink == UNIT:
        return at if support == UNIT else at.sigmoid().log() if support == HALF else at.sigmoid().asinh()
    inside = (at > 0) & (at < 1) if support == UNIT else at > 0
    if support == LINE:
        return at.asinh()
    safe = torch.where(inside, at, 0.5)
    return torch.where(inside, safe.logit() if support == UNIT else safe.log(), 0.0)
