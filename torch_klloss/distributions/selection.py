"""torch_klloss/distributions/selection.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform, constraints
from torch.distributions.transforms import _InverseTransform  # whose _inv is its content, not a way back

from torch_klloss.distributions.tensors import map_tensors

_PLAIN = (bool, int, float, str, torch.Size, torch.dtype, torch.device, type(None), constraints.Constraint)


class NotSelectableError(Exception):
    """Raised where it is not known which of a distribution's numbers belong to which batch element."""


def in_float64(d: Distribution) -> Distribution:
    """Return d with all of its floating-point tensors in float64."""
    precise: Distribution = map_tensors(d, lambda t, *_: t.double() if t.is_floating_point() else t)
    return precise


def flattened(d: Distribution, batch_shape: torch.Size) -> Distribution:
    """Return d, broadcast to the batch shape, with a single batch dimension.

    Raises:
        NotSelectableError: if d holds something whose batch dimensions are not known, such as a network.
    """
    try:
        d = d if d.batch_shape == batch_shape else d.expand(batch_shape)
    except NotImplementedError:
        raise NotSelectableError from None
    flat: Distribution = _mapped(d, lambda t: t.flatten(0, len(batch_shape) - 1) if batch_shape else t[None], d)
    return _with_batch(flat, len(batch_shape), batch_shape.numel())


def select(d: Distribution, index: Tensor, leaves: list[tuple[Tensor, Tensor]] | None = None) -> Distribution:
    """Return the elements of a distribution with a single batch dimension, as `flattened` made it.

    Args:
        d: the distribution.
        index: the elements.
        leaves: where given, what is selected of every tensor that needs a gradient is made a leaf of its own, and
            appended to it together with that tensor.
    """

    def take(t: Tensor) -> Tensor:
        if leaves is None or not t.requires_grad:
            return t[index]
        leaves.append((t, t.detach()[index].requires_grad_()))
        return leaves[-1][1]

    return _with_batch(_mapped(d, take, d), 1, len(index))


def _mapped(part: Any, take: Any, owner: Distribution) -> Any:
    """Return a copy of a part of a distribution, every tensor broadcast to its owner's batch shape and then taken."""
    if isinstance(part, Tensor):
        return take(_broadcast(part, owner.batch_shape))
    if type(part) in (list, tuple):
        return type(part)(_mapped(each, take, owner) for each in part)
    if not isinstance(part, (Distribution, Transform)):
        if isinstance(part, _PLAIN):
            return part
        raise NotSelectableError
    owner = part if isinstance(part, Distribution) else owner
    copy = part.__new__(type(part))
    for key, value in part.__dict__.items():
        if key == "_inv" and not isinstance(part, _InverseTransform):
            value = None
        elif key == "_cached_x_y":
            value = (None, None)
        copy.__dict__[key] = _mapped(value, take, owner)
    return copy


def _broadcast(t: Tensor, batch_shape: torch.Size) -> Tensor:
    """Return t with all batch dimensions in front, whatever else it has behind them."""
    dims = len(batch_shape)
    try:
        return t.expand(batch_shape + t.shape[dims:])
    except RuntimeError:
        raise NotSelectableError from None


def _with_batch(d: Any, num_dims: int, count: int) -> Any:
    """Replace the leading batch dimensions that a copied distribution and its parts still claim to have."""
    if isinstance(d, Distribution):
        d._batch_shape = torch.Size([count]) + d._batch_shape[num_dims:]
    for value in d.__dict__.values() if isinstance(d, (Distribution, Transform)) else ():
        for part in value if type(value) in (list, tuple) else (value,):
            if isinstance(part, (Distribution, Transform)):
                _with_batch(part, num_dims, count)
    return d
