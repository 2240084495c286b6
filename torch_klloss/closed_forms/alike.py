"""Pairs that have a closed form only where a parameter is the same on both sides."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_klloss.numerics.tracing import is_traced


def where_alike(q: Tensor, p: Tensor, value: Tensor, name: str) -> Tensor:
    """Return the value if q and p are equal; NaN where they differ under `torch.compile` and `torch.func`.

    Values cannot be read there, so that no error can be raised. A NaN counts as equal: the value is NaN already.

    Args:
        q: the parameter of q.
        p: the parameter of p.
        value: the KL where they are equal.
        name: the name of the parameter, in the plural.

    Raises:
        NotImplementedError: if they differ somewhere.
    """
    differ = (q < p) | (q > p)
    if not (is_traced() or differ.is_meta) and bool(differ.any()):
        raise NotImplementedError(f"their {name} differ")
    return torch.where(differ, torch.nan, value)
