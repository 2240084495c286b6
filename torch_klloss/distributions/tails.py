"""Tails of densities at the ends of their supports, and the KLs that they make infinite.

Each family declares once how its density falls at either end. In terms of y, which is |x| at an infinite end and
1/|x - end| at a finite one, both ends are treated alike: y grows without bound, and a KL is infinite if -log p grows so
fast with y that q has no such moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributions as dist
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.distributions.simplify import peel
from torch_klloss.distributions.supports import bounds_of, contained, is_discrete
from torch_klloss.distributions.tensors import device_of, dtype_of

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

    Example:
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
    within = contained(q, p)
    if within is None:
        return None
    device = device_of(q)
    mask = ~torch.as_tensor(within, device=device)
    for end, q_tail, p_tail in zip(("lower", "upper"), q_tails, p_tails, strict=True):
        q_end, p_end = (torch.as_tensor(getattr(bounds_of(d), end), device=device) for d in (q, p))
        mask = mask | ((q_end == p_end) & _diverges(q_tail, p_tail).to(device))
    return mask.expand(_broadcast(q, p))


def _broadcast(q: Distribution, p: Distribution) -> torch.Size:
    """Return the broadcast batch shape; torch's function imports sympy, and is called only if the shapes differ."""
    same = q.batch_shape == p.batch_shape
    return q.batch_shape if same else torch.broadcast_shapes(q.batch_shape, p.batch_shape)


def tails_of(d: Distribution) -> Tails | None:
    """Return the tails of d at the lower and at the upper end of its support; None if they are not declared."""
    for cls in type(d).__mro__:
        if cls in _TAILS:
            return _TAILS[cls](d) if type(d).log_prob is cls.log_prob else None
    if isinstance(d, dist.TransformedDistribution) and d.transforms:
        return _transformed_tails(d)
    if isinstance(d, dist.MixtureSameFamily):
        return _mixture_tails(d)
    return None


def declared_tails(cls: type[Distribution], d: Distribution) -> Tails:
    """Return the declared tails of the family `cls`, at the parameters of d, even if d overrides `log_prob`."""
    return _TAILS[cls](d)


def _diverges(q: Tail, p: Tail) -> Tensor:
    """Return where the mean of -log p over one tail of q diverges."""
    order, rate, growth, speed = (torch.as_tensor(t) for t in (q.order, q.rate, p.growth, p.speed))
    return torch.where(growth.isinf(), rate <= speed, growth >= order)


def _transformed_tails(d: dist.TransformedDistribution) -> Tails | None:
    """Return the tails of the image under an affine map."""
    *inner, last = d.transforms
    base = dist.TransformedDistribution(d.base_dist, inner, validate_args=False) if inner else d.base_dist
    tails = tails_of(base)
    if tails is None or not isinstance(last, dist.AffineTransform):
        return None
    scale = torch.as_tensor(last.scale)
    lower, upper = (t._replace(rate=t.rate / scale.abs(), speed=t.speed / scale.abs()) for t in tails)
    swap = scale < 0
    return _where(swap, upper, lower), _where(swap, lower, upper)


def _mixture_tails(d: dist.MixtureSameFamily) -> Tails | None:
    """Return the tails of the heaviest component; None if the components have different supports."""
    bounds, tails = bounds_of(d.component_distribution), tails_of(d.component_distribution)
    if bounds is None or tails is None or not all(isinstance(end, float) for end in (bounds.lower, bounds.upper)):
        return None
    like = torch.zeros(d.component_distribution.batch_shape, dtype=dtype_of(d), device=device_of(d))
    lower, upper = (Tail(*((like + value).amin(-1) for value in tail)) for tail in tails)
    return lower, upper


def _where(mask: Tensor, a: Tail, b: Tail) -> Tail:
    return Tail(*(torch.where(mask, x, y) for x, y in zip(a, b, strict=True)))


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
declare_tails(dist.LogNormal, lambda d: (_LOG_NORMAL, _LOG_NORMAL))
declare_tails(dist.Normal, lambda d: (_GAUSSIAN, _GAUSSIAN))
declare_tails(dist.Pareto, lambda d: (_BOUNDED, _power(d.alpha)))
declare_tails(dist.StudentT, lambda d: (_power(d.df), _power(d.df)))
declare_tails(dist.Uniform, lambda d: _FLAT)
declare_tails(dist.VonMises, lambda d: _FLAT)
declare_tails(dist.Weibull, lambda d: (_power(d.concentration), _stretched(d.concentration, d.scale)))
