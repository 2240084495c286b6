"""Where a distribution puts its mass, and whether p reaches all of it.

torch names a support by a constraint. Constraints are compared where they can be; where they cannot, the points
themselves are asked, one by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, TransformedDistribution, VonMises, constraints, transform_to

from torch_klloss.rebuild import device_of, dtype_of, unvalidated


@dataclass(frozen=True)
class Bounds:
    """Hold the ends of a one-dimensional support, per element of [*batch, *event]."""

    lower: float | Tensor
    upper: float | Tensor


# Families whose `support` says more than their density covers.
_OVERRIDES: dict[type[Distribution], Bounds] = {VonMises: Bounds(-math.pi, math.pi)}


def support_of(d: Distribution) -> constraints.Constraint | None:
    """Return d's support, or None where the class does not declare one."""
    try:
        support: Any = d.support
    except NotImplementedError:
        return None
    return support if isinstance(support, constraints.Constraint) else None


def is_discrete(d: Distribution) -> bool | None:
    """Tell whether d lives on separate points; None where its support does not say."""
    support = support_of(d)
    return None if support is None else bool(_innermost(support).is_discrete)


def bounds_of(d: Distribution) -> Bounds | None:
    """Return the ends of d's support; None where it is not a product of intervals, or not known to be one."""
    while isinstance(d, Independent):
        d = d.base_dist
    for cls, bounds in _OVERRIDES.items():
        if isinstance(d, cls):
            return bounds
    if isinstance(d, TransformedDistribution) and type(d).support is TransformedDistribution.support:
        return _pushed_bounds(d)
    support = support_of(d)
    return None if support is None else _constraint_bounds(support)


def has_moving_support(q: Distribution) -> bool:
    """Tell whether a gradient flows into the ends of q's support, as with Uniform(0, theta).

    There the identity E_q[∇ log q] = 0 fails, and with it every gradient but the pathwise one.
    """
    bounds = bounds_of(q)
    ends = () if bounds is None else (bounds.lower, bounds.upper)
    if any(isinstance(end, Tensor) and end.requires_grad for end in ends):
        return True
    base = getattr(q, "base_dist", None)
    return isinstance(base, Distribution) and has_moving_support(base)


def contained(q: Distribution, p: Distribution) -> bool | Tensor | None:
    """Tell whether p's support contains q's, as far as the constraints decide.

    Returns:
        True or False for every batch element alike, a bool tensor that broadcasts to the batch shape, or None
        where the constraints cannot tell.
    """
    q_support, p_support = support_of(q), support_of(p)
    overridden = type(q) in _OVERRIDES or type(p) in _OVERRIDES
    if q_support is p_support is not None and not overridden and not vars(q_support):
        return True  # one constant: the real line, the simplex, …
    inner, outer = bounds_of(q), bounds_of(p)
    if inner is None or outer is None:
        return None
    fits = (inner.lower >= outer.lower) & (inner.upper <= outer.upper)
    event_dims = len(q.event_shape)
    if isinstance(fits, Tensor) and 0 < event_dims <= fits.dim():
        return fits.flatten(-event_dims).all(-1)
    return fits


def log_prob_within(p: Distribution, x: Tensor, reach: bool | Tensor | None) -> Tensor:
    """Return log p(x) `[*sample, *batch]`, -inf outside p's support, whatever validation p was built with.

    Args:
        p: the distribution.
        x: points `[*sample, *batch, *event]`.
        reach: what `contained` said of the distribution that x was drawn from.
    """
    unchecked, support = unvalidated(p), support_of(p)
    if not x.is_floating_point():  # the points of a Categorical, which a Bernoulli cannot read
        x = x.to(dtype_of(p))
    if reach is True or support is None:
        return unchecked.log_prob(x)
    inside, bounds, event_dims = support.check(x), bounds_of(p), len(p.event_shape)
    if bounds is not None:  # tighter than the constraint, where that claims too much
        within = (x >= bounds.lower) & (x <= bounds.upper)
        inside = inside & (within.flatten(-event_dims).all(-1) if event_dims else within)
    # Points outside are moved inside before they are evaluated: a NaN gradient would survive the mask.
    kept = torch.where(inside.reshape(inside.shape + (1,) * event_dims), x, _interior_point(support, bounds, x))
    return torch.where(inside, unchecked.log_prob(kept), -math.inf)


def _interior_point(support: constraints.Constraint, bounds: Bounds | None, x: Tensor) -> Tensor:
    """Return points inside the support, of the shape of x; x itself where none is known."""
    if not _innermost(support).is_discrete:
        try:
            to_support = transform_to(support)
            return to_support(x.new_zeros(to_support.inverse_shape(x.shape)))
        except NotImplementedError:
            return x
    if bounds is None:
        return x
    lower, upper = (torch.as_tensor(end, dtype=x.dtype, device=x.device) for end in (bounds.lower, bounds.upper))
    return torch.where(lower.isfinite(), lower, torch.where(upper.isfinite(), upper, 0.0))


def _innermost(support: constraints.Constraint) -> Any:
    """Strip what only rearranges dimensions: independent(...) and the constraint of a mixture."""
    while (base := getattr(support, "base_constraint", None)) is not None:
        support = base
    return support


def _constraint_bounds(support: constraints.Constraint) -> Bounds | None:
    is_mixture = "Mixture" in type(support).__name__
    support = _innermost(support)
    if support is constraints.real:
        return Bounds(-math.inf, math.inf)
    if support is constraints.boolean:
        return Bounds(0.0, 1.0)
    if isinstance(support, type(constraints.multinomial(1))):
        return None
    lower, upper = getattr(support, "lower_bound", -math.inf), getattr(support, "upper_bound", math.inf)
    if isinstance(lower, float) and isinstance(upper, float) and math.isinf(lower) and math.isinf(upper):
        return None  # neither end is declared: not an interval
    if is_mixture and any(isinstance(end, Tensor) and end.dim() for end in (lower, upper)):
        return None  # the intervals of the components may leave gaps
    return Bounds(lower, upper)


def _pushed_bounds(d: TransformedDistribution) -> Bounds | None:
    """Push the ends of the base through the transforms, as long as these are monotone maps of the line."""
    bounds = bounds_of(d.base_dist)
    like = torch.empty(0, dtype=dtype_of(d), device=device_of(d))
    for transform in d.transforms:
        image = _constraint_bounds(transform.codomain)
        if bounds is None or image is None or not transform.bijective or transform.codomain.event_dim:
            return None
        try:
            rising = torch.as_tensor(transform.sign, device=like.device) > 0
        except NotImplementedError:
            return None
        least, most = (torch.as_tensor(end).to(like) for end in (image.lower, image.upper))

        def push(end: float | Tensor, limit: Tensor, transform: Any = transform) -> Tensor:
            """Map one end; an infinite one goes to the limit, which the transform itself may round short of."""
            end = torch.as_tensor(end).to(like)
            return torch.where(end.isfinite(), transform(torch.where(end.isfinite(), end, 0.0)), limit)

        ends = (
            push(bounds.lower, torch.where(rising, least, most)),
            push(bounds.upper, torch.where(rising, most, least)),
        )
        bounds = Bounds(torch.where(rising, *ends), torch.where(rising, ends[1], ends[0]))
    return bounds
