"""Supports of distributions, and whether p's contains q's.

torch describes a support by a constraint. Constraints are compared if possible; otherwise every point is checked.
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    TransformedDistribution,
    VonMises,
    constraints,
    transform_to,
)

from torch_klloss.distributions.manifolds import are_singular
from torch_klloss.distributions.stated_supports import (
    believed_support,
    innermost,
    is_of_torch,
    some_draws,
    support_of,
)
from torch_klloss.distributions.tensors import device_of, dtype_of, tensors_of
from torch_klloss.numerics.devices import can_be_read, scalar
from torch_klloss.numerics.tracing import is_traced


@dataclass(frozen=True)
class Bounds:
    """The ends of a one-dimensional support, per element of [*batch, *event]."""

    lower: float | Tensor
    upper: float | Tensor


_LINE = Bounds(-math.inf, math.inf)

# Families whose `support` is larger than where their density is positive.
_OVERRIDES: dict[type[Distribution], Bounds] = {VonMises: Bounds(-math.pi, math.pi)}


def bounds_of(d: Distribution) -> Bounds | None:
    """Return the ends of d's support; None if it is not a product of intervals, or not known to be one."""
    if isinstance(d, Independent):
        return bounds_of(d.base_dist)
    for cls, bounds in _OVERRIDES.items():
        if isinstance(d, cls):
            return bounds
    if isinstance(d, TransformedDistribution) and type(d).support is TransformedDistribution.support:
        return _pushed_bounds(d)
    if isinstance(d, MixtureSameFamily):
        return _shared_bounds(bounds_of(d.component_distribution))
    support = support_of(d)
    return None if support is None else _constraint_bounds(support)


def has_moving_support(q: Distribution) -> bool:
    """Return whether a gradient flows into the ends of q's support, as with Uniform(0, theta).

    There the identity E_q[∇ log q] = 0 fails, and with it every gradient estimator but the pathwise one.
    """
    bounds = bounds_of(q)
    ends = () if bounds is None else (bounds.lower, bounds.upper)
    if any(isinstance(end, Tensor) and end.requires_grad for end in ends):
        return True
    parts = getattr(q, "base_dist", None), getattr(q, "component_distribution", None)
    return any(isinstance(part, Distribution) and has_moving_support(part) for part in parts)


def contained(q: Distribution, p: Distribution) -> bool | Tensor | None:
    """Return whether p's support contains q's, if it is known.

    A support that a class of another library states may be wrong. It counts as unknown where draws leave it, and q is
    said to reach beyond p's only where draws of q do.

    Returns:
        True or False for every batch element alike, a bool tensor that broadcasts to the batch shape, or None if it is
        not known.
    """
    if are_singular(q, p):
        return False  # the support of one, such as the simplex, has no mass under the other
    q_support, p_support = believed_support(q), believed_support(p)
    if q_support is p_support is not None and not vars(q_support) and _is_tight(q) and _is_tight(p):
        return True  # one constant: the real line, the simplex, …
    limits = None if p_support is None else bounds_of(p)
    if limits is _LINE:
        return True  # whatever q is
    bounds = bounds_of(q)
    if bounds is None or limits is None or q_support is None:
        return None
    fits = is_within(bounds.lower, limits) & is_within(bounds.upper, limits)
    event_dims = len(q.event_shape)
    if isinstance(fits, Tensor) and 0 < event_dims <= fits.dim():
        fits = fits.flatten(-event_dims).all(-1)
    return fits if fits is True or is_of_torch(q) or _draws_leave(q, p, fits) else None


def _is_tight(d: Distribution) -> bool:
    """Return whether d's density is positive on all of its `support`: torch gives an image the codomain of its map."""
    if isinstance(d, TransformedDistribution) and type(d).support is TransformedDistribution.support:
        support = support_of(d.base_dist)
        for t in d.transforms:
            if support is None or innermost(support) is not innermost(t.domain):
                return False
            support = t.codomain
        return _is_tight(d.base_dist)
    return not isinstance(d, tuple(_OVERRIDES))


def _draws_leave(q: Distribution, p: Distribution, fits: Any) -> bool:
    """Return whether draws of q leave p's support in all batch elements where q's stated support does."""
    z, bounds = some_draws(q), bounds_of(p)
    if z is None or bounds is None:
        return True
    inside = is_within(z, bounds)
    inside = inside.flatten(-len(q.event_shape)).all(-1) if q.event_shape else inside
    return bool((torch.as_tensor(fits, device=z.device) | ~inside.all(0)).all())


class LogProbError(ValueError):
    """The error of a class whose `log_prob` does not fit its batch and event shape."""


def log_prob_at(d: Distribution, x: Tensor, shape: torch.Size) -> Tensor:
    """Return d.log_prob(x), which must have the shape `[*points, *batch]`: any other would be broadcast.

    Raises:
        LogProbError: if it has another shape, or raises an error about shapes.
    """
    try:
        log_prob: Tensor = d.log_prob(x)
    except (IndexError, RuntimeError, ValueError) as error:
        if is_traced() or isinstance(error, NotImplementedError) or not re.search(_ABOUT_SHAPES, str(error)):
            raise
        if len(x) > 1 and x.dim() > len(d.batch_shape) + len(d.event_shape):  # a single point may show the shape
            with suppress(RuntimeError):
                log_prob_at(d, x[:1], torch.Size((1, *shape[1:])))
        raise LogProbError(
            f"{type(d).__name__}.log_prob fails at points of shape {tuple(x.shape)}, where it must return one number "
            f"for each point and batch element, here of shape {tuple(shape)}: {type(error).__name__}: {error}"
        ) from error
    check_log_prob(d, log_prob, shape)
    return log_prob


