"""Surfaces without volume that carry all the mass of a distribution, such as the simplex."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.distributions import (
    Distribution,
    Independent,
    MixtureSameFamily,
    TransformedDistribution,
    constraints,
)
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical

from torch_klloss.distributions.stated_supports import believed_support, innermost, is_discrete, is_of_torch
from torch_klloss.numerics.tracing import is_traced

_TRIANGLES = {
    constraints.lower_cholesky: "lower",
    constraints.lower_triangular: "lower",
    constraints.positive_definite: "symmetric",
    constraints.positive_semidefinite: "symmetric",
    constraints.symmetric: "symmetric",
}


class _Manifold(NamedTuple):
    """A surface: how many coordinates of an event the others determine, and which one it is, if that is known."""

    codimension: int
    name: object = None


def are_singular(q: Distribution, p: Distribution) -> bool:
    """Return whether the masses of q and p are known to lie on surfaces that meet in none of it: the KL is infinite."""
    inner, outer = _manifold(q), _manifold(p)
    if inner.codimension != outer.codimension:
        return True
    return None not in (inner.name, outer.name) and inner.name != outer.name


def _manifold(d: Distribution) -> _Manifold:
    """Return the surface that d's mass lies on; of codimension 0 if it fills the space, or d is discrete."""
    if is_discrete(d) or (not d.event_shape and is_of_torch(d)):
        return _Manifold(0)
    numel = d.event_shape.numel()
    if isinstance(d, (Independent, MixtureSameFamily)):
        inner = d.base_dist if isinstance(d, Independent) else d.component_distribution
        part = _manifold(inner)
        return part._replace(codimension=part.codimension * (numel // max(1, inner.event_shape.numel())))
    if _is_point(d):
        return _Manifold(numel)
    if isinstance(d, ExpRelaxedCategorical):
        return _Manifold(1, "log-simplex")
    support = believed_support(d)
    constraint: Any = None if support is None else innermost(support)
    codimension = _num_bound(constraint, d.event_shape) if d.event_shape else 0
    if codimension:
        return _Manifold(codimension, _TRIANGLES.get(constraint, constraint))
    if isinstance(d, TransformedDistribution) and all(t.bijective for t in d.transforms):
        base = d.base_dist
        return _Manifold(max(0, numel - base.event_shape.numel() + _manifold(base).codimension))
    return _Manifold(0)


def _num_bound(constraint: Any, event_shape: torch.Size) -> int:
    """Return how many coordinates of an event the others determine by a constraint: one for every simplex in it."""
    n, numel = event_shape[-1], event_shape.numel()
    if constraint is constraints.simplex:
        return numel // n
    if constraint is constraints.corr_cholesky:
        return numel // (n * n) * (n * (n + 1) // 2)
    return numel // (n * n) * (n * (n - 1) // 2) if constraint in _TRIANGLES else 0


def _is_point(d: Distribution) -> bool:
    """Return whether all mass lies on one point, as with a Delta; only classes of other libraries can be like that."""
    if is_of_torch(d) or is_traced():
        return False
    try:
        variance = torch.as_tensor(d.variance)
    except Exception:  # other people's classes fail in ways of their own
        return False
    return variance.device.type != "meta" and variance.numel() > 0 and bool((variance == 0).all())
