"""Tails of densities at the ends of their supports, and the KLs that they make infinite.

Each family declares once how its density falls at either end. In terms of y, which is |x| at an infinite end and
1/|x - end| at a finite one, both ends are treated alike: y grows without bound, and a KL is infinite if -log p grows so
fast with y that q has no such moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributions as dist
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli
from torch.distributions.transforms import _InverseTransform

from torch_klloss.distributions.logistic import Logistic
from torch_klloss.distributions.simplify import peel
from torch_klloss.distributions.stated_supports import is_discrete
from torch_klloss.distributions.supports import bounds_of, contained
from torch_klloss.distributions.tensors import device_of, dtype_of
from torch_klloss.distributions.transforms import elementwise, parts_of
from torch_klloss.numerics.devices import scalar
from torch_klloss.numerics.tracing import is_traced

Number = float | Tensor


class Tail(NamedTuple):
    """The decay of a density at one end of its support, in y.

    Attributes:
        order: E[y^k] is finite for k < order only; inf if it always is. A density ~ y^(-a-1) has the order a, and a
            density ~ |x - end|^(b-1) near a finite end the order b.
        rate: E[exp(t y)] is finite for t < rate only; 0 if it never is, inf if it always is.
        growth: -log density grows like y^growth; 0 if more slowly than any power, inf if exponentially.
        speed: -log density grows like exp(speed y), if growth is inf.
    """

    order: Number = math.inf
    rate: Number = math.inf
    growth: Number = 0.0
    speed: Number = math.inf


Tails = tuple[Tail, Tail]  # at the lower and at the upper end
_TAILS: dict[type[Distribution], Callable[[Any], Tails]] = {}


def declare_tails(cls: type[Distribution], tails: Callable[[Any], Tails]) -> None:
    """Declare the tails of a family at the lower and the upper end of its support.

    Args:
        cls: the family; a subclass inherits, unless it overrides `log_prob`.
        tails: called with an instance. It returns two `Tail`s of numbers, or of tensors that broadcast to its batch
            shape.
    """
    _TAILS[cls] = tails


def is_infinite(q: Distribution, p: Distribution, power: int = 1) -> Tensor | None:
    """Return where KL(q‖p) is infinite: q has mass beyond p's support, or -log p grows too fast for the tails of q.

    This is determined from the declared tails of both families: nothing is drawn, and no density is evaluated.

    Args:
        q: the distribution that the expectation is under, `[*batch, *event]`.
        p: the other one; its batch shape broadcasts against q's.
        power: 2 for the second moment of log q - log p in place of the KL, which is the first.

    Returns:
        A bool tensor of the broadcast batch shape, False where the moment is finite or a parameter is NaN; None if a
        family has no declared tails, or they do not determine it.

    Examples:
        >>> import torch
        >>> from torch.distributions import Normal, StudentT
        >>> from torch_klloss.distributions.tails import is_infinite
        >>> is_infinite(StudentT(torch.tensor([1.0, 2.0, 3.0])), Normal(0.0, 1.0))
        tensor([ True,  True, False])
    """
    shape = _broadcast(q, p)
    q, p, peeled = peel(q, p)
    if q.event_shape or p.event_shape or is_discrete(q) or is_discrete(p):
        return None
    q_tails, p_tails = tails_of(q), tails_of(p)
    if q_tails is None or p_tails is None:
        return None
    # A power grows so many times as fast; log q itself has all moments.
    lower, upper = (tail._replace(growth=power * tail.growth, speed=power * tail.speed) for tail in p_tails)
    infinite = is_infinite_by_tails(q, p, q_tails, (lower, upper))
    return infinite.flatten(-peeled).any(-1).expand(shape) if infinite is not None and peeled else infinite


def is_infinite_by_tails(q: Distribution, p: Distribution, q_tails: Tails, p_tails: Tails) -> Tensor | None:
    """Return where KL(q‖p) is infinite, for q and p on the line with these tails; None if it is not known."""
    within, of_q, of_p = contained(q, p), bounds_of(q), bounds_of(p)
    if within is None or of_q is None or of_p is None:
        return None
    mask: bool | Tensor = ~within if isinstance(within, Tensor) else not within
    for end, q_tail, p_tail in zip(("lower", "upper"), q_tails, p_tails, strict=True):
        q_end, p_end = getattr(of_q, end), getattr(of_p, end)
        mask = mask | ((q_end == p_end) & _diverges(q_tail, p_tail))
    if isinstance(mask, bool):
        return torch.full(_broadcast(q, p), mask, device=device_of(q))
    return scalar(False, device_of(q)) | mask.expand(_broadcast(q, p))


def _broadcast(q: Distribution, p: Distribution) -> torch.Size:
    """Return the broadcast batch shape; torch's function imports sympy, and is called only if the shapes differ."""
    same = q.batch_shape == p.batch_shape
    return q.batch_shape if same else torch.broadcast_shapes(q.batch_shape, p.batch_shape)


