"""Abilities of devices: whether they have float64, and whether the host may ask them for values."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from torch_klloss.numerics.tracing import constant_in_graphs, is_traced

_HAVE_FLOAT64 = {"cpu": True, "cuda": True, "meta": True, "mps": False}  # and what was tried


def has_float64(device: torch.device) -> bool:
    """Return whether a device has float64, which is tried once for every type of device; Apple's has none."""
    known = _HAVE_FLOAT64.get(device.type)
    return _tried_float64(device.type) if known is None else known


@constant_in_graphs
def _tried_float64(kind: str) -> bool:
    try:
        torch.empty(1, dtype=torch.float64, device=kind)
    except (TypeError, RuntimeError):  # torch's errors for a dtype that a device lacks
        _HAVE_FLOAT64[kind] = False
    else:
        _HAVE_FLOAT64[kind] = True
    return _HAVE_FLOAT64[kind]


def scalar(number: Tensor | float, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a number, or a tensor, on a device, without a copy from the host where the number is Python's."""
    if isinstance(number, Tensor):
        return number.to(device, dtype)
    return torch.full((), number, dtype=dtype, device=device)


def number_on(device: torch.device, number: Tensor) -> Tensor:
    """Return a number of the CPU on a device: added to a zero there, which does not wait as a copy would."""
    return number + torch.zeros((), dtype=number.dtype, device=device)


def constant_on(device: torch.device, constant: Tensor) -> Tensor:
    """Return a constant of the CPU on a device, where it is kept from the first call on."""
    if device.type == "cpu":
        return constant
    return constant.to(device) if is_traced() else _kept(device, constant)


@lru_cache(maxsize=64)
def _kept(device: torch.device, constant: Tensor) -> Tensor:
    return constant.to(device)


def can_be_read(*tensors: Tensor) -> bool:
    """Return whether values may be asked for: on the CPU, where nobody waits for them, and while nothing is traced.

    A check that is only a courtesy is made there alone. On an accelerator it would stop the host until the device has
    done all that was asked of it before.
    """
    return all(t.is_cpu for t in tensors) and not is_traced()
