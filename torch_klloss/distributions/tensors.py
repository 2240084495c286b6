"""Copies of a distribution with other tensors in it. The user's own object is never touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Transform,
    constraints,
)
from torch.distributions.transforms import _InverseTransform  # whose _inv is its content, not a way back

_HALF = (torch.float16, torch.bfloat16)
_PLAIN = (torch.Size, int, bool, type(None))


def tensors_of(d: Distribution | Transform) -> list[Tensor]:
    """Return the tensors that d holds, those of its parts included."""
    tensors: list[Tensor] = []
    for key, value in d.__dict__.items():
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (Distribution, Transform)):
            if key != "_inv" or isinstance(d, _InverseTransform):
                tensors += tensors_of(value)
        elif type(value) in (list, tuple):
            for part in value:
                if isinstance(part, (Distribution, Transform)):
                    tensors += tensors_of(part)
    return tensors


def device_of(d: Distribution) -> torch.device:
    """Return the device of d's first tensor; the default device where it has none."""
    tensors = tensors_of(d)
    return tensors[0].device if tensors else torch.get_default_device()


def dtype_of(d: Distribution) -> torch.dtype:
    """Return the widest floating dtype among d's tensors; the default dtype where it has none."""
    return dtype_and_device_of(d)[0]


def dtype_and_device_of(d: Distribution) -> tuple[torch.dtype, torch.device]:
    """Return the widest floating dtype among d's tensors, and the device of the first; else the defaults."""
    tensors = tensors_of(d)
    widest: torch.dtype | None = None
    for tensor in tensors:
        dtype = tensor.dtype
        if dtype != widest and dtype.is_floating_point:
            widest = dtype if widest is None else torch.promote_types(widest, dtype)
    device = tensors[0].device if tensors else torch.get_default_device()
    return widest or torch.get_default_dtype(), device


def map_tensors(d: Any, fn: Callable[[Tensor, str, Any], Tensor]) -> Any:
    """Return a copy of d with its tensors replaced, through base and component distributions and transforms.

    Args:
        d: a distribution or a transform.
        fn: called with the tensor, its name, and the distribution or transform that holds it under that name.
    """
    if type(d) in (list, tuple):
        return type(d)(map_tensors(part, fn) for part in d)
    if not isinstance(d, (Distribution, Transform)):
        return d
    copy = d.__new__(type(d))
    mapped: dict[int, Tensor] = {}  # one tensor under two names stays one: `_param` and `probs`
    for key, value in d.__dict__.items():
        if key == "_inv" and not isinstance(d, _InverseTransform):
            value = None  # the inverse is made anew, of the new tensors, when somebody asks for it
        elif key == "_cached_x_y":
            value = (None, None)
        if isinstance(value, Tensor):
            if id(value) not in mapped:
                mapped[id(value)] = fn(value, key, d)
            copy.__dict__[key] = mapped[id(value)]
        else:
            copy.__dict__[key] = map_tensors(value, fn)
    return copy


def in_full_precision(d: Distribution) -> Distribution:
    """Return d with its half-precision tensors in float32; d itself where it has none."""
    if not _has_half(d):
        return d
    upcast: Distribution = map_tensors(d, lambda t, *_: t.float() if t.dtype in _HALF else t)
    return upcast


def _has_half(d: Distribution | Transform) -> bool:
    for key, value in d.__dict__.items():  # every loss comes by here, hence no list of tensors
        kind = type(value)
        if kind in _PLAIN:
            continue
        if kind is Tensor or isinstance(value, Tensor):
            if value.dtype in _HALF:
                return True
        elif isinstance(value, (Distribution, Transform)):
            if (key != "_inv" or isinstance(d, _InverseTransform)) and _has_half(value):
                return True
        elif type(value) is list and any(_has_half(part) for part in value if isinstance(part, Transform)):
            return True
    return False


def unvalidated(d: Distribution) -> Distribution:
    """Return a copy of d, and of its parts, that checks neither its arguments nor the points it is asked about."""
    copy = d.__new__(type(d))
    for key, value in d.__dict__.items():
        copy.__dict__[key] = unvalidated(value) if isinstance(value, Distribution) else value
    copy.__dict__["_validate_args"] = False
    return copy


def replace_examples(d: Distribution, keep: Tensor, batch_shape: torch.Size) -> Distribution:
    """Return d with the parameters of every example that `keep` drops replaced by those of one that it keeps.

    Whatever a dropped example held, NaN included, can then reach neither a value nor a gradient: 0 · NaN would,
    however the value is masked afterwards.

    Args:
        d: a distribution; one that has no example dimensions of its own comes back as it is.
        keep: bool, `[*example]`, the leading dimensions of `batch_shape`.
        batch_shape: the batch shape of the pair that d belongs to.
    """
    examples, dims = keep.shape, keep.dim()
    if dims == 0 or d.batch_shape[:dims] != examples or len(d.batch_shape) != len(batch_shape):
        return d
    flat = keep.flatten()
    index = torch.where(flat, torch.arange(flat.numel(), device=flat.device), flat.int().argmax())

    def take(t: Tensor, name: str, owner: Any) -> Tensor:
        if t.dim() < _num_dims(name, owner, d) or t.shape[:dims] != examples:
            return t  # shared by the examples
        return t.flatten(0, dims - 1).index_select(0, index.to(t.device)).unflatten(0, examples)

    replaced: Distribution = map_tensors(d, take)
    return replaced


def _num_dims(name: str, owner: Any, d: Distribution) -> int:
    """Return how many dimensions a tensor has that differs from example to example."""
    if isinstance(owner, Transform):  # it broadcasts against the points of d
        return len(d.batch_shape) + len(d.event_shape)
    if name.endswith("_tril"):  # torch keeps Cholesky factors that are no argument of the constructor
        return len(owner.batch_shape) + 2
    constraint = owner.arg_constraints.get(name.removeprefix("_unbroadcasted_"))
    return len(owner.batch_shape) + getattr(constraint, "event_dim", 0)


_SHARED = (bool, int, float, str, torch.Size, torch.dtype, torch.device, type(None), constraints.Constraint)


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
        if isinstance(part, _SHARED):
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


def with_batch_dim(d: Distribution, from_right: int) -> Distribution:
    """Return a copy of d with a batch dimension of size one before its last `from_right` ones."""
    copy = d.__new__(type(d))
    for key, value in d.__dict__.items():
        if isinstance(value, Tensor):
            value = _with_dim(d, key, value, from_right)
        elif isinstance(value, Distribution):
            value = with_batch_dim(value, from_right + len(value.batch_shape) - len(d.batch_shape))
        copy.__dict__[key] = value
    shape = list(d.batch_shape)
    shape.insert(len(shape) - from_right, 1)
    copy.__dict__["_batch_shape"] = torch.Size(shape)
    return copy


def _with_dim(d: Distribution, key: str, t: Tensor, from_right: int) -> Tensor:
    """Insert the dimension into one tensor; not where the batch dimensions to the left of it are left out."""
    constraint = d.arg_constraints.get(key.removeprefix("_unbroadcasted_"))
    dims = 2 if key.endswith("_tril") else getattr(constraint, "event_dim", max(0, t.dim() - len(d.batch_shape)))
    position = t.dim() - dims - from_right
    return t.unsqueeze(position) if position >= 0 else t
