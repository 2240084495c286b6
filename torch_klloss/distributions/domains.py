"""Domains of parameters. Outside of them, which a distribution built without validation may be, there is no KL."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Uniform, constraints

from torch_klloss.numerics.devices import can_be_read
from torch_klloss.numerics.tracing import constant_in_graphs, is_traced
from torch_klloss.numerics.versions import may_be_changed

# What the relaxed families do not declare, and a Wishart not as a class.
_UNDECLARED = {"temperature": constraints.positive, "scale_tril": constraints.lower_cholesky}
_NAMES: dict[type[Distribution], tuple[str, ...]] = {}
_KNOWN: dict[type[Distribution], tuple[_Domain, ...]] = {}


class _Domain(NamedTuple):
    """The closed interval that the entries of a parameter lie in, or those on the diagonal of a matrix."""

    name: str
    low: float
    high: float
    event_dims: int
    is_matrix: bool


def where_outside(q: Distribution, p: Distribution) -> Tensor | None:
    """Return where q or p has a parameter outside of its domain; None for nowhere.

    The mask has a shape that broadcasts to the batch. A scale of 0 counts as inside, and so does NaN. What the
    constructor has validated is looked at again only if it was written to in place at some time.
    """
    looks_back = not is_traced()  # at what has been written to, which no graph may ask
    of_q, of_p = _where_outside(q, looks_back), _where_outside(p, looks_back)
    return of_p if of_q is None else of_q if of_p is None else of_q | of_p


def nan_outside(value: Tensor, q: Distribution, p: Distribution) -> Tensor:
    """Return the KL of q and p, NaN where a parameter lies outside of its domain."""
    outside = where_outside(q, p)
    return value if outside is None else torch.where(outside.to(value.device), math.nan, value)


@constant_in_graphs
def domains_of(cls: type[Distribution]) -> tuple[_Domain, ...]:
    """Return the domains that a class declares for its parameters, or its parents for theirs."""
    if cls not in _KNOWN:
        declared: dict[str, Any] = dict(_UNDECLARED)
        for parent in reversed(cls.__mro__):  # Chi2 holds the parameters of a Gamma
            own = parent.__dict__.get("arg_constraints")
            declared |= own if isinstance(own, dict) else {}
        found = (_domain(name, constraint) for name, constraint in declared.items())
        _KNOWN[cls] = tuple(domain for domain in found if domain is not None)
    return _KNOWN[cls]


def _domain(name: str, constraint: Any) -> _Domain | None:
    """Return the interval that a constraint keeps a parameter in; None where it keeps it in none."""
    if constraints.is_dependent(constraint):
        return None
    event_dims: int = constraint.event_dim
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    if constraint is constraints.lower_cholesky:
        return _Domain(name, 0.0, math.inf, event_dims, is_matrix=True)
    if constraint is constraints.simplex:
        return _Domain(name, 0.0, 1.0, event_dims, is_matrix=False)
    low, high = getattr(constraint, "lower_bound", -math.inf), getattr(constraint, "upper_bound", math.inf)
    return None if low == -high == -math.inf else _Domain(name, float(low), float(high), event_dims, is_matrix=False)


def _where_outside(d: Distribution, looks_back: bool) -> Tensor | None:
    held = d.__dict__
    if d._validate_args and _is_as_validated(d, looks_back):
        return None
    own = [domain for domain in domains_of(type(d)) if isinstance(held.get(domain.name), Tensor)]
    if own or isinstance(d, Uniform):
        return _any_of([_beyond(held[each.name], each) for each in own] + [_reversed(d)])
    parts = [part for part in held.values() if isinstance(part, Distribution)]
    return _any_of([_in_batch_of(d, part, _where_outside(part, looks_back)) for part in parts])


def _is_as_validated(d: Distribution, looks_back: bool) -> bool:
    """Return whether d has parameters of its own, and none was written to after the constructor had looked at it."""
    held, is_found = d.__dict__, False
    for name in _bounded_names(type(d)):  # every loss runs this
        value = held.get(name)
        if isinstance(value, Tensor):
            if looks_back and may_be_changed(value):
                return False
            is_found = True
    return is_found


@constant_in_graphs
def _bounded_names(cls: type[Distribution]) -> tuple[str, ...]:
    """Return the names of the parameters that a class keeps within bounds."""
    if cls not in _NAMES:
        own = tuple(domain.name for domain in domains_of(cls))
        _NAMES[cls] = ("low", "high") if issubclass(cls, Uniform) else own
    return _NAMES[cls]


def _beyond(x: Tensor, domain: _Domain) -> Tensor | None:
    """Return where an entry lies outside of its interval, `[*batch]`; None for nowhere, where that can be read."""
    if domain.is_matrix:
        x = x.diagonal(dim1=-2, dim2=-1)
    if can_be_read(x):
        above = domain.low == -math.inf or x.numel() == 0 or x.amin().item() >= domain.low
        if above and (domain.high == math.inf or x.numel() == 0 or x.amax().item() <= domain.high):
            return None
    outside = (x < domain.low) | (x > domain.high) if domain.high < math.inf else x < domain.low
    event_dims = domain.event_dims - domain.is_matrix
    return outside.flatten(-event_dims).any(-1) if event_dims else outside


def _reversed(d: Distribution) -> Tensor | None:
    return d.high < d.low if isinstance(d, Uniform) else None


def _in_batch_of(d: Distribution, part: Distribution, outside: Tensor | None) -> Tensor | None:
    """Return for the batch of d where one of its part is outside; further batch dimensions of a part are d's event."""
    extra = len(part.batch_shape) - len(d.batch_shape)
    if outside is None or extra <= 0:
        return outside
    return outside.expand(part.batch_shape).flatten(-extra).any(-1)


def _any_of(masks: list[Tensor | None]) -> Tensor | None:
    found = [mask for mask in masks if mask is not None]
    return None if not found else found[0] if len(found) == 1 else torch.stack(torch.broadcast_tensors(*found)).any(0)