def tails_of(d: Distribution) -> Tails | None:
    """Return the tails of d at the lower and at the upper end of its support; None if they are not declared."""
    for cls in type(d).__mro__:
        if cls in _TAILS:
            return _TAILS[cls](d) if type(d).log_prob is cls.log_prob else None
    plain = type(d).log_prob is dist.TransformedDistribution.log_prob
    if isinstance(d, dist.TransformedDistribution) and plain and d.transforms:
        return _transformed_tails(d)
    if isinstance(d, dist.MixtureSameFamily):
        return _mixture_tails(d)
    return None


def declared_tails(cls: type[Distribution], d: Distribution) -> Tails:
    """Return the declared tails of the family `cls`, at the parameters of d, even if d overrides `log_prob`."""
    return _TAILS[cls](d)


def _diverges(q: Tail, p: Tail) -> bool | Tensor:
    """Return where the mean of -log p over one tail of q diverges."""
    if isinstance(p.growth, Tensor):
        return torch.where(p.growth.isinf(), q.rate <= p.speed, p.growth >= q.order)
    return q.rate <= p.speed if math.isinf(p.growth) else p.growth >= q.order


def _transformed_tails(d: dist.TransformedDistribution) -> Tails | None:
    """Return the tails of the image under the last transform; None if that is not known to move them in a simple way.

    Only an affine map is followed under tracing, where values are not known.
    """
    *inner, last = parts_of(d.transforms)
    base = dist.TransformedDistribution(d.base_dist, inner, validate_args=False) if inner else d.base_dist
    tails, t = tails_of(base), elementwise(last)
    if tails is None or t is None:
        return None
    if isinstance(t, dist.AffineTransform):
        stretch: Any = abs(t.scale)
        lower, upper = (_stretch(tail, stretch) for tail in tails)
        return _turned(lower, upper, t.scale)
    moves, bounds = _moves(t), bounds_of(base)
    if moves is None or bounds is None or is_traced():
        return None
    domain = (getattr(t.domain, name, end) for name, end in (("lower_bound", -math.inf), ("upper_bound", math.inf)))
    ends = zip(tails, moves, (bounds.lower, bounds.upper), domain, strict=True)
    moved = [_where(at == end, move(tail), _inside(tail)) for tail, move, at, end in ends]
    if any(is_nan(value) for tail in moved for value in tail):
        return None
    return _turned(moved[0], moved[1], getattr(t, "exponent", 1.0))


def _turned(lower: Tail, upper: Tail, slope: Number) -> Tails:
    """Return the tails of an image, whose ends change places where the map falls."""
    falls = slope < 0
    return _where(falls, upper, lower), _where(falls, lower, upper)


Move = Callable[[Tail], Tail]


