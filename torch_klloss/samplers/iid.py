"""Independent draws."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.distributions.simplify import diagonal_normal_of
from torch_klloss.distributions.tensors import device_of
from torch_klloss.numerics.tracing import is_func_transformed
from torch_klloss.samplers.draws import Draws, Noise, PreparedSampler, noise_in_blocks
from torch_klloss.samplers.points import Points, evenly_weighted


@dataclass(frozen=True)
class IID(PreparedSampler):
    """Draws independent samples from q, each with the weight 1/S.

    The error of an expectation falls as S^-1/2, and is estimated from the spread of the draws.

    Example:
        >>> import torch
        >>> from torch_klloss.samplers import IID
        >>> points = IID().draw(torch.distributions.Normal(torch.zeros(3), 1.0), 8, differentiable=False)
        >>> points.x.shape, points.expectation(torch.ones(8, 3))
        (torch.Size([8, 3]), tensor([1., 1., 1.]))
    """

    def prepare(self, q: Distribution, num_samples: int, *, differentiable: bool) -> Draws:
        """Return the draws, which are computed in parts.

        Under `torch.func`, draws from a Normal are made of standard noise: torch's own know no randomness="different".
        """

        def make(n: int) -> Tensor:
            if is_func_transformed() and (normal := diagonal_normal_of(q)) is not None:
                loc, scale = normal.loc, normal.scale
                x = loc + scale * torch.randn(n, *loc.shape, dtype=loc.dtype, device=loc.device)
                return x if differentiable else x.detach()
            shape = torch.Size((n,))  # not a tuple: other libraries ask it for its numel()
            return q.rsample(shape) if differentiable else q.sample(shape)

        return _IndependentDraws(q, num_samples, noise_in_blocks(make, num_samples, device_of(q)))


@dataclass(frozen=True)
class _IndependentDraws:
    q: Distribution
    num_samples: int
    noise: Noise

    def part(self, start: int, stop: int) -> Points:
        return evenly_weighted(self.q, self.noise(start, stop), self.num_samples, self.num_samples)
