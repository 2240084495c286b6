"""Tensors of distributions, and copies with other tensors. The user's own object is never changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Transform,
    constraints,
)
from torch.distributions.transforms import _InverseTransform  # its _inv is the transform that it inverts
from torch.nn import Parameter

from torch_klloss.numerics.devices import can_be_read, has_float64, number_on
from torch_klloss.numerics.graph import with_gradient_if
from torch_klloss.numerics.tracing import is_traced
from torch_klloss.numerics.versions import may_be_changed
from torch_klloss.rng import private_rng

D = TypeVar("D", bound=Distribution)
_TensorMap = Callable[[Tensor, str, Distribution], Tensor]
_Condition = Callable[[Tensor, str, Distribution], bool]
_Attributes = Callable[[Distribution], dict[str, Any]]

HALF = (torch.float16, torch.bfloat16)
_FULL = (torch.float32, torch.float64)
_PLAIN = (torch.Size, int, bool, type(None))
_UNDECLARED = ("_param", "temperature")  # parameters under names that are not in `arg_constraints`
_KNOWN = (bool, int, float, str, torch.Size, torch.dtype, torch.device, type(None), constraints.Constraint)


def tensors_of(d: Distribution | Transform) -> list[Tensor]:
    """Return the tensors of d, with its parts."""
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
        elif isinstance(value, partial):
            tensors += [t for t in arguments_of(value) if isinstance(t, Tensor)]
    return tensors


def arguments_of(function: partial[Any]) -> list[Any]:
    """Return the arguments that a function was given beforehand, such as the context of a conditional flow."""
    return [*function.args, *function.keywords.values()]


def device_of(d: Distribution) -> torch.device:
    """Return the device of d's first tensor; the default device if it has none."""
    for value in d.__dict__.values():  # every loss runs this, hence no list of tensors
        if isinstance(value, Tensor):
            return value.device
        if isinstance(value, Distribution) and value.__dict__:
            return device_of(value)
    tensors = tensors_of(d)
    return tensors[0].device if tensors else torch.get_default_device()


def on_shared_device(q: Distribution, p: Distribution) -> tuple[Distribution, Distribution]:
    """Return q and p, one made of numbers of the CPU, such as Normal(0.0, 1.0), on the device of the other."""
    of_q, of_p = device_of(q), device_of(p)
    if of_q == of_p:
        return q, p
    device = of_p if of_q.type == "cpu" else of_q

    def moved(t: Tensor, *_: Any) -> Tensor:
        return number_on(device, t) if t.dim() == 0 and t.is_cpu else t

    return copy_with(q, moved), copy_with(p, moved)


def dtype_of(d: Distribution, *others: Distribution) -> torch.dtype:
    """Return the widest floating dtype among the tensors; the default dtype for a distribution without any."""
    dtype = dtype_and_device_of(d)[0]
    for other in others:
        dtype = torch.promote_types(dtype, dtype_and_device_of(other)[0])
    return dtype


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


def copy_with(
    d: D, tensor: _TensorMap | None = None, attributes: _Attributes | None = None, *, known_only: bool = False
) -> D:
    """Return a copy of d, and of the distributions and transforms that it is made of.

    Args:
        d: a distribution.
        tensor: (t, name, owner) -> the replacement of the tensor t; its owner is the distribution that holds it,
            itself or in a transform. None: the copy shares tensors and transforms with d.
        attributes: owner -> attributes to set on the copy of this distribution.
        known_only: whether to refuse parts with unknown batch dimensions, such as a network.

    Raises:
        NotSelectableError: if `known_only`, and there is such a part.
    """
    copy: D = _copied(d, d, tensor, attributes, known_only)
    return copy


