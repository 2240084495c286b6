"""Pairs that have a closed form only where a parameter is the same on both sides."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_klloss.numerics.tracing import is_traced


def where_alike(q: Tensor, p: Tensor, value: Tensor, what: str) -> Tensor:
    """Return the value, once q and p are known to be equal; NaN where they differ out of sight.

    Under `torch.compile` and `torch.func` one cannot look. A NaN is not different: it has made the value NaN.

    Args:
        q: the parameter that q has.
        p: the one that p has.
        value: the KL where they are equal.
        what: the name of the parameter, in the plural.

    Raises:
        NotImplementedError: if they differ somewhere.
    """
    differ = (q < p) | (q > p)
    if not (is_traced() or differ.is_meta) and bool(differ.any()):
        raise NotImplementedError(f"their {what} differ")
    return torch.where(differ, torch.nan, value)
