"""Transforms of located points: images, preimages and slopes that do not round to an end of the support."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    CumulativeDistributionTransform,
    ExpTransform,
    IndependentTransform,
    Normal,
    PowerTransform,
    SigmoidTransform,
    SoftplusTransform,
    StickBreakingTransform,
    TanhTransform,
    Transform,
)
from torch.distributions.transforms import _InverseTransform
from torch.nn.functional import logsigmoid, pad

from torch_klloss.distributions.located import Located, log1m_power, log1mexp
from torch_klloss.distributions.pushforward import is_positive
from torch_klloss.distributions.tensors import tensors_of
from torch_klloss.numerics.devices import can_be_read, scalar
from torch_klloss.numerics.dimensions import sum_last

_LOG_2 = math.log(2)


@dataclass(frozen=True)
class Map:
    """What a transform does to located points.

    Attributes:
        image: (t, y) -> x = t(y).
        preimage: (t, x) -> y.
        log_slope: (t, y, x) -> log |dx/dy|, of every event of the transform's domain.
    """

    image: Callable[[Any, Located], Located]
    preimage: Callable[[Any, Located], Located]
    log_slope: Callable[[Any, Located, Located], Tensor]


def image(t: Transform, y: Located) -> Located:
    """Return t(y), which remembers y."""
    return replace(_map_of(t).image(t, y), origin=(t, y))


def preimage(t: Transform, x: Located) -> Located:
    """Return the y with t(y) = x: the points that t made x from, if it did."""
    if x.origin is not None and x.origin[0] is t and t.bijective:
        return x.origin[1]
    return _map_of(t).preimage(t, x)


def log_slope(t: Transform, y: Located, x: Located) -> Tensor:
    """Return log |dx/dy| at x = t(y)."""
    return _map_of(t).log_slope(t, y, x)


def fixed(x: Located) -> Located:
    """Return the points detached; they remember their origin where no parameter of a transform lies in between."""
    if x.origin is None or not _is_fixed(x.origin[0]):
        return x.detach()
    return replace(x.detach(), origin=(x.origin[0], fixed(x.origin[1])))


def _is_fixed(t: Transform) -> bool:
    known = _map_of(t) is not _ANY
    return known and not any(tensor.requires_grad for tensor in tensors_of(t))


def _map_of(t: Transform) -> Map:
    if isinstance(t, _InverseTransform):
        return _INVERSE if _map_of(t.inv) is not _ANY else _ANY
    if isinstance(t, IndependentTransform):
        return _INDEPENDENT if _map_of(t.base_transform) is not _ANY else _ANY
    if type(t) is CumulativeDistributionTransform and type(t.distribution) is not Normal:
        return _ANY
    return _MAPS.get(type(t), _ANY)


_ANY = Map(
    lambda t, y: Located(t(y.x)),
    lambda t, x: Located(t.inv(x.x)),
    lambda t, y, x: t.log_abs_det_jacobian(y.x, x.x),
)
_INVERSE = Map(
    lambda t, y: _map_of(t.inv).preimage(t.inv, y),
    lambda t, x: _map_of(t.inv).image(t.inv, x),
    lambda t, y, x: -_map_of(t.inv).log_slope(t.inv, x, y),
)
_INDEPENDENT = Map(
    lambda t, y: _map_of(t.base_transform).image(t.base_transform, y),
    lambda t, x: _map_of(t.base_transform).preimage(t.base_transform, x),
    lambda t, y, x: sum_last(_map_of(t.base_transform).log_slope(t.base_transform, y, x), t.reinterpreted_batch_ndims),
)


def _exp(t: Any, y: Located) -> Located:
    return Located(y.x.exp(), lower=0.0, log_below=y.x)


def _sigmoid(t: Any, y: Located) -> Located:
    return Located(y.x.sigmoid(), 0.0, 1.0, logsigmoid(y.x), logsigmoid(-y.x))


def _tanh(t: Any, y: Located) -> Located:
    return Located(y.x.tanh(), -1.0, 1.0, _LOG_2 + logsigmoid(2 * y.x), _LOG_2 + logsigmoid(-2 * y.x))


def _softplus(t: Any, y: Located) -> Located:
    x = torch.logaddexp(y.x, torch.zeros_like(y.x))
    far = y.x < -20
    log_x = torch.where(far, y.x - y.x.clamp_max(-20.0).exp() / 2, torch.where(far, 1.0, x).log())
    return Located(x, lower=0.0, log_below=log_x)


def _softplus_inverse(t: Any, x: Located) -> Located:
    log_x = x.log_from(0.0)
    far = log_x < -20
    near = torch.where(far, 1.0, x.x)
    return Located(torch.where(far, log_x + log_x.clamp_max(-20.0).exp() / 2, near + log1mexp(-near)))


def _affine(t: Any, y: Located) -> Located:
    return _scaled(y, lambda end: t.loc + t.scale * end, t.scale, 1)


def _affine_inverse(t: Any, x: Located) -> Located:
    return _scaled(x, lambda end: (end - t.loc) / t.scale, t.scale, -1)


def _scaled(y: Located, f: Callable[[Any], Any], scale: Any, power: int) -> Located:
    """Return the points under an affine map f, whose slope is the scale to this power."""
    x = f(y.x)
    if y.log_below is None and y.log_above is None:
        return Located(x)
    size = scale.abs().log() if isinstance(scale, Tensor) else math.log(abs(scale))
    below, above = (None if log is None else (log + power * size).expand_as(x) for log in (y.log_below, y.log_above))
    is_readable = not isinstance(scale, Tensor) or can_be_read(scale)
    if is_readable and is_positive(scale):
        return Located(x, f(y.lower), f(y.upper), below, above)
    if is_readable and is_positive(-scale):
        return Located(x, f(y.upper), f(y.lower), above, below)
    below, above = (torch.zeros_like(x) if log is None else log for log in (below, above))  # of an infinite end
    rises = scale > 0
    sign = torch.where(rises, 1.0, -1.0)
    lower, upper = (_moved_end(f, scalar(end, x.device, x.dtype), sign) for end in (y.lower, y.upper))
    low, high = torch.where(rises, lower, upper), torch.where(rises, upper, lower)
    return Located(x, low, high, torch.where(rises, below, above), torch.where(rises, above, below))


def _moved_end(f: Callable[[Any], Any], end: Tensor, sign: Tensor) -> Tensor:
    """Return the image of an end under an affine map; an infinite one has no derivative, not even NaN."""
    infinite = end.isinf()
    return torch.where(infinite, end.detach() * sign, f(torch.where(infinite, 0.0, end)))


def _power(t: Any, y: Located) -> Located:
    return _raised(y, scalar(t.exponent, y.x.device, y.x.dtype))


def _power_inverse(t: Any, x: Located) -> Located:
    return _raised(x, 1 / scalar(t.exponent, x.x.device, x.x.dtype))


def _raised(y: Located, exponent: Tensor) -> Located:
    """Return yᶜ of positive points."""
    log_x = exponent * y.log_from(0.0)
    x = y.x.pow(exponent)
    if isinstance(y.upper, Tensor) or y.upper != 1.0:
        return Located(x, lower=0.0, log_below=log_x)
    return Located(x, 0.0, 1.0, log_x, log1m_power(y, exponent))


def _power_slope(t: Any, y: Located, x: Located) -> Tensor:
    exponent = scalar(t.exponent, y.x.device, y.x.dtype)
    return exponent.abs().log() + (exponent - 1) * y.log_from(0.0)


def _normal_cdf(t: Any, y: Located) -> Located:
    z = (y.x - t.distribution.loc) / t.distribution.scale
    below, above = torch.special.log_ndtr(z), torch.special.log_ndtr(-z)
    return Located(below.exp(), 0.0, 1.0, below, above)


def _normal_quantile(t: Any, x: Located) -> Located:
    below, above = x.log_from(0.0), x.log_to(1.0)
    z = torch.where(below < above, 1.0, -1.0) * torch.special.ndtri(torch.minimum(below, above).exp())
    return Located(t.distribution.loc + t.distribution.scale * z)


def _log_offset(y: Tensor) -> Tensor:
    """Return the shifts of a stick-breaking transform's logits, which make 0 the centre of the simplex."""
    return torch.arange(y.shape[-1], 0, -1, dtype=y.dtype, device=y.device).log()


