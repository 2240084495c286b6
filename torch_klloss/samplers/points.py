"""Points and their weights, in one object: E_q[f] ≈ Σ wᵢ f(xᵢ).

Samples from q weigh 1/S each, a grid weighs q(x) dx, an enumerated support weighs q(x). Because the points know their
weights, nobody has to multiply by the density, and nobody can do it twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution


@dataclass(frozen=True)
class Points:
    """Hold points of q with the weights of an expectation under q.

    Attributes:
        x: the points, `[n, *batch, *event]`.
        weights: non-negative, summing to one over the n; `[n, *batch]`, or broadcasting to it.
        num_replicates: how many independent randomisations the points are made of, each n / num_replicates points
            long; n itself for independent draws, and None where nothing is random.

    Example:
        >>> import torch
        >>> from torch_klloss.samplers import Points
        >>> die = Points(torch.arange(1.0, 7.0), torch.full((6,), 1 / 6), num_replicates=None)
        >>> die.expectation(die.x)
        tensor(3.5000)
    """

    x: Tensor
    weights: Tensor
    num_replicates: int | None

    def expectation(self, f: Tensor, summed: int = 0) -> Tensor:
        """Return Σ wᵢ fᵢ over the points. Shape: f is `[n, *batch]`, the result `[*batch]`.

        Args:
            f: the values at the points.
            summed: how many of the last dimensions of the result are summed.
        """
        return _sum_last((self.weights * f).sum(0), summed)

    def std_error(self, f: Tensor, summed: int = 0) -> Tensor | None:
        """Return the standard error of the expectation, from the spread of the replicates' means.

        None where nothing is random; NaN where a single replicate cannot tell. No gradient flows through it.

        Args:
            f: the values at the points, `[n, *batch]`.
            summed: as in `expectation`. The sum is taken point by point, before its spread.
        """
        replicates = self.num_replicates
        if replicates is None:
            return None
        if replicates == 1 or f.numel() == 0:
            return torch.full_like(_sum_last(f[0], summed), torch.nan, requires_grad=False)
        terms = (self.weights * f).detach().unflatten(0, (replicates, -1))
        means = _sum_last(terms.sum(1), summed) * replicates
        return means.std(0) / replicates**0.5


def _sum_last(t: Tensor, dims: int) -> Tensor:
    return t.sum(tuple(range(-dims, 0))) if dims else t


class Sampler(Protocol):
    """An object that hands out points of q together with their weights."""

    def draw(self, q: Distribution, num_samples: int, *, differentiable: bool) -> Points:
        """Return `num_samples` points of q, reparameterised (`rsample`) if `differentiable`."""
        ...
