"""Points and their weights in one object: E_q[f] ≈ Σ wᵢ f(xᵢ).

The weights are 1/S for S samples from q, q(x) dx on a grid, and q(x) on an enumerated support. Points come with their
weights, so that no caller multiplies by the density, or does so twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.distributions.precision import HALF
from torch_klloss.distributions.tensors import dtype_of
from torch_klloss.numerics.dimensions import sum_last


@dataclass(frozen=True)
class Points:
    """Points of q, with the weights of an expectation under q.

    Attributes:
        x: the points, `[n, *batch, *event]`.
        weights: non-negative, summing to one over the n; `[n, *batch]`, or broadcasting to it.
        num_replicates: the number of independent randomisations that the points are made of, each of n / num_replicates
            points; n itself for independent draws, and None if nothing is random. A part of a longer draw (see
            samplers/draws.py) has the weights and the replicates of the whole.
        log_q: log q(x) `[n, *batch]`, with every gradient, where q gave it together with x; else None.

    Examples:
        >>> import torch
        >>> from torch_klloss.samplers import Points
        >>> die = Points(torch.arange(1.0, 7.0), torch.full((6,), 1 / 6), num_replicates=None)
        >>> die.expectation(die.x)
        tensor(3.5000)
    """

    x: Tensor
    weights: Tensor
    num_replicates: int | None
    log_q: Tensor | None = None

    def expectation(self, f: Tensor, summed: int = 0) -> Tensor:
        """Return Σ wᵢ fᵢ over the points. Shape: f is `[n, *batch]`, the result `[*batch]`.

        Args:
            f: the values at the points.
            summed: how many of the last dimensions of the result are summed.
        """
        return sum_last((self.weights * f).sum(0), summed)

    def std_error(self, f: Tensor, summed: int = 0) -> Tensor | None:
        """Return the standard error of the expectation, from the spread of the replicates' means.

        None if nothing is random; NaN for a single replicate. No gradient flows through it.

        Args:
            f: the values at the points, `[n, *batch]`.
            summed: as in `expectation`. The sum is taken point by point, before its spread.
        """
        replicates = self.num_replicates
        if replicates is None:
            return None
        if replicates == 1 or f.numel() == 0:
            return torch.full_like(sum_last(f[0], summed), torch.nan, requires_grad=False)
        return self._means(f, replicates, summed).std(0) / replicates**0.5

    def skewness(self, f: Tensor, summed: int = 0) -> Tensor | None:
        """Return the skewness of the expectation: the sample skewness of the replicates' means, over √R.

        None if nothing is random; 0 if all means are equal, or for one or two replicates. No gradient flows through it.

        Args:
            f: the values at the points, `[n, *batch]`.
            summed: as in `std_error`.
        """
        replicates = self.num_replicates
        if replicates is None:
            return None
        if replicates < 3 or f.numel() == 0:
            return torch.zeros_like(sum_last(f[0], summed), requires_grad=False)
        means = self._means(f, replicates, summed)
        centred = means - means.mean(0)
        return skewness_of_mean((centred**2).sum(0), (centred**3).sum(0))

    def _means(self, f: Tensor, replicates: int, summed: int) -> Tensor:
        """Return the means over the replicates, `[R, *batch]`."""
        terms = (self.weights * f).detach().unflatten(0, (replicates, -1))
        return sum_last(terms.sum(1), summed) * replicates


def skewness_of_mean(squares: Tensor, cubes: Tensor) -> Tensor:
    """Return the skewness of a mean over independent numbers, from the sums of powers of their deviations.

    It is 1/√n times their own skewness √n Σd³ / (Σd²)^1.5, and 0 if they are all equal.
    """
    return (cubes / (squares * squares.sqrt())).nan_to_num(0.0, 0.0, 0.0)


class Sampler(Protocol):
    """An object that returns points of q together with their weights.

    `draw` is all that is needed. Randomness comes from torch's global streams, which the methods set by their
    `generator`; processes that train together draw different points if each has its own seed, as in
    `torch.manual_seed(seed + rank)`. Batch elements must be independent of one another, and `num_replicates` has to
    count the independent replicates: the spread of dependent points is no error. A sampler that also has `prepare`
    (samplers/draws.py) can be evaluated in chunks without storing all of its points.

    Examples:
        The same random shift of S equal strata:

        >>> import torch
        >>> from torch.distributions import Normal, StudentT
        >>> from torch_klloss.methods import MonteCarlo
        >>> from torch_klloss.samplers import Points
        >>> from torch_klloss.samplers.transport import num_uniforms, transport
        >>> class Systematic:
        ...     def draw(self, q, num_samples, *, differentiable):
        ...         strata = torch.arange(num_samples).reshape(-1, *(1,) * len(q.batch_shape), 1)
        ...         u = (strata + torch.rand(*q.batch_shape, num_uniforms(q))) / num_samples
        ...         x = transport(q, u.clamp(1e-7, 1 - 1e-7), differentiable=differentiable)
        ...         weights = torch.full((num_samples, *(1,) * len(q.batch_shape)), 1 / num_samples)
        ...         return Points(x, weights, num_replicates=1)
        >>> estimate = MonteCarlo(4096, sampler=Systematic()).estimate(Normal(0.0, 1.0), StudentT(4.0))
        >>> round(estimate.value.item(), 2), estimate.std_error
        (0.05, tensor(nan))
    """

    def draw(self, q: Distribution, num_samples: int, *, differentiable: bool) -> Points:
        """Return `num_samples` points of q, reparameterised (`rsample`) if `differentiable`."""
        ...


def evenly_weighted(
    q: Distribution, x: Tensor, num_samples: int, num_replicates: int, log_q: Tensor | None = None
) -> Points:
    """Return points of q with the weight 1/S each, S being `num_samples`; x may be a part of them."""
    shape = (x.shape[0],) + (1,) * len(q.batch_shape)
    dtype = x.dtype if x.is_floating_point() else dtype_of(q)
    dtype = torch.float32 if dtype in HALF else dtype  # 1/3 has three digits in bfloat16
    weights = torch.full(shape, 1 / num_samples, dtype=dtype, device=x.device)
    return Points(x, weights, num_replicates, log_q)
