"""Checks of arguments."""

from __future__ import annotations


def check_integer(name: str, value: object, at_least: int = 1) -> None:
    """Raise a ValueError unless the value is an integer, and at least so large."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}, got {value!r}.")
