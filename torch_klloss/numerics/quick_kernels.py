"""Kernels that take a quick way where it has the digits, and a careful one elsewhere.

What was given in float32 has half of its digits to spare in float64, on the CPU and in eager mode. There a formula may
be computed as it is written, unless that cancels or a parameter is at its end, which is looked at. On an accelerator
nothing can be looked at without a wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps

import torch
from torch import Tensor

from torch_klloss.numerics.blocks import Derivatives
from torch_klloss.numerics.custom_gradient import Kernel
from torch_klloss.numerics.devices import can_be_read
from torch_klloss.numerics.elementary import has_digits_to_spare, may_be_infinite

Quick = Callable[..., "tuple[Tensor, Derivatives] | None"]
Direct = Callable[..., tuple[Tensor, Derivatives, Tensor]]

_MOST_WHOLE = 2**19  # elements of a whole kernel, which has some forty float64 tensors of them at once
LOST = 1e-8  # of the terms of a sum: what is smaller has lost half of float64's digits


def narrow_or_wide(kernel: Kernel) -> Kernel:
    """Return a kernel that goes over to float64 where a step of it overflows in float32."""

    @wraps(kernel)
    def either(needs: Sequence[bool], *tensors: Tensor) -> tuple[Tensor, Derivatives]:
        found = kernel(needs, *tensors)
        if _can_be_quick(tensors[0]) and may_be_infinite(found[0]):
            return kernel(needs, *(t.double() for t in tensors))
        return found

    return either


def quick_or_careful(quick: Quick, careful: Kernel) -> Kernel:
    """Return a kernel that is quick where it can be, and careful at the ends of parameters.

    Args:
        quick: computes in float64. What it returns is taken if every value is finite; it may be None otherwise, or
            wrong.
        careful: computes everything else, in the dtype of its tensors.
    """

    def kernel(needs: Sequence[bool], *tensors: Tensor) -> tuple[Tensor, Derivatives]:
        if not _can_be_quick(tensors[0]):
            return careful(needs, *tensors)
        wide = [t.double() for t in tensors]
        found = quick(needs, *wide)
        return careful(needs, *wide) if found is None or may_be_infinite(found[0]) else found

    return kernel


def direct_or_careful(direct: Direct, careful: Kernel, *, widens: bool = True) -> Kernel:
    """Return a kernel that takes a sum as it is written, and is careful with the elements where terms cancel.

    Args:
        direct: computes in float64: the values, the derivatives, each in the full shape and in memory of its own, and
            the sum of the terms' sizes, `[*dims]`.
        careful: computes everything else, in the dtype of its tensors.
        widens: whether both are given their tensors in float64.
    """

    def kernel(needs: Sequence[bool], *tensors: Tensor) -> tuple[Tensor, Derivatives]:
        if not _can_be_quick(tensors[0]):
            return careful(needs, *tensors)
        tensors = torch.broadcast_tensors(*(t.double() if widens else t for t in tensors))
        value, derivatives, size = direct(needs, *tensors)
        lost = ~((value >= LOST * size) & (value < torch.inf))  # NaN as well
        count = int(lost.sum())
        if 2 * count > lost.numel():
            return careful(needs, *tensors)
        if count:
            again, slopes = careful(needs, *(t[lost] for t in tensors))
            value[lost] = again
            for derivative, slope in zip(derivatives, slopes, strict=True):
                if derivative is not None and slope is not None:
                    derivative[lost] = slope
        return value, derivatives

    return kernel


def whole_or_careful(whole: Kernel, careful: Kernel) -> Kernel:
    """Return a kernel that takes few operations on an accelerator with float64, and another one elsewhere."""

    def kernel(needs: Sequence[bool], *tensors: Tensor) -> tuple[Tensor, Derivatives]:
        is_whole = has_digits_to_spare(tensors[0]) and not can_be_read(tensors[0])
        return (whole if is_whole else careful)(needs, *tensors)

    kernel.most_elsewhere = _MOST_WHOLE  # type: ignore[attr-defined]
    return kernel


def _can_be_quick(x: Tensor) -> bool:
    return has_digits_to_spare(x) and can_be_read(x)