def check_log_prob(d: Distribution, log_prob: Tensor, shape: torch.Size) -> None:
    """Raise a LogProbError unless d.log_prob has returned the shape `[*points, *batch]`."""
    if log_prob.shape != shape:
        raise LogProbError(
            f"{type(d).__name__}.log_prob must return one number for each point and batch element, here of shape "
            f"{tuple(shape)}, got {tuple(log_prob.shape)}. It must sum over the event shape {tuple(d.event_shape)} "
            f"and over none of the batch shape {tuple(d.batch_shape)}: declare other shapes, or wrap it in Independent."
        )


_ABOUT_SHAPES = r"(?i)\b(batch_?size|sizes?|shapes?|dim|dimensions?|broadcast\w*|index)\b"


def takes_integers(d: Distribution) -> bool:
    """Return whether log_prob takes integers, as a Categorical draws them; Bernoulli.log_prob refuses them."""
    while isinstance(d, Independent):
        d = d.base_dist
    return isinstance(d, Categorical)


def is_within(x: float | Tensor, bounds: Bounds) -> Any:
    """Return whether x lies between the ends. NaN counts as inside, so that the result is NaN and not an infinity."""
    outside = (x < bounds.lower) | (x > bounds.upper)
    return ~outside if isinstance(outside, Tensor) else not outside


def _constraint_bounds(support: constraints.Constraint) -> Bounds | None:
    support = innermost(support)
    if support is constraints.real:
        return _LINE
    if support is constraints.boolean:
        return Bounds(0.0, 1.0)
    if isinstance(support, type(constraints.multinomial(1))):
        return None
    lower, upper = getattr(support, "lower_bound", -math.inf), getattr(support, "upper_bound", math.inf)
    if isinstance(lower, float) and isinstance(upper, float) and math.isinf(lower) and math.isinf(upper):
        return None  # no end is declared: not an interval
    return Bounds(lower, upper)


def _shared_bounds(of_components: Bounds | None) -> Bounds | None:
    """Return the ends of a mixture; None if the components have different ends, between which there may be gaps."""
    ends = () if of_components is None else (of_components.lower, of_components.upper)
    return None if any(isinstance(end, Tensor) and end.dim() for end in ends) else of_components


def _pushed_bounds(d: TransformedDistribution) -> Bounds | None:
    """Return the images of the base's ends; None if a transform is no monotone map of the line."""
    bounds = bounds_of(d.base_dist)
    for transform in d.transforms:
        image = _constraint_bounds(transform.codomain)
        if bounds is None or image is None or not transform.bijective or transform.codomain.event_dim:
            return None
        # The image of the whole line is the codomain, whatever the parameters of the transform.
        is_line = isinstance(bounds.lower, float) and isinstance(bounds.upper, float) and bounds == _LINE
        bounds = image if is_line else _image(bounds, transform, image, d)
    return bounds


def _image(bounds: Bounds, transform: Any, image: Bounds, d: Distribution) -> Bounds | None:
    try:
        sign = transform.sign
    except NotImplementedError:
        return None
    push = partial(_pushed, transform, torch.empty(0, dtype=dtype_of(d), device=device_of(d)))
    if not isinstance(sign, Tensor):
        limits = (image.lower, image.upper) if sign > 0 else (image.upper, image.lower)
        ends = push(bounds.lower, limits[0]), push(bounds.upper, limits[1])
        return Bounds(*ends) if sign > 0 else Bounds(ends[1], ends[0])
    rising = sign > 0
    least, most = (scalar(end, sign.device, dtype_of(d)) for end in (image.lower, image.upper))
    low = push(bounds.lower, torch.where(rising, least, most))
    high = push(bounds.upper, torch.where(rising, most, least))
    return Bounds(torch.where(rising, low, high), torch.where(rising, high, low))


def _pushed(transform: Any, like: Tensor, end: float | Tensor, limit: Any) -> Any:
    """Return the image of one end: the limit for an end of the domain, where the transform itself may round."""
    domain = _constraint_bounds(transform.domain) or _LINE
    inside = (end > domain.lower) & (end < domain.upper)
    if not isinstance(inside, Tensor):
        return transform(scalar(end, like.device, like.dtype)) if inside else limit
    # An end that is a limit does not move with the transform, which has to be known of a learned one.
    is_asked = can_be_read(inside) or (not is_traced() and any(t.requires_grad for t in tensors_of(transform)))
    if is_asked and not inside.is_meta and not inside.any():
        return limit
    some_point = transform_to(transform.domain)(like.new_zeros(()))
    return torch.where(inside, transform(torch.where(inside, end, some_point)), scalar(limit, like.device, like.dtype))
