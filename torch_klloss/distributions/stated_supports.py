"""Supports as the classes of distributions state them, and whether they are to be believed."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, TransformedDistribution, constraints

from torch_klloss.distributions.tensors import device_of, unvalidated
from torch_klloss.numerics.tracing import is_traced
from torch_klloss.rng import private_rng

_NUM_DRAWS = 2**14  # numbers, over the whole batch
_OWN = ("torch.distributions.", "torch_klloss.")
_UNBOUNDED = (constraints.real, constraints.dependent)


def support_of(d: Distribution) -> constraints.Constraint | None:
    """Return d's support, or None if the class does not declare one or it cannot be read."""
    try:
        support: Any = d.support
    except Exception:  # other people's classes compute it, and fail in ways of their own
        return None
    return support if isinstance(support, constraints.Constraint) else None


def is_discrete(d: Distribution) -> bool | None:
    """Return whether d is discrete; None if its support is not declared."""
    if isinstance(d, TransformedDistribution):  # torch declares the whole line for shifted counts
        return is_discrete(d.base_dist)
    support = support_of(d)
    return None if support is None else bool(innermost(support).is_discrete)


def innermost(support: constraints.Constraint) -> Any:
    """Return the constraint inside of those that only rearrange dimensions: independent(...), and a mixture's."""
    while (base := getattr(support, "base_constraint", None)) is not None:
        support = base
    return support


def is_of_torch(d: Distribution) -> bool:
    """Return whether support and density of d, and of its parts, are those of a class of torch or of this library."""
    held = vars(d)
    cls: Any = type(d)
    if not _is_class_of_torch(cls) or "support" in held or "log_prob" in held:
        return False
    parts = (held.get(name) for name in ("base_dist", "component_distribution", "_component_distribution"))
    return all(is_of_torch(part) for part in parts if isinstance(part, Distribution))


@cache
def _is_class_of_torch(cls: type) -> bool:
    stated = (next(parent for parent in cls.__mro__ if name in vars(parent)) for name in ("support", "log_prob"))
    return all(parent.__module__.startswith(_OWN) for parent in stated)


def believed_support(d: Distribution) -> constraints.Constraint | None:
    """Return d's support; None if it is not known, or a class of another library states one that its draws leave.

    An example is a truncated Normal that states the support of the standardised variable.
    """
    support = support_of(d)
    if support is None or innermost(support) in _UNBOUNDED or is_of_torch(d):
        return support
    missing = len(d.event_shape) - support.event_dim
    if missing < 0:
        return None
    support = constraints.independent(support, missing) if missing else support
    draws = None if is_discrete(d) else some_draws(d)
    return None if draws is not None and not _holds(support, draws) else support


def some_draws(d: Distribution) -> Tensor | None:
    """Return draws `[n, *batch, *event]` that change no random stream of the caller; None if d cannot be drawn from."""
    if is_traced():
        return None
    number = max(1, _NUM_DRAWS // max(1, (d.batch_shape + d.event_shape).numel()))
    device = device_of(d)
    if device.type == "meta":
        return None
    try:
        with torch.no_grad(), private_rng(0, device):
            draws = unvalidated(d).sample(torch.Size((number,)))
    except Exception:  # other people's classes fail in ways of their own
        return None
    return draws if isinstance(draws, Tensor) and draws.numel() else None


def _holds(support: constraints.Constraint, draws: Tensor) -> bool:
    """Return whether the draws lie in a support, or on its border, which rounding may reach."""
    inner: Any = innermost(support)
    lower, upper = getattr(inner, "lower_bound", None), getattr(inner, "upper_bound", None)
    if lower is None and upper is None:
        return bool(support.check(draws).all())
    inside = torch.ones_like(draws, dtype=torch.bool) if lower is None else ~(draws < lower)
    return bool((inside if upper is None else inside & ~(draws > upper)).all())
