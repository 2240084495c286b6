"""Means and variances, combined over batches and over ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_klloss.callbacks.watching import AllRanks, wide


@dataclass(frozen=True)
class Moments:
    """A weighted mean and variance that can be combined: the difference of two large sums would cancel.

    References:
        *Updating formulae and a pairwise algorithm for computing sample variances* (Chan et al., 1979).

    Examples:
        >>> import torch
        >>> from torch_klloss.callbacks.moments import Moments
        >>> ones = torch.ones(2)
        >>> both = Moments.of(torch.tensor([[1.0], [2.0]]), ones) + Moments.of(torch.tensor([[3.0], [6.0]]), ones)
        >>> both.mean.item(), both.variance.item()
        (3.0, 3.5)
    """

    weight: Tensor  # Σ w
    mean: Tensor  # Σ w x / Σ w, `[d]`; 0 without any weight
    square: Tensor  # Σ w (x - mean)², `[d]`

    @classmethod
    def of(cls, values: Tensor, weights: Tensor) -> Moments:
        """Return the moments of `[n, d]` values under `[n]` weights; a row of weight 0 is ignored."""
        kept = weights != 0
        values, weights = wide(values)[kept], wide(weights)[kept].unsqueeze(-1)
        total = weights.sum()
        mean = (weights * values).sum(0) / torch.where(total == 0, 1, total)
        return cls(total, mean, (weights * (values - mean).square()).sum(0))

    def __add__(self, other: Moments) -> Moments:
        weight = self.weight + other.weight
        part = other.weight / torch.where(weight == 0, 1, weight)
        difference = other.mean - self.mean
        square = self.square + other.square + self.weight * part * difference.square()
        return Moments(weight, self.mean + part * difference, square)

    def over_ranks(self, all_ranks: AllRanks) -> Moments:
        """Return the moments of the values of all ranks."""
        sums = all_ranks(torch.cat([self.weight.reshape(1), self.weight * self.mean]))
        weight = sums[0]
        mean = sums[1:] / torch.where(weight == 0, 1, weight)
        return Moments(weight, mean, all_ranks(self.square + self.weight * (self.mean - mean).square()))

    @property
    def variance(self) -> Tensor:
        """The variance of the values themselves, `[d]`, without the correction for a sample."""
        return self.square / self.weight
