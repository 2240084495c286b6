"""Pairs of draws that mirror one another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.samplers.draws import Draws, PreparedSampler, noise_in_blocks
from torch_klloss.samplers.transport import TransportedDraws, cells_of


@dataclass(frozen=True)
class Antithetic(PreparedSampler):
    """Draws pairs of points at the levels u and 1 - u of q, so that their errors cancel in part.

    Expectations are unbiased. For an integrand that is odd about the median of q they are exact. For an even one, such
    as a quadratic log-ratio centred on q, the variance doubles: both points of a pair have the same value. The error
    comes from independent pairs, with S/2 - 1 degrees of freedom (NaN for a single pair).

    Examples:
        >>> import torch
        >>> from torch.distributions import Normal
        >>> from torch_klloss.samplers import Antithetic
        >>> points = Antithetic().draw(Normal(torch.tensor(5.0), 1.0), 2, differentiable=False)
        >>> points.expectation(points.x), points.num_replicates
        (tensor(5.), 1)
    """

    def prepare(self, q: Distribution, num_samples: int, *, differentiable: bool) -> Draws:
        """Return the draws, the two of a pair side by side."""
        if num_samples % 2:
            raise ValueError(f"Antithetic draws pairs and needs an even num_samples, got {num_samples}; or use IID().")
        cells = cells_of(q)
        pairs = noise_in_blocks(cells.random, num_samples // 2, cells.device)

        def noise(start: int, stop: int) -> Tensor:
            k = pairs(start // 2, -(-stop // 2))
            both = torch.stack([k, 2**cells.bits - 1 - k], 1).flatten(0, 1)
            return both[start % 2 : start % 2 + stop - start]

        return TransportedDraws(q, cells, noise, num_samples, num_samples // 2, differentiable)
