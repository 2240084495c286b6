"""Leaf tensors by which a pair of distributions is differentiated."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MixtureSameFamily, TransformedDistribution, constraints

from torch_klloss.distributions.tensors import copy_with
from torch_klloss.numerics.graph import leaves_of


def with_leaves(q: Distribution, p: Distribution) -> tuple[Distribution, Distribution, dict[str, Tensor]]:
    """Return the pair with the leaf tensors that it is differentiated by, by name.

    They are the leaves behind q and p that require a gradient. If there are none, q and p are built again, with leaves
    for the parameters in `arg_constraints`. Matrices stay as they are, because their entries are constrained.

    Raises:
        ValueError: if no leaf requires a gradient, and a class cannot be built from its `arg_constraints` alone.
    """
    leaves: dict[str, Tensor] = {}
    for which, d in (("q", q), ("p", p)):
        copy_with(d, partial(_enter_graph_leaves, leaves, which))
    if leaves:
        return q, p, leaves
    return _learned(q, "q", leaves), _learned(p, "p", leaves), leaves


def _enter_graph_leaves(leaves: dict[str, Tensor], which: str, t: Tensor, key: str, owner: Distribution) -> Tensor:
    """Enter the leaves that t was computed from, by the name of t."""
    for leaf in leaves_of(t):
        if not any(leaf is known for known in leaves.values()):
            leaves[_unused(f"{which}.{key}", leaves)] = leaf
    return t


def _learned(d: Distribution, which: str, leaves: dict[str, Tensor]) -> Distribution:
    """Return d built again from new leaves, which are entered by name."""
    if type(d) is Independent:
        return Independent(_learned(d.base_dist, which, leaves), d.reinterpreted_batch_ndims)
    if type(d) is TransformedDistribution:
        return TransformedDistribution(_learned(d.base_dist, which, leaves), d.transforms)
    if type(d) is MixtureSameFamily:
        weights: Any = _learned(d.mixture_distribution, which, leaves)
        return MixtureSameFamily(weights, _learned(d.component_distribution, which, leaves))
    arguments: dict[str, Any] = {key: getattr(d, key) for key in _given(d)}
    for key, value in arguments.items():
        if _is_free(d.arg_constraints[key]) and key != "total_count":
            leaf = leaves[_unused(f"{which}.{key}", leaves)] = value.detach().clone().requires_grad_()
            arguments[key] = leaf
    cls: Any = type(d)
    try:
        return cls(**arguments) if arguments else d
    except TypeError as error:
        raise ValueError(
            f"{cls.__name__} takes more than {', '.join(arguments)} or less; build the pair from tensors with "
            "requires_grad=True."
        ) from error


def _given(d: Distribution) -> list[str]:
    """Return the names of the parameters; of alternatives, the one that d was built from."""
    names = list(d.arg_constraints)
    for alternatives in _ALTERNATIVES:
        # torch computes the others on demand, and stores them after the first.
        held = [key for key in vars(d) if key in alternatives] or [key for key in names if key in alternatives]
        names = [key for key in names if key not in alternatives or key == held[0]]
    return names


_ALTERNATIVES = ({"probs", "logits"}, {"covariance_matrix", "precision_matrix", "scale_tril"})


def _is_free(constraint: Any) -> bool:
    """Return whether numbers or vectors under the constraint may change in every direction, up to normalisation."""
    is_vector = constraint is constraints.simplex or isinstance(constraint, constraints.independent)
    return not constraint.is_discrete and (constraint.event_dim == 0 or is_vector)


def _unused(title: str, titles: Iterable[str]) -> str:
    """Return the title, numbered if it is taken."""
    number = sum(title in (each, each.partition(" (")[0]) for each in titles)
    return f"{title} ({number + 1})" if number else title


def derivatives(value: Tensor, leaves: Iterable[Tensor]) -> list[Tensor]:
    """Return the gradients of the sum, in float64; 0 for a leaf that it does not depend on."""
    leaves = list(leaves)
    if not value.requires_grad:
        return [torch.zeros_like(leaf).double() for leaf in leaves]
    found = torch.autograd.grad(value.sum(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
    return [grad.detach().double() for grad in found]
