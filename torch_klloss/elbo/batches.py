"""Which elements of a batch count, and how they are averaged: masks of examples, and of the steps of sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_klloss.estimate import KLEstimate
from torch_klloss.numerics.tracing import is_traced
from torch_klloss.reduction import expand_mask, is_zero, reduce, reduce_estimate


@dataclass(frozen=True)
class Batch:
    """Hold the examples of a batch and the weights of its elements.

    An element is an example, or a part of one: a mask `[batch, time]` over examples `[batch]` weighs their steps.

    Attributes:
        elements: the shape of the elements, `[*examples, *parts]`.
        num_example_dims: how many of its dimensions index examples.
        weights: of the elements, `[*elements]`; None where all count alike.
        index: for every element, flat, the element to read instead: itself, or one that counts in place of one that
            does not. What a masked element holds, NaN included, then reaches neither a value nor a gradient.
    """

    elements: torch.Size
    num_example_dims: int
    weights: Tensor | None = None
    index: Tensor | None = None

    @property
    def has_parts(self) -> bool:
        """Whether the elements are parts of examples."""
        return len(self.elements) > self.num_example_dims

    def take(self, t: Tensor) -> Tensor:
        """Return `[*elements, …]` without what the masked elements held."""
        if self.index is None:
            return t
        dims = len(self.elements)
        return t.flatten(0, dims - 1).index_select(0, self.index).unflatten(0, self.elements)

    def per_example(self, values: Tensor) -> Tensor:
        """Sum `[*elements, …]` over all that is inside of an example: weighted parts, and whatever follows them."""
        values = _sum_after(values, len(self.elements))
        if not self.has_parts:
            return values
        if self.weights is not None:
            values = torch.where(self.weights == 0, 0.0, self.weights.to(values.dtype) * values)
        return _sum_after(values, self.num_example_dims)

    def estimate_per_example(self, estimate: KLEstimate) -> KLEstimate:
        """Do the same with an estimate of batch shape `[*elements, …]`, its error included."""
        dims = len(self.elements)
        estimate = reduce_estimate(estimate, "none", dims)
        if not self.has_parts or self.weights is None:
            return reduce_estimate(estimate, "none", self.num_example_dims)
        return estimate.combine(self.weights.to(estimate.value.dtype), tuple(range(self.num_example_dims, dims)))

    def total(self, values: Tensor, reduction: str) -> Tensor:
        """Sum `[*elements, …]` over all that is inside of an example, and reduce the examples."""
        count = math.prod(self.elements)
        if reduction == "mean" and self.weights is None and count > 0:
            return values.sum() / count  # one pass
        return self.reduce(self.per_example(values), reduction)

    def reduce(self, per_example: Tensor, reduction: str) -> Tensor:
        """Reduce `[*examples]` to the mean, the sum, or (none) the weighted values."""
        return reduce(per_example, reduction, self.num_example_dims, self.example_weights)

    def average(self, values: Tensor) -> Tensor:
        """Return the mean over the examples of `[*elements, *latent]`: `[*parts, *latent]`."""
        if self.num_example_dims == 0:
            return values
        examples = tuple(range(self.num_example_dims))
        if self.weights is None:
            return values.mean(examples)
        weights = self.weights.to(values.dtype)
        weights = weights.reshape(weights.shape + (1,) * (values.dim() - weights.dim()))
        total = torch.where(weights == 0, 0.0, weights * values).sum(examples)
        count = self.example_weights
        return total if count is None else total / count.to(values.dtype).sum()

    @property
    def example_weights(self) -> Tensor | None:
        """How much every example counts; one that has parts, one, unless all of them are masked."""
        if self.weights is None or not self.has_parts:
            return self.weights
        return (self.weights != 0).flatten(self.num_example_dims).any(-1)


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
    if not is_traced() and bool(((lengths < 0) | (lengths > num_steps)).any()):
        raise ValueError(f"lengths must lie between 0 and the number of steps {num_steps}, got {lengths.tolist()}.")
    return torch.arange(num_steps, device=lengths.device) < lengths.unsqueeze(-1)


def _sum_after(values: Tensor, num_dims: int) -> Tensor:
    extra = values.dim() - num_dims
    return values.sum(tuple(range(-extra, 0))) if extra > 0 else values