def _copied(
    part: Any, owner: Distribution, tensor: _TensorMap | None, attributes: _Attributes | None, known_only: bool
) -> Any:
    if type(part) in (list, tuple):
        return type(part)(_copied(each, owner, tensor, attributes, known_only) for each in part)
    if not isinstance(part, (Distribution, Transform)):
        if known_only and not isinstance(part, _KNOWN):
            raise NotSelectableError
        return _bound(part, owner, tensor) if isinstance(part, partial) and tensor is not None else part
    owner = part if isinstance(part, Distribution) else owner
    copy = type(part).__new__(type(part))  # Dynamo of torch 2.8 knows no part.__new__
    mapped: dict[int, Tensor] = {}  # one tensor under two names stays one: `_param` and `probs`
    for key, value in part.__dict__.items():
        if tensor is None:
            new = _copied(value, value, None, attributes, False) if isinstance(value, Distribution) else value
        elif isinstance(value, Tensor):
            if id(value) not in mapped:
                mapped[id(value)] = tensor(value, key, owner)
            new = mapped[id(value)]
        elif key == "_inv" and not isinstance(part, _InverseTransform):
            new = None  # the inverse is made from the new tensors on demand
        elif key == "_cached_x_y":
            new = (None, None)
        else:
            new = _copied(value, owner, tensor, attributes, known_only)
        copy.__dict__[key] = new
    if attributes is not None and owner is part:
        copy.__dict__.update(attributes(owner))
    return copy


def _bound(function: partial[Any], owner: Distribution, tensor: _TensorMap) -> partial[Any]:
    """Return a copy of the function, bound to the replacements of the tensors that it was given beforehand."""

    def replaced(value: Any, name: str) -> Any:
        return tensor(value, name, owner) if isinstance(value, Tensor) else value

    args = [replaced(value, str(place)) for place, value in enumerate(function.args)]
    return partial(function.func, *args, **{name: replaced(value, name) for name, value in function.keywords.items()})


def is_transparent(part: Any) -> bool:
    """Return whether a distribution is made of torch's and this library's classes alone.

    All of its parameters are then among its tensors. Of another class, what is behind it may be a network.
    """
    if type(part) in (list, tuple):
        return all(map(is_transparent, part))
    if not isinstance(part, (Distribution, Transform)):
        return isinstance(part, (Tensor, *_KNOWN))
    if not type(part).__module__.startswith(("torch.distributions.", "torch_klloss.")):
        return False
    is_inverse = isinstance(part, _InverseTransform)
    return all(is_transparent(value) for key, value in part.__dict__.items() if key != "_inv" or is_inverse)


def log_prob_of_a_draw(d: Distribution) -> Tensor:
    """Return log d at one draw of d, `[*batch]`, without an effect on any random stream."""
    d = unvalidated(d)
    with private_rng(0, device_of(d)):
        x = d.sample().detach()
    log_prob: Tensor = d.log_prob(x)
    return log_prob


def full_precision(t: Tensor) -> Tensor:
    """Return t in float32 if it is in half precision."""
    return t.float() if t.dtype in HALF else t


def in_full_precision(d: Distribution) -> Distribution:
    """Return d with its half-precision tensors in float32, and whole parameters as `in_floating_point` has them.

    Returns:
        d itself if it has none. What cannot be evaluated afterwards keeps its half precision: a network is in it.
    """
    if _is_in_full_precision(d):
        return d
    if _has_half(d):
        copy = copy_with(d, lambda t, *_: full_precision(t), _unvalidated_if_changed)
        d = copy if is_transparent(d) or _can_be_evaluated(copy) else d
    return in_floating_point(d)


def _is_in_full_precision(d: Distribution) -> bool:
    """Return whether d holds nothing but floating-point tensors in full precision, shapes and flags, as most do."""
    for value in d.__dict__.values():  # every loss runs this
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            if value.dtype not in _FULL:
                return False
        elif kind not in _PLAIN and not (isinstance(value, Distribution) and _is_in_full_precision(value)):
            return not _has(d, lambda t, name, owner: t.dtype in HALF or _is_whole(t, name, owner))
    return True


def in_floating_point(d: Distribution) -> Distribution:
    """Return d with integer and bool parameters in the dtype of the others, or the default dtype; d if it has none."""
    if not _has(d, _is_whole):
        return d
    dtype = dtype_of(d)
    wide: _TensorMap = lambda t, name, owner: t.to(dtype) if _is_whole(t, name, owner) else t  # noqa: E731
    return copy_with(d, wide, _unvalidated_if_changed)


