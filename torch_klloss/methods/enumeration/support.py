"""The points of a finite support."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    Multinomial,
    OneHotCategorical,
    TransformedDistribution,
)

from torch_klloss.distributions.stated_supports import is_discrete
from torch_klloss.distributions.supports import bounds_of
from torch_klloss.distributions.tensors import device_of
from torch_klloss.numerics.tracing import concrete, is_traced


def support_points(d: Distribution, limit: int) -> Tensor | None:
    """Return all points to which d may give mass, in float64; it may give none to some of them.

    A batch whose supports differ shares the largest of them.

    Args:
        d: a distribution, `[*batch, *event]`.
        limit: the largest number of points that is listed.

    Returns:
        `[n, *(1, …), *event]`, broadcasting to the batch; None if the support is infinite, cannot be listed, or has
        more points.
    """
    points = _points(d, limit)
    return None if points is None else align(points, len(d.batch_shape) + len(d.event_shape))


def align(x: Tensor, dims: int) -> Tensor:
    """Return x `[n, …]` with ones after its first dimension, so that `dims` dimensions follow the first."""
    return x.reshape(x.shape[:1] + (1,) * (dims + 1 - x.dim()) + x.shape[1:])


def _points(d: Distribution, limit: int) -> Tensor | None:
    """Return the points `[n, *event]`, with the batch dimensions in between only if they differ along the batch."""
    if is_discrete(d) is not True:
        return None
    if isinstance(d, Independent):
        return _product(d, limit)
    if isinstance(d, MixtureSameFamily):
        points = _points(d.component_distribution, limit)
        return None if points is None or points.dim() > 1 + len(d.event_shape) else points
    if isinstance(d, TransformedDistribution):
        return _transformed(d, limit)
    if isinstance(d, Binomial) and torch.compiler.is_compiling():
        return None  # the number of points is a value
    size = _size(d)
    if size is None:
        return _enumerated(d, limit)
    if size > limit:
        return None
    options: Any = {"dtype": torch.float64, "device": device_of(d)}
    if isinstance(d, OneHotCategorical):
        return torch.eye(size, **options)
    if isinstance(d, Multinomial):
        return torch.tensor(_compositions(d.total_count, d.event_shape[0]), **options)
    return torch.arange(size, **options)


def _size(d: Distribution) -> int | None:
    """Return the number of points; None for a family that is not known here."""
    if isinstance(d, Bernoulli):
        return 2
    if isinstance(d, Categorical):
        return d.param_shape[-1]
    if isinstance(d, OneHotCategorical):
        return d.event_shape[0]
    if isinstance(d, Multinomial):
        return math.comb(d.total_count + d.event_shape[0] - 1, d.total_count)
    if isinstance(d, Binomial) and not d.total_count.is_meta:
        return int(concrete(d.total_count).max()) + 1 if d.total_count.numel() else 1
    return None


def _compositions(total: int, parts: int) -> list[list[int]]:
    """Return every way to write `total` as an ordered sum of `parts` counts: bars between stars."""
    ends = itertools.combinations(range(total + parts - 1), parts - 1)
    return [[b - a - 1 for a, b in itertools.pairwise((-1, *bars, total + parts - 1))] for bars in ends]


def _product(d: Independent, limit: int) -> Tensor | None:
    """Return every combination of the points of the factors."""
    shape = d.base_dist.batch_shape[len(d.base_dist.batch_shape) - d.reinterpreted_batch_ndims :]
    factors = shape.numel()
    points = _points(d.base_dist, limit)
    event_dims = len(d.base_dist.event_shape)
    if points is None or points.dim() != 1 + event_dims or len(points) ** factors > limit:
        return None
    index = torch.arange(len(points) ** factors, device=points.device).unsqueeze(-1)
    digits = index // len(points) ** torch.arange(factors, device=points.device) % len(points)
    return points[digits].reshape(-1, *shape, *points.shape[1:])


def _transformed(d: TransformedDistribution, limit: int) -> Tensor | None:
    points = support_points(d.base_dist, limit)
    if points is None or not all(transform.bijective for transform in d.transforms):
        return None
    for transform in d.transforms:
        points = transform(points)
    return points


def _enumerated(d: Distribution, limit: int) -> Tensor | None:
    """Return what `enumerate_support` lists; None if its ends are too far apart, or it lists too many points."""
    bounds = bounds_of(d)
    if not d.has_enumerate_support or (bounds is not None and _exceeds(bounds.lower, bounds.upper, limit)):
        return None
    try:
        points = d.enumerate_support(expand=False)
    except (NotImplementedError, RuntimeError):
        return None
    points = points.to(torch.float64).reshape(len(points), *d.event_shape)
    return points if len(points) <= limit else None


def _exceeds(lower: Any, upper: Any, limit: int) -> bool:
    lower, upper = torch.as_tensor(lower), torch.as_tensor(upper)
    if is_traced() or lower.is_meta or upper.is_meta or 0 in (lower.numel(), upper.numel()):
        return False
    return bool((upper - lower).max() >= limit)
