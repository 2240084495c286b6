"""Reduction of the KL: a sum over latent dimensions, a mask, and a mean or sum over examples."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from torch_klloss.estimate import KLEstimate

ReductionName = Literal["mean", "sum", "none"]


def check_reduction(reduction: str, batch_dims: int) -> None:
    """Raise a ValueError if `reduction` is unknown or `batch_dims` is not an integer of at least 0."""
    if reduction not in get_args(ReductionName):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}.")
    if isinstance(batch_dims, bool) or not isinstance(batch_dims, int) or batch_dims < 0:
        raise ValueError(f"batch_dims must be an integer of at least 0, got {batch_dims!r}.")


def example_shape(batch_shape: torch.Size, batch_dims: int) -> torch.Size:
    """Return the shape of the examples: the first `batch_dims` dimensions, or all if there are fewer."""
    return batch_shape[:batch_dims]


def expand_mask(mask: Tensor, examples: torch.Size) -> Tensor:
    """Return the mask in the shape of the examples.

    Raises:
        TypeError: if the mask is not a tensor.
        ValueError: if it does not broadcast to the shape.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, bool or of weights, got {type(mask).__name__}.")
    try:
        return mask.expand(examples)
    except RuntimeError:
        raise ValueError(
            f"mask must have, or broadcast to, the shape of the examples {tuple(examples)}, got {tuple(mask.shape)}; "
            "batch_dims says how many leading dimensions index examples."
        ) from None


def reduce(value: Tensor, reduction: str, batch_dims: int, mask: Tensor | None = None) -> Tensor:
    """Sum all dimensions after the first `batch_dims`, then reduce the examples.

    Args:
        value: the KL, `[*batch]`.
        reduction: "mean" divides by the number of examples, or by the mask's sum; never by the latent size.
        batch_dims: how many leading dimensions index independent examples.
        mask: bool or weights, of the shape of the examples. An element of weight zero gives zero, even if NaN.

    Raises:
        ValueError: if "mean" has no example, or a mask that sums to zero.
    """
    num_latent = value.dim() - batch_dims
    if num_latent > 0:
        value = value.sum(tuple(range(-num_latent, 0)))
    if mask is not None:
        weights = mask.to(value.dtype)
        value = torch.where(weights == 0, 0.0, weights * value)
    if reduction == "none":
        return value
    if reduction == "sum":
        return value.sum()
    _check_not_empty(value)
    if mask is None:
        return value.mean()
    total = weights.sum()
    if is_zero(total):
        raise ValueError(
            "reduction='mean' divides by the sum of the mask, which is zero; skip batches without a valid element, "
            "or use reduction='sum'."
        )
    return value.sum() / torch.where(total == 0, math.nan, total)


def reduce_estimate(estimate: KLEstimate, reduction: str, batch_dims: int, mask: Tensor | None = None) -> KLEstimate:
    """Return the estimate of the reduced KL: the value of `reduce`, with its standard error.

    The errors of different batch elements are independent, so their squares add up.
    """
    per_example = estimate.sum(max(0, estimate.value.dim() - batch_dims))
    weights = torch.ones_like(per_example.value) if mask is None else mask.to(per_example.value.dtype)
    if reduction == "none":
        return per_example.combine(weights, ())
    if reduction == "mean":
        _check_not_empty(weights)
        weights = weights / weights.sum()
    return per_example.combine(weights, tuple(range(weights.dim())))


def _check_not_empty(examples: Tensor) -> None:
    if examples.numel() == 0:
        raise ValueError(
            f"reduction='mean' needs at least one example, got the example shape {tuple(examples.shape)}; use "
            "reduction='sum', or skip empty batches."
        )


def is_zero(total: Tensor) -> bool:
    """Return whether a number is zero; False while tracing and under vmap, where its value is unknown."""
    if torch.compiler.is_compiling():
        return False
    try:
        return bool(total == 0)
    except RuntimeError:  # vmap and meta tensors have no value to branch on
        return False
