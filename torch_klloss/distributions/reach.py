"""Parameters behind a distribution that are none of its tensors, such as the weights of a network in a flow."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.distributions.tensors import copy_with, is_transparent, log_prob_of_a_draw, tensors_of
from torch_klloss.numerics.graph import Edge, edge_of, edges_below
from torch_klloss.numerics.tracing import is_traced


def has_hidden_parameters(d: Distribution) -> bool:
    """Return whether log d has a gradient to something that is no tensor of d.

    A copy of d with other tensors shares these parameters with d. True also where that cannot be found out: while
    tracing, and for a class that is unknown and has no `sample`.
    """
    if is_transparent(d):
        return False
    if is_traced():
        return True
    fixed = copy_with(d, lambda t, *_: t.detach())
    try:
        with torch.enable_grad():
            return log_prob_of_a_draw(fixed).requires_grad
    except NotImplementedError:
        return True


def log_prob_with_fixed_parameters(d: Distribution, x: Tensor) -> Tensor:
    """Return log d(x), `[*sample, *batch]`, with a gradient to x alone."""
    if is_transparent(d):
        return copy_with(d, lambda t, *_: t.detach()).log_prob(x)
    by_parameters = d.log_prob(x.detach())
    return d.log_prob(x) - (by_parameters - by_parameters.detach())


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
    own = {edge_of(t) for t in tensors_of(d) if t.requires_grad}
    moving = edges_below(edge_of(x), until=own)
    return all(_is_moved(edge, own, moving) for edge in edges_below(edge_of(log_prob), until=own) - moving)


def _is_moved(edge: Edge, own: set[Edge], moving: set[Edge]) -> bool:
    """Return whether an edge is no parameter, or was computed from such as move the draw, as a scale_tril may be."""
    if edge in own and edge[0].next_functions:
        return all(_is_moved(below, own, moving) for below in edges_below(edge, until=own) - moving)
    return edge not in own and not hasattr(edge[0], "variable")
