"""Chains of transforms: their parts, their equality, and whether they can be undone."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.distributions import (
    AffineTransform,
    CatTransform,
    ComposeTransform,
    CorrCholeskyTransform,
    CumulativeDistributionTransform,
    Distribution,
    IndependentTransform,
    PowerTransform,
    ReshapeTransform,
    StackTransform,
    Transform,
)
from torch.distributions.transforms import _InverseTransform

from torch_klloss.distributions.supports import bounds_of
from torch_klloss.numerics.tracing import is_traced


def parts_of(transforms: list[Transform]) -> list[Transform]:
    """Return the transforms in a flat list, with the parts of every `ComposeTransform` and its inverse."""
    parts: list[Transform] = []
    for t in transforms:
        if isinstance(t, ComposeTransform):
            parts += parts_of(t.parts)
        elif isinstance(t, _InverseTransform) and isinstance(t.inv, ComposeTransform):
            parts += parts_of([part.inv for part in reversed(t.inv.parts)])
        elif isinstance(t, IndependentTransform) and isinstance(t.base_transform, ComposeTransform):
            dims = t.reinterpreted_batch_ndims
            parts += parts_of([IndependentTransform(part, dims) for part in t.base_transform.parts])
        else:
            parts.append(t)
    return parts


def elementwise(t: Transform) -> Transform | None:
    """Return the map of single numbers that t applies to each; None if t mixes them."""
    if isinstance(t, IndependentTransform):
        return elementwise(t.base_transform)
    if isinstance(t, _InverseTransform):
        inverse = elementwise(t.inv)
        return None if inverse is None else t if inverse is t.inv else inverse.inv
    if isinstance(t, AffineTransform) and t.event_dim > 0:
        return AffineTransform(t.loc, t.scale)
    return t if t.domain.event_dim == t.codomain.event_dim == 0 else None


def is_injective(t: Transform, d: Distribution) -> bool:
    """Return whether t maps different points of d to different points.

    Bijective transforms do, on their domain: a power does on the positive numbers only, and torch clamps the logit's
    argument to the unit interval.
    """
    if not t.bijective:
        return False
    if isinstance(t, (CatTransform, StackTransform)):
        return all(is_injective(part, d) for part in t.transforms)
    least, most = getattr(t.domain, "lower_bound", -math.inf), getattr(t.domain, "upper_bound", math.inf)
    if least == -math.inf and most == math.inf:
        return True
    bounds = bounds_of(d)
    if bounds is None:
        return not isinstance(t, PowerTransform)
    is_within = (bounds.lower >= least) & (bounds.upper <= most)
    if isinstance(is_within, Tensor):
        return is_traced() or bool(is_within.all())
    return is_within


def are_equal(t: Any, u: Any) -> bool:
    """Return whether two transforms will always be the same map; learned ones are only if they are one object."""
    if t is u:
        return True
    if type(t) is not type(u):
        return False
    if isinstance(t, ReshapeTransform):
        return bool(t.in_shape == u.in_shape and t.out_shape == u.out_shape)
    if isinstance(t, CorrCholeskyTransform):
        return True
    if isinstance(t, CumulativeDistributionTransform):
        return _are_same_family(t.distribution, u.distribution)
    if isinstance(t, (CatTransform, StackTransform)):
        lengths = getattr(t, "lengths", None) == getattr(u, "lengths", None)
        return lengths and t.dim == u.dim and _are_all_equal(t.transforms, u.transforms)
    if isinstance(t, ComposeTransform):
        return _are_all_equal(t.parts, u.parts)
    if isinstance(t, _InverseTransform):
        return are_equal(t.inv, u.inv)
    if isinstance(t, IndependentTransform):
        return t.reinterpreted_batch_ndims == u.reinterpreted_batch_ndims and are_equal(
            t.base_transform, u.base_transform
        )
    if isinstance(t, AffineTransform):
        return bool(t.event_dim == u.event_dim) and is_same(t.loc, u.loc) and is_same(t.scale, u.scale)
    if isinstance(t, PowerTransform):
        return is_same(t.exponent, u.exponent)
    return bool(t == u)


def _are_all_equal(ts: list[Transform], us: list[Transform]) -> bool:
    return len(ts) == len(us) and all(map(are_equal, ts, us))


def _are_same_family(d: Distribution, e: Distribution) -> bool:
    """Return whether two distributions are of one family of torch, and their parameters will always be equal."""
    names = d.arg_constraints
    if type(d) is not type(e) or not type(d).__module__.startswith("torch.distributions.") or not names:
        return d is e
    return all(is_same(getattr(d, name), getattr(e, name)) for name in names)


def is_same(a: Tensor | float, b: Tensor | float) -> bool:
    """Return whether two parameters will always be equal; False if they are learned, or not known under tracing."""
    if a is b:
        return True
    if not (isinstance(a, Tensor) or isinstance(b, Tensor)):
        return a == b
    unknown = any(isinstance(x, Tensor) and (x.requires_grad or x.is_meta) for x in (a, b))  # learned, or no values
    return not unknown and not is_traced() and bool((a == b).all())  # type: ignore[union-attr]
