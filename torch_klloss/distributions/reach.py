"""Parameters behind a distribution that are none of its tensors, such as the weights of a network in a flow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.distributions.densities import log_density_within
from torch_klloss.distributions.located import Located
from torch_klloss.distributions.tensors import copy_with, device_of, is_transparent, log_prob_of_a_draw, tensors_of
from torch_klloss.numerics.graph import Edge, edge_of, edges_below, leaves_of
from torch_klloss.numerics.tracing import is_traced
from torch_klloss.rng import private_rng


def has_hidden_parameters(d: Distribution) -> bool:
    """Return whether log d has a gradient to something that is no tensor of d.

    A copy of d with other tensors shares these parameters with d. True also where that cannot be found out: while
    tracing, and for a class that is unknown and has no `sample`.
    """
    if is_transparent(d):
        return False
    if is_traced():
        return True
    try:
        return _log_prob_of_fixed(d).requires_grad
    except NotImplementedError:
        return True


def hidden_parameters(d: Distribution) -> list[Tensor]:
    """Return the leaves that are no tensors of d and that log d has a gradient to; none where that is unknown."""
    if is_transparent(d) or is_traced():
        return []
    with suppress(NotImplementedError):
        return list(leaves_of(_log_prob_of_fixed(d)))
    return []


def _log_prob_of_fixed(d: Distribution) -> Tensor:
    """Return log d at a draw, with a gradient to what is no tensor of d alone."""
    with torch.enable_grad():
        return log_prob_of_a_draw(copy_with(d, lambda t, *_: t.detach()))


def log_density_with_fixed_parameters(d: Distribution, x: Located, shape: torch.Size) -> Tensor:
    """Return log d(x), `[*sample, *batch]`, with a gradient to x alone.

    Args:
        d: the distribution, unvalidated.
        x: points within its support, without an origin.
        shape: of the result.
    """
    if is_transparent(d):
        return log_density_within(copy_with(d, lambda t, *_: t.detach()), x, shape)
    by_parameters = log_density_within(d, x.detach(), shape)
    return log_density_within(d, x, shape) - (by_parameters - by_parameters.detach())


def check_dropped(value: Tensor, keep: Tensor, *distributions: Distribution) -> None:
    """Raise a ValueError if NaN in a dropped example would reach the gradient of a hidden parameter.

    `replace_examples` replaces the tensors of dropped examples, and not what a network of the distribution was given.

    Args:
        value: the KL, `[*example, …]`.
        keep: bool, `[*example]`.
        distributions: what it was computed from, after `replace_examples`.
    """
    unknown = [d for d in distributions if not is_transparent(d)]
    if not unknown or not value.requires_grad or is_traced():
        return
    if value.detach()[~keep.expand(value.shape[: keep.dim()])].isnan().any():
        names = " and ".join(type(d).__name__ for d in unknown)
        raise ValueError(
            f"the masked examples must have numbers inside of {names}, got NaN, which would reach the gradient of "
            "every weight of a network in it: replace what it is given for them, as by "
            "torch.where(mask.unsqueeze(-1), context, 0.0), before you build the distribution."
        )


def has_path(d: Distribution, x: Tensor, log_prob: Tensor) -> bool:
    """Return whether every parameter of d that log d depends on moves the draw x.

    A class may promise `has_rsample` and return draws without a gradient, or with a gradient to some parameters alone.
    Under tracing a gradient to any of them counts.

    Args:
        d: the distribution.
        x: a draw by `rsample`.
        log_prob: log d(x).
    """
    if is_transparent(d) or not log_prob.requires_grad:
        return True
    if is_traced() or not x.requires_grad:
        return x.requires_grad
    if not _all_moved(x, log_prob, {edge_of(t): edge_of(t) for t in tensors_of(d) if t.requires_grad}):
        return False
    return all(part.has_rsample for part in _parts_of(d)) or _parts_have_paths(d)


def _parts_of(part: Any) -> Iterator[Distribution]:
    """Yield the distributions that a distribution is made of."""
    values = part if isinstance(part, (list, tuple)) else vars(part).values()
    for value in values:
        if isinstance(value, Distribution):
            yield value
        if isinstance(value, (Distribution, list, tuple)) and not isinstance(value, torch.Size):
            yield from _parts_of(value)


def _parts_have_paths(d: Distribution) -> bool:
    """Return whether every part is moved by its own tensors, at a draw of a copy in which no two parts share one."""
    own: dict[Edge, Edge] = {}

    def alias(t: Tensor, *_: Any) -> Tensor:
        if not t.requires_grad:
            return t
        copy = t.view_as(t)
        own[edge_of(copy)] = edge_of(t)
        return copy

    with torch.enable_grad(), private_rng(0, device_of(d)):
        copy = copy_with(d, alias)
        x = copy.rsample()
    return _all_moved(x, copy.log_prob(x), own)


def _all_moved(x: Tensor, log_prob: Tensor, own: dict[Edge, Edge]) -> bool:
    """Return whether all parameters of log d move x.

    Args:
        x: the draw, which requires a gradient.
        log_prob: log d(x).
        own: for every tensor of the distribution, the edge that it is used by, and that of the tensor.
    """
    moving, tensors = edges_below(edge_of(x), until=own), set(own.values())
    moved = moving | {own[edge] for edge in moving if edge in own}

    def is_moved(edge: Edge) -> bool:
        """Return whether an edge is no parameter, or was computed from such as move x, as a scale_tril may be."""
        edge = own.get(edge, edge)
        if edge not in tensors or not edge[0].next_functions:
            return edge not in tensors and not hasattr(edge[0], "variable")
        return all(below in moved or is_moved(below) for below in edges_below(edge, until=tensors))

    # Below an edge that moves the draw, all do.
    return all(is_moved(edge) for edge in edges_below(edge_of(log_prob), until=own.keys() | moving) - moving)
