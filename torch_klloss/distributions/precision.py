"""Precision of distributions: half precision widened to float32, whole numbers made floating-point ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.nn import Parameter

from torch_klloss.distributions.tensors import (
    PLAIN,
    copy_with,
    dtype_of,
    has_tensor,
    is_transparent,
    log_prob_of_a_draw,
    on_shared_device,
    unvalidated_if_changed,
)
from torch_klloss.numerics.tracing import is_traced

HALF = (torch.float16, torch.bfloat16)
_FULL = (torch.float32, torch.float64)
_UNDECLARED = ("_param", "temperature")  # parameters under names that are not in `arg_constraints`


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
        copy = copy_with(d, lambda t, *_: full_precision(t), unvalidated_if_changed)
        d = copy if is_transparent(d) or _can_be_evaluated(copy) else d
    return in_floating_point(d)


def _is_in_full_precision(d: Distribution) -> bool:
    """Return whether d holds nothing but floating-point tensors in full precision, shapes and flags, as most do."""
    for value in d.__dict__.values():  # every loss runs this
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            if value.dtype not in _FULL:
                return False
        elif kind not in PLAIN and not (isinstance(value, Distribution) and _is_in_full_precision(value)):
            return not has_tensor(d, lambda t, name, owner: t.dtype in HALF or _is_whole(t, name, owner))
    return True


def pair_in_full_precision(q: Distribution, p: Distribution) -> tuple[Distribution, Distribution]:
    """Return both on one device and in full precision; in their own if one of them cannot be, whose points have it."""
    q, p = on_shared_device(q, p)
    full_q, full_p = in_full_precision(q), in_full_precision(p)
    if (full_q is not q or full_p is not p) and (_has_half(full_q) or _has_half(full_p)):
        return q, p
    return full_q, full_p


def in_floating_point(d: Distribution) -> Distribution:
    """Return d with integer and bool parameters in the dtype of the others, or the default dtype; d if it has none."""
    if not has_tensor(d, _is_whole):
        return d
    dtype = dtype_of(d)

    def wide(t: Tensor, name: str, owner: Distribution) -> Tensor:
        return t.to(dtype) if _is_whole(t, name, owner) else t

    return copy_with(d, wide, unvalidated_if_changed)


def _is_whole(t: Tensor, name: str, owner: Distribution) -> bool:
    """Return whether a tensor holds whole numbers, and is a parameter, and not an index."""
    if t.dtype.is_floating_point or t.dtype.is_complex:
        return False
    return name in _UNDECLARED or name.removeprefix("_unbroadcasted_") in owner.arg_constraints


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
    return has_tensor(d, lambda t, *_: t.dtype in HALF)


def in_float64(d: Distribution) -> Distribution:
    """Return d with all of its floating-point tensors in float64."""
    return copy_with(d, lambda t, *_: t.double() if t.is_floating_point() else t)
