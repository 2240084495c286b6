"""Batches from masks of examples, and from masks or lengths of sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_klloss.numerics.devices import can_be_read
from torch_klloss.reduction import Batch, expand_mask, is_zero


def batch_of(
    batch_shape: torch.Size, batch_dims: int, mask: Tensor | None = None, lengths: Tensor | None = None
) -> Batch:
    """Return the examples of a batch shape `[*examples, *latent]` under a mask, or under the lengths of sequences.

    Raises:
        TypeError: if the mask or the lengths are no tensor, or the lengths no integers.
        ValueError: if both are given, a shape does not fit, a length is out of range, a weight is negative, or no
            element counts.
    """
    examples = batch_shape[:batch_dims]
    if mask is None and lengths is None:
        return Batch(examples, len(examples))
    if mask is not None and lengths is not None:
        raise ValueError("mask and lengths both say which steps count: give one of them.")
    if lengths is not None:
        mask = _mask_of(lengths, batch_shape)
    elements = batch_shape[: max(len(examples), mask.dim() if isinstance(mask, Tensor) else 0)]
    weights = expand_mask(mask, elements)  # type: ignore[arg-type]
    keep = weights != 0
    if is_zero(keep.sum()):
        raise ValueError(f"the mask drops every element of {tuple(elements)}: skip batches without a valid one.")
    if not elements:
        return Batch(elements, 0, weights)
    flat = keep.flatten()
    index = torch.where(flat, torch.arange(flat.numel(), device=flat.device), flat.int().argmax())
    return Batch(elements, len(examples), weights, index)


def _mask_of(lengths: Tensor, batch_shape: torch.Size) -> Tensor:
    """Return the mask `[*examples, time]` of the steps before each length."""
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"lengths must be a tensor of integers, one a sequence, got {got}.")
    dims = lengths.dim()
    if len(batch_shape) <= dims or batch_shape[:dims] != lengths.shape:
        raise ValueError(
            f"lengths of shape {tuple(lengths.shape)} need q and p of batch shape [*lengths.shape, time, …], got "
            f"{tuple(batch_shape)}: for [batch, time, latent] build q with diagonal_normal(mean, logvar, batch_dims=2)."
        )
    num_steps = batch_shape[dims]
    if can_be_read(lengths) and bool(((lengths < 0) | (lengths > num_steps)).any()):
        raise ValueError(f"lengths must lie between 0 and the number of steps {num_steps}, got {lengths.tolist()}.")
    return torch.arange(num_steps, device=lengths.device) < lengths.unsqueeze(-1)
