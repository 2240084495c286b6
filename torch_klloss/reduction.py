"""Reduction of the KL: a sum over latent dimensions, a mask, and a mean or sum over examples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.distributions.batch_dims import replace_examples
from torch_klloss.estimate import KLEstimate
from torch_klloss.numerics.arguments import check_integer
from torch_klloss.numerics.devices import can_be_read
from torch_klloss.numerics.dimensions import sum_after
from torch_klloss.numerics.graph import with_gradient_if

ReductionName = Literal["mean", "sum", "none"]


def check_reduction(reduction: str, batch_dims: int) -> None:
    """Raise a ValueError if `reduction` is unknown or `batch_dims` is not an integer of at least 0."""
    if reduction not in get_args(ReductionName):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}.")
    check_integer("batch_dims", batch_dims, at_least=0)


def expand_mask(mask: Tensor, examples: torch.Size, of: str = "of the examples") -> Tensor:
    """Return the mask in the shape of the examples, or of what `of` says.

    Raises:
        TypeError: if the mask is not a tensor.
        ValueError: if it does not broadcast to the shape.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, bool or of weights, got {type(mask).__name__}.")
    try:
        return mask.expand(examples)
    except RuntimeError:
        hint = "; batch_dims says how many leading dimensions index examples." if of == "of the examples" else "."
        raise ValueError(
            f"mask must have, or broadcast to, the shape {of} {tuple(examples)}, got {tuple(mask.shape)}{hint}"
        ) from None


def reduce(value: Tensor, reduction: str, batch_dims: int, mask: Tensor | None = None) -> Tensor:
    """Sum all dimensions after the first `batch_dims`, then reduce the examples.

    Args:
        value: the KL, `[*batch]`.
        reduction: "mean" divides by the number of examples, or by the mask's sum; never by the latent size.
        batch_dims: how many leading dimensions index independent examples.
        mask: bool or weights, of the shape of the examples. An element of weight zero gives zero, even if NaN.

    Raises:
        ValueError: if "mean" has no example, or a mask that sums to zero; that mean is NaN where `is_zero` cannot tell.
    """
    value = sum_after(value, batch_dims)
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
    """Return whether a number is known to be zero; False while traced and on accelerators, which are not waited for."""
    return can_be_read(total) and bool(total == 0)


@dataclass(frozen=True)
class Batch:
    """The examples of a batch and the weights of its elements.

    An element is an example, or a part of one: a mask `[batch, time]` over examples `[batch]` weighs their steps.

    Attributes:
        elements: the shape of the elements, `[*examples, *parts]`.
        num_example_dims: how many of its dimensions index examples.
        weights: of the elements, `[*elements]`; None if all count alike.
        index: for every element, flat, the element to read: itself, or for a masked element one that counts. Masked
            values, NaN included, then reach neither a value nor a gradient.
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
        """Return `[*elements, …]` with every masked element replaced by one that counts."""
        if self.index is None:
            return t
        dims = len(self.elements)
        t = t.flatten(0, dims - 1).index_select(0, self.index).unflatten(0, self.elements)
        if self.weights is None or can_be_read(self.weights):
            return t
        return with_gradient_if((self.weights != 0).any(), t)

    def replace(self, d: Distribution, batch_shape: torch.Size, samples: tuple[int, ...] = ()) -> Distribution:
        """Return d with the parameters of every masked element replaced by those of one that counts.

        Args:
            d: a distribution; one that has no elements of its own comes back as it is.
            batch_shape: the batch shape `[*samples, *elements, …]` of the pair that d belongs to.
            samples: the shape of the draws before the elements.
        """
        if self.weights is None:
            return d
        return replace_examples(d, (self.weights != 0).expand((*samples, *self.elements)), batch_shape)

    def per_example(self, values: Tensor) -> Tensor:
        """Sum `[*elements, …]` within every example: the weighted parts, and all dimensions after them."""
        values = sum_after(values, len(self.elements))
        if not self.has_parts:
            return values
        if self.weights is not None:
            values = torch.where(self.weights == 0, 0.0, self.weights.to(values.dtype) * values)
        return sum_after(values, self.num_example_dims)

    def estimate_per_example(self, estimate: KLEstimate) -> KLEstimate:
        """Return the sums of `per_example` of an estimate of batch shape `[*elements, …]`, with their errors."""
        dims = len(self.elements)
        estimate = reduce_estimate(estimate, "none", dims)
        if not self.has_parts or self.weights is None:
            return reduce_estimate(estimate, "none", self.num_example_dims)
        return estimate.combine(self.weights.to(estimate.value.dtype), tuple(range(self.num_example_dims, dims)))

    def total(self, values: Tensor, reduction: str) -> Tensor:
        """Sum `[*elements, …]` within every example, and reduce the examples."""
        count = math.prod(self.elements)
        if reduction == "mean" and self.weights is None and count > 0:
            return values.sum() / count  # one pass
        return self.reduce(self.per_example(values), reduction)

    def reduce(self, per_example: Tensor, reduction: str) -> Tensor:
        """Reduce `[*examples]` to the mean, the sum, or (none) the weighted values."""
        return reduce(per_example, reduction, self.num_example_dims, self.example_weights)

    def average(self, values: Tensor) -> Tensor:
        """Return the mean over the examples of the weighted `[*elements, *latent]`: `[*parts, *latent]`."""
        examples = tuple(range(self.num_example_dims))
        if self.weights is None:
            return values.mean(examples) if examples else values
        weights = self.weights.to(values.dtype)
        weights = weights.reshape(weights.shape + (1,) * (values.dim() - weights.dim()))
        total = torch.where(weights == 0, 0.0, weights * values)
        total = total.sum(examples) if examples else total
        count = self.example_weights
        return total if count is None else total / count.to(values.dtype).sum()

    @property
    def example_weights(self) -> Tensor | None:
        """The weights of the examples; an example with parts has weight one, or zero if all its parts are masked."""
        if self.weights is None or not self.has_parts:
            return self.weights
        return (self.weights != 0).flatten(self.num_example_dims).any(-1)