def _is_whole(t: Tensor, name: str, owner: Distribution) -> bool:
    """Return whether a tensor holds whole numbers, and is a parameter, and not an index."""
    if t.dtype.is_floating_point or t.dtype.is_complex:
        return False
    return name in _UNDECLARED or name.removeprefix("_unbroadcasted_") in owner.arg_constraints


def pair_in_full_precision(q: Distribution, p: Distribution) -> tuple[Distribution, Distribution]:
    """Return both on one device and in full precision; in their own if one of them cannot be, whose points have it."""
    q, p = on_shared_device(q, p)
    full_q, full_p = in_full_precision(q), in_full_precision(p)
    if (full_q is not q or full_p is not p) and (_has_half(full_q) or _has_half(full_p)):
        return q, p
    return full_q, full_p


def _can_be_evaluated(d: Distribution) -> bool:
    """Return whether log d can be computed at a draw of d; True where that cannot be tried."""
    if is_traced():
        return True
    try:
        with torch.no_grad():
            log_prob_of_a_draw(d)
    except NotImplementedError:  # it has no draws
        return True
    except RuntimeError:  # torch's error for operands of different dtypes
        return False
    return True


def _has_half(d: Distribution) -> bool:
    return _has(d, lambda t, *_: t.dtype in HALF)


def _has(d: Distribution | Transform, is_sought: _Condition, owner: Any = None) -> bool:
    """Return whether a tensor of a distribution or transform, or of its parts, is sought."""
    owner = d if isinstance(d, Distribution) else owner
    for key, value in d.__dict__.items():  # every loss runs this, hence no list of tensors
        kind = type(value)
        if kind in _PLAIN:
            continue
        if kind is Tensor or isinstance(value, Tensor):
            if is_sought(value, key, owner):
                return True
        elif isinstance(value, (Distribution, Transform)):
            if (key != "_inv" or isinstance(d, _InverseTransform)) and _has(value, is_sought, owner):
                return True
        elif kind in (list, tuple, partial):
            parts = arguments_of(value) if kind is partial else value
            if any(_is_or_has(part, is_sought, owner) for part in parts):
                return True
    return False


def _is_or_has(part: Any, is_sought: _Condition, owner: Any) -> bool:
    if isinstance(part, Tensor):
        return is_sought(part, "", owner)
    return isinstance(part, (Distribution, Transform)) and _has(part, is_sought, owner)


def unvalidated(d: Distribution) -> Distribution:
    """Return a copy of d, and of its parts, without validation of arguments and points."""
    return copy_with(d, attributes=lambda _: {"_validate_args": False})


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

    return copy_with(d, take, _unvalidated_if_changed)


def _unvalidated_if_changed(owner: Distribution) -> dict[str, Any]:
    """Return the attributes of a copy with new tensors, which do not show that the old ones were written to."""
    if is_traced():
        return {}
    changed = any(isinstance(value, Tensor) and may_be_changed(value) for value in owner.__dict__.values())
    return {"_validate_args": False} if changed else {}


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


class NotSelectableError(Exception):
    """It is not known which of a distribution's numbers belong to which batch element."""


def in_float64(d: Distribution) -> Distribution:
    """Return d with all of its floating-point tensors in float64."""
    return copy_with(d, lambda t, *_: t.double() if t.is_floating_point() else t)


def on_host(*distributions: Distribution) -> list[Distribution]:
    """Return distributions with all of their tensors on the CPU; gradients flow back to where they were.

    Raises:
        RuntimeError: torch's own error, if they are on two devices.
    """
    first, *others = [t for d in distributions for t in tensors_of(d) if t.dim()] or [torch.zeros(1)]
    for t in others:
        if t.device != first.device:
            torch.add(first, t)  # which raises it, whatever their shapes are
    return [copy_with(d, lambda t, *_: t.cpu()) for d in distributions]


def lacks_float64(q: Distribution, p: Distribution) -> bool:
    """Return whether the pair is on a device without float64."""
    return not (has_float64(device_of(q)) and has_float64(device_of(p)))


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
