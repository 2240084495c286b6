"""Independent draws."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributions import Distribution

from torch_klloss.rebuild import dtype_of
from torch_klloss.samplers.points import Points


@dataclass(frozen=True)
class IID:
    """Draw independent samples from q, each with the weight 1/S.

    The error of an expectation falls as S^-1/2.

    Example:
        >>> import torch
        >>> from torch_klloss.samplers import IID
        >>> points = IID().draw(torch.distributions.Normal(torch.zeros(3), 1.0), 8, differentiable=False)
        >>> points.x.shape, points.expectation(torch.ones(8, 3))
        (torch.Size([8, 3]), tensor([1., 1., 1.]))
    """

    def draw(self, q: Distribution, num_samples: int, *, differentiable: bool) -> Points:
        """Return independent points of q, reparameterised (`rsample`) if `differentiable`."""
        x = q.rsample((num_samples,)) if differentiable else q.sample((num_samples,))
        shape = (num_samples,) + (1,) * len(q.batch_shape)
        weights = torch.full(shape, 1 / num_samples, dtype=dtype_of(q), device=x.device)
        return Points(x, weights, num_replicates=num_samples)
