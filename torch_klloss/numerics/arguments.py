"""Checks of arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from inspect import signature
from typing import Any, get_args

import torch
from torch import Tensor


def settings_of(instance: Any) -> dict[str, object]:
    """Return the fields of a dataclass that its constructor takes, by name."""
    return {field.name: getattr(instance, field.name) for field in fields(instance) if field.init}


def call_of(cls: type, settings: Mapping[str, object]) -> str:
    """Return the call that builds an instance of a class, with the settings that differ from its defaults."""
    parameters = signature(cls).parameters
    shown = [name for name in parameters if name in settings and settings[name] != parameters[name].default]
    return f"{cls.__name__}({', '.join(f'{name}={settings[name]!r}' for name in shown)})"


def check_integer(name: str, value: object, at_least: int | None = 1) -> None:
    """Raise a ValueError unless the value is an integer, and at least so large."""
    if isinstance(value, bool) or not isinstance(value, int) or (at_least is not None and value < at_least):
        least = "" if at_least is None else f" of at least {at_least}"
        raise ValueError(f"{name} must be an integer{least}, got {value!r}.")


def check_flag(name: str, value: object) -> None:
    """Raise a TypeError unless the value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.")


def check_text(name: str, value: object) -> None:
    """Raise a TypeError unless the value is a string."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {value!r}.")


def check_number(name: str, value: Any, at_least: float = -math.inf) -> None:
    """Raise a TypeError unless the value is a number, and a ValueError if it is NaN or smaller than it may be."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    if math.isnan(value):
        raise ValueError(f"{name} must be a number, got NaN.")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value!r}.")


def check_word(name: str, value: object, options: Any) -> None:
    """Raise a ValueError unless the value is one of the words of a `Literal`."""
    words: tuple[str, ...] = get_args(options)
    if not isinstance(value, str) or value not in words:
        *first, last = map(repr, words)
        raise ValueError(f"{name} must be {', '.join(first)} or {last}, got {value!r}.")


def check_tensors(**tensors: object) -> None:
    """Raise a TypeError unless every value is a tensor of real numbers."""
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            way_out = f": torch.as_tensor({name})" if hasattr(t, "__array__") else ""
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}{way_out}.")
        if t.is_complex():
            raise TypeError(f"{name} must be a tensor of real numbers, got {t.dtype}.")


def check_dim(name: str, value: object, t: Tensor, of: str) -> None:
    """Raise a ValueError unless the value is a dimension of a tensor that is called `of`."""
    if isinstance(value, bool) or not isinstance(value, int) or not -t.dim() <= value < t.dim():
        raise ValueError(f"{name} must be a dimension of {of}, whose shape is {tuple(t.shape)}, got {value!r}.")


def check_generator(generator: object) -> None:
    """Raise a TypeError unless the value is a generator, or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {type(generator).__name__}: "
            "torch.Generator().manual_seed(0)."
        )