def _moves(t: dist.Transform) -> tuple[Move, Move] | None:
    """Return what a transform does to a tail at the lower and at the upper end of its domain; None if not known."""
    is_inverse = isinstance(t, _InverseTransform)
    t = t.inv if is_inverse else t
    if isinstance(t, dist.PowerTransform):
        power = abs(t.exponent)
        move = partial(_raise, power=1 / power if is_inverse else power)
        return move, move
    rates = _EXPONENTIAL.get(type(t))
    if rates is None:
        return None
    lower, upper = (partial(_lower if is_inverse else _exponentiate, rate=rate) if rate else _same for rate in rates)
    return lower, upper


# How fast the y of the image grows with y at either end of the domain: like exp(rate y), or (0) like y itself.
_EXPONENTIAL: dict[type[dist.Transform], tuple[float, float]] = {
    dist.ExpTransform: (1.0, 1.0),
    dist.SigmoidTransform: (1.0, 1.0),
    dist.SoftplusTransform: (1.0, 0.0),
    dist.TanhTransform: (2.0, 2.0),
}


def _same(tail: Tail) -> Tail:
    return tail


def _inside(tail: Tail) -> Tail:
    """Return the tail at an end within the domain, where the map is smooth: y is stretched by an unknown factor."""
    is_extreme = (tail.rate == 0) | (tail.rate == math.inf)
    return tail._replace(
        rate=_pick(is_extreme, tail.rate, math.nan), speed=_pick(tail.speed == math.inf, tail.speed, math.nan)
    )


def _stretch(tail: Tail, factor: Number) -> Tail:
    return tail._replace(rate=tail.rate / factor, speed=tail.speed / factor)


def _exponentiate(tail: Tail, rate: float) -> Tail:
    """Return the tail of exp(rate y); one that is heavier than an exponential becomes too heavy for a `Tail`."""
    double = tail.growth == math.inf
    light = _pick(tail.speed > rate, math.inf, _pick(tail.speed < rate, 0.0, math.nan))
    order = _pick(tail.rate == 0, math.nan, tail.rate / rate)
    return Tail(order, _pick(double, light, 0.0), _pick(double, tail.speed / rate, 0.0))


def _lower(tail: Tail, rate: float) -> Tail:
    """Return the tail of log(y)/rate; a lognormal one is not known well enough, nor one that becomes yet lighter."""
    is_power = (tail.growth == 0) & (tail.order < math.inf)
    is_stretched = (tail.growth > 0) & (tail.growth < math.inf)
    speed = _pick(is_power, math.inf, _pick(is_stretched, tail.growth * rate, math.nan))
    return Tail(math.inf, tail.order * rate, _pick(is_power, 1.0, math.inf), speed)


def _raise(tail: Tail, power: Number) -> Tail:
    """Return the tail of y^power."""
    light = _pick(tail.growth > power, math.inf, _pick(tail.growth < power, 0.0, math.nan))
    is_identity = power == 1
    return Tail(
        tail.order / power,
        _pick(is_identity, tail.rate, light),
        tail.growth / power,
        _pick(is_identity | (tail.growth != math.inf), tail.speed, math.nan),
    )


def _pick(condition: bool | Tensor, a: Number, b: Number) -> Number:
    """Return a where the condition holds and b elsewhere, of numbers and of tensors."""
    if isinstance(condition, Tensor):
        return torch.where(condition, a, b)  # type: ignore[arg-type, unused-ignore]
    return a if condition else b


def _mixture_tails(d: dist.MixtureSameFamily) -> Tails | None:
    """Return the tails of the heaviest component; None if the components have different supports."""
    bounds, tails = bounds_of(d.component_distribution), tails_of(d.component_distribution)
    ends = () if bounds is None else (bounds.lower, bounds.upper)
    if bounds is None or tails is None or any(isinstance(end, Tensor) and end.dim() for end in ends):
        return None
    like = torch.zeros(d.component_distribution.batch_shape, dtype=dtype_of(d), device=device_of(d))
    lower, upper = (Tail(*((like + value).amin(-1) for value in tail)) for tail in tails)
    return lower, upper