def _stick_breaking(t: Any, y: Located) -> Located:
    logits = y.x - _log_offset(y.x)
    log_x = pad(logsigmoid(logits), (0, 1)) + pad(logsigmoid(-logits).cumsum(-1), (1, 0))
    return Located(log_x.exp(), lower=0.0, log_below=log_x)


def _stick_breaking_inverse(t: Any, x: Located) -> Located:
    log_x = x.log_from(0.0)
    log_rest = log_x.flip(-1).logcumsumexp(-1).flip(-1)[..., 1:]
    logits = log_x[..., :-1] - log_rest
    return Located(logits + _log_offset(logits))


def _stick_breaking_slope(t: Any, y: Located, x: Located) -> Tensor:
    return (x.log_from(0.0)[..., :-1] + logsigmoid(_log_offset(y.x) - y.x)).sum(-1)


def _sigmoid_slope(t: Any, y: Located, x: Located) -> Tensor:
    return logsigmoid(y.x) + logsigmoid(-y.x)


_MAPS: dict[type[Transform], Map] = {
    AffineTransform: Map(_affine, _affine_inverse, lambda t, y, x: t.log_abs_det_jacobian(y.x, x.x)),
    CumulativeDistributionTransform: Map(_normal_cdf, _normal_quantile, lambda t, y, x: t.distribution.log_prob(y.x)),
    ExpTransform: Map(_exp, lambda t, x: Located(x.log_from(0.0)), lambda t, y, x: y.x),
    PowerTransform: Map(_power, _power_inverse, _power_slope),
    SigmoidTransform: Map(_sigmoid, lambda t, x: Located(x.log_from(0.0) - x.log_to(1.0)), _sigmoid_slope),
    SoftplusTransform: Map(_softplus, _softplus_inverse, lambda t, y, x: logsigmoid(y.x)),
    StickBreakingTransform: Map(_stick_breaking, _stick_breaking_inverse, _stick_breaking_slope),
    TanhTransform: Map(
        _tanh,
        lambda t, x: Located((x.log_from(-1.0) - x.log_to(1.0)) / 2),
        lambda t, y, x: 2 * _LOG_2 + logsigmoid(2 * y.x) + logsigmoid(-2 * y.x),
    ),
}
