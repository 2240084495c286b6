"""Batch dimensions of distributions: expanded, inserted or flattened, and elements of them selected or replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.distributions.tensors import NotSelectableError, copy_with, unvalidated_if_changed
from torch_klloss.numerics.devices import can_be_read
from torch_klloss.numerics.graph import with_gradient_if

D = TypeVar("D", bound=Distribution)


def expand_to(d: Distribution, batch_shape: torch.Size) -> Distribution:
    """Return d with the batch shape; d itself if it has that shape.

    Raises:
        NotImplementedError: if d's class has no `expand`.
    """
    if d.batch_shape == batch_shape:
        return d
    try:
        return d.expand(batch_shape)
    except NotImplementedError:
        raise NotImplementedError(
            f"{type(d).__name__} has no expand, which is needed to go from its batch shape {tuple(d.batch_shape)} to "
            f"{tuple(batch_shape)}: define expand(batch_shape), or build it with that batch shape."
        ) from None


def replace_examples(d: Distribution, keep: Tensor, batch_shape: torch.Size) -> Distribution:
    """Return d with the parameters of every example that `keep` drops replaced by the parameters of a kept one.

    The parameters of a dropped example, even NaN, then reach neither a value nor a gradient; 0 · NaN would, even if the
    value is masked afterwards. Where the host cannot see that none is kept, all of them stay, without a gradient.

    Args:
        d: a distribution; one that has no example dimensions of its own comes back as it is.
        keep: bool, `[*example]`, the leading dimensions of `batch_shape`.
        batch_shape: the batch shape of the pair that d belongs to.
    """
    examples, dims = keep.shape, keep.dim()
    if dims == 0 or len(d.batch_shape) != len(batch_shape) or _are_shared(d.batch_shape[:dims]):
        return d
    if d.batch_shape[:dims] != examples:
        d = expand_to(d, batch_shape)
    flat = keep.flatten()
    index = torch.where(flat, torch.arange(flat.numel(), device=flat.device), flat.int().argmax())
    any_kept = None if can_be_read(flat) else flat.any()

    def take(t: Tensor, name: str, owner: Distribution) -> Tensor:
        if len(owner.batch_shape) < len(batch_shape):  # a distribution within a transform, which broadcasts
            return t
        if t.dim() < len(owner.batch_shape) + _event_dims(t, name, owner) or _are_shared(t.shape[:dims]):
            return t
        t = t.expand(examples + t.shape[dims:])
        t = t.flatten(0, dims - 1).index_select(0, index.to(t.device)).unflatten(0, examples)
        return t if any_kept is None else with_gradient_if(any_kept, t)

    return copy_with(d, take, unvalidated_if_changed)


def _are_shared(sizes: torch.Size) -> bool:
    """Return whether dimensions of these sizes are the same for all examples."""
    return all(size == 1 for size in sizes)


def _event_dims(t: Tensor, name: str, owner: Distribution) -> int:
    """Return how many of the last dimensions of a tensor belong to an event; the ones before them are batch dimensions.

    Args:
        t: the tensor.
        name: its name.
        owner: the distribution that holds it, itself or in a transform.
    """
    if owner.__dict__.get(name) is not t:  # a transform's, which broadcasts against the points
        return len(owner.event_shape)
    if name.endswith("_tril"):  # torch stores Cholesky factors that are no argument of the constructor
        return 2
    constraint = owner.arg_constraints.get(name.removeprefix("_unbroadcasted_"))
    return getattr(constraint, "event_dim", max(0, t.dim() - len(owner.batch_shape)))


def flattened(d: Distribution, batch_shape: torch.Size) -> Distribution:
    """Return d, broadcast to the batch shape, with a single batch dimension.

    Raises:
        NotSelectableError: if d has a part with unknown batch dimensions, such as a network.
    """
    try:
        d = expand_to(d, batch_shape)
    except NotImplementedError:
        raise NotSelectableError from None
    dims, count = len(batch_shape), batch_shape.numel()

    def flat(t: Tensor, _: str, owner: Distribution) -> Tensor:
        own = owner.batch_shape
        event = t.shape[len(own) :]
        # A distribution within a transform broadcasts against the points.
        t = _broadcast(t, own) if own[:dims] == batch_shape else _expanded(t, batch_shape + event)
        return t.flatten(0, dims - 1) if dims else t[None]

    return copy_with(d, flat, _batch_replaced(dims, count), known_only=True)


def select(d: Distribution, index: Tensor, leaves: list[tuple[Tensor, Tensor]] | None = None) -> Distribution:
    """Return the elements of a distribution with a single batch dimension, as `flattened` made it.

    Args:
        d: the distribution.
        index: the elements.
        leaves: if given, the selection from every tensor that requires a gradient is a new leaf, and the tensor and
            this leaf are appended.
    """

    def take(t: Tensor, *_: Any) -> Tensor:
        if leaves is None or not t.requires_grad:
            return t[index]
        leaves.append((t, t.detach()[index].requires_grad_()))
        return leaves[-1][1]

    return copy_with(d, take, _batch_replaced(1, len(index)))


def _batch_replaced(dims: int, count: int) -> Callable[[Distribution], dict[str, Any]]:
    """Return the attributes of a copy whose first `dims` batch dimensions have become one of `count` elements."""
    return lambda owner: {"_batch_shape": torch.Size([count]) + owner.batch_shape[dims:]}


def _broadcast(t: Tensor, batch_shape: torch.Size) -> Tensor:
    """Return t expanded to all batch dimensions, in front of its other ones."""
    return _expanded(t, batch_shape + t.shape[len(batch_shape) :])


def _expanded(t: Tensor, shape: torch.Size) -> Tensor:
    try:
        return t.expand(shape)
    except RuntimeError:
        raise NotSelectableError from None


def with_batch_dim(d: D, from_right: int) -> D:
    """Return a copy of d with a batch dimension of size one before its last `from_right` ones."""
    before = len(d.batch_shape) - from_right

    def insert(t: Tensor, name: str, owner: Distribution) -> Tensor:
        """Insert the dimension, unless t lacks the batch dimensions to its left."""
        position = t.dim() - _event_dims(t, name, owner) - len(owner.batch_shape) + before
        return t.unsqueeze(position) if position >= 0 else t

    def shape(owner: Distribution) -> dict[str, Any]:
        sizes = owner.batch_shape
        return {"_batch_shape": torch.Size([*sizes[:before], 1, *sizes[before:]])}

    return copy_with(d, insert, shape)