def is_nan(value: Number) -> bool:
    """Return whether an element is NaN."""
    return bool(value.isnan().any()) if isinstance(value, Tensor) else math.isnan(value)


def _where(mask: bool | Tensor, a: Tail, b: Tail) -> Tail:
    return Tail(*(_pick(mask, x, y) for x, y in zip(a, b, strict=True)))


def _power(order: Number) -> Tail:
    """Return the tail y^(-order - 1)."""
    return Tail(order=order, rate=0.0)


def _exponential(rate: Number) -> Tail:
    return Tail(rate=rate, growth=1.0)


def _stretched(power: Tensor, scale: Tensor) -> Tail:
    """Return the tail exp(-(y/scale)^power)."""
    rate = torch.where(power > 1, math.inf, torch.where(power < 1, 0.0, 1 / scale))
    return Tail(rate=rate, growth=power)


def _generalized_pareto(d: dist.GeneralizedPareto) -> Tails:
    """Return the tails: at the upper end a power of x, an exponential, or a power of the distance from a finite end."""
    c = d.concentration
    exponential = c == 0
    upper = Tail(
        order=torch.where(exponential, math.inf, 1 / c.abs()),
        rate=torch.where(exponential, 1 / d.scale, 0.0),
        growth=torch.where(exponential, 1.0, 0.0),
    )
    return _BOUNDED, upper


def _gumbel(d: dist.Gumbel) -> Tails:
    return Tail(growth=math.inf, speed=1 / d.scale), _exponential(1 / d.scale)


_BOUNDED = _power(1.0)  # at a finite end, where the density is neither 0 nor infinite
_GAUSSIAN = Tail(growth=2.0)
_LOG_NORMAL = Tail(rate=0.0)  # lighter than any power, heavier than any stretched exponential
_FLAT = (_BOUNDED, _BOUNDED)

declare_tails(dist.Beta, lambda d: (_power(d.concentration1), _power(d.concentration0)))
declare_tails(dist.Cauchy, lambda d: (_power(1.0), _power(1.0)))
declare_tails(dist.ContinuousBernoulli, lambda d: _FLAT)
declare_tails(dist.Exponential, lambda d: (_BOUNDED, _exponential(d.rate)))
declare_tails(dist.FisherSnedecor, lambda d: (_power(d.df1 / 2), _power(d.df2 / 2)))
declare_tails(dist.Gamma, lambda d: (_power(d.concentration), _exponential(d.rate)))
declare_tails(dist.GeneralizedPareto, _generalized_pareto)
declare_tails(dist.Gumbel, _gumbel)
declare_tails(dist.HalfCauchy, lambda d: (_BOUNDED, _power(1.0)))
declare_tails(dist.HalfNormal, lambda d: (_BOUNDED, _GAUSSIAN))
declare_tails(dist.InverseGamma, lambda d: (_exponential(d.rate), _power(d.concentration)))
declare_tails(dist.Kumaraswamy, lambda d: (_power(d.concentration1), _power(d.concentration0)))
declare_tails(dist.Laplace, lambda d: (_exponential(1 / d.scale), _exponential(1 / d.scale)))
declare_tails(Logistic, lambda d: (_exponential(1 / d.scale), _exponential(1 / d.scale)))
declare_tails(LogitRelaxedBernoulli, lambda d: (_exponential(d.temperature), _exponential(d.temperature)))
declare_tails(dist.LogNormal, lambda d: (_LOG_NORMAL, _LOG_NORMAL))
declare_tails(dist.Normal, lambda d: (_GAUSSIAN, _GAUSSIAN))
declare_tails(dist.Pareto, lambda d: (_BOUNDED, _power(d.alpha)))
declare_tails(dist.StudentT, lambda d: (_power(d.df), _power(d.df)))
declare_tails(dist.Uniform, lambda d: _FLAT)
declare_tails(dist.VonMises, lambda d: _FLAT)
declare_tails(dist.Weibull, lambda d: (_power(d.concentration), _stretched(d.concentration, d.scale)))
