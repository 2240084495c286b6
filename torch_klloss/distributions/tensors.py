"""Tensors of distributions, and copies with other tensors. The user's own object is never changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform, constraints
from torch.distributions.transforms import _InverseTransform  # its _inv is the transform that it inverts

from torch_klloss.numerics.devices import has_float64, number_on
from torch_klloss.numerics.tracing import is_traced
from torch_klloss.numerics.versions import may_be_changed
from torch_klloss.rng import private_rng

D = TypeVar("D", bound=Distribution)
_TensorMap = Callable[[Tensor, str, Distribution], Tensor]
_Condition = Callable[[Tensor, str, Distribution], bool]
_Attributes = Callable[[Distribution], dict[str, Any]]

PLAIN = (torch.Size, int, bool, type(None))
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


def has_tensor(d: Distribution | Transform, is_sought: _Condition, owner: Any = None) -> bool:
    """Return whether a tensor of a distribution or transform, or of its parts, is sought."""
    owner = d if isinstance(d, Distribution) else owner
    for key, value in d.__dict__.items():  # every loss runs this, hence no list of tensors
        kind = type(value)
        if kind in PLAIN:
            continue
        if kind is Tensor or isinstance(value, Tensor):
            if is_sought(value, key, owner):
                return True
        elif isinstance(value, (Distribution, Transform)):
            if (key != "_inv" or isinstance(d, _InverseTransform)) and has_tensor(value, is_sought, owner):
                return True
        elif kind in (list, tuple, partial):
            parts = arguments_of(value) if kind is partial else value
            if any(_is_or_has(part, is_sought, owner) for part in parts):
                return True
    return False


def _is_or_has(part: Any, is_sought: _Condition, owner: Any) -> bool:
    if isinstance(part, Tensor):
        return is_sought(part, "", owner)
    return isinstance(part, (Distribution, Transform)) and has_tensor(part, is_sought, owner)


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


class NotSelectableError(Exception):
    """It is not known which of a distribution's numbers belong to which batch element."""


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


def unvalidated(d: Distribution) -> Distribution:
    """Return a copy of d, and of its parts, without validation of arguments and points."""
    return copy_with(d, attributes=lambda _: {"_validate_args": False})


def unvalidated_if_changed(owner: Distribution) -> dict[str, Any]:
    """Return the attributes of a copy with new tensors, which do not show that the old ones were written to."""
    if is_traced():
        return {}
    changed = any(isinstance(value, Tensor) and may_be_changed(value) for value in owner.__dict__.values())
    return {"_validate_args": False} if changed else {}


def log_prob_of_a_draw(d: Distribution) -> Tensor:
    """Return log d at one draw of d, `[*batch]`, without an effect on any random stream."""
    d = unvalidated(d)
    with private_rng(0, device_of(d)):
        x = d.sample().detach()
    log_prob: Tensor = d.log_prob(x)
    return log_prob
