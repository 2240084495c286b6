"""The logistic distribution, for which torch has a recipe but no class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid


class Logistic(Distribution):
    """The distribution of loc + scale · log(u / (1 - u)) for u uniform on (0, 1).

    torch's recipe is a `TransformedDistribution` of a Uniform, whose density fails where u rounds to 0 or 1: beyond 37
    scales from the centre in float64, and 17 in float32.

    Args:
        loc: the centre, `[*batch]`.
        scale: positive, `[*batch]`.
        validate_args: as in torch.

    Examples:
        >>> from torch_klloss.distributions.logistic import Logistic
        >>> Logistic(0.0, 1.0).log_prob(torch.tensor(100.0))
        tensor(-100.)
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012
    support = constraints.real
    has_rsample = True

    def __init__(self, loc: Tensor | float, scale: Tensor | float, validate_args: bool | None = None) -> None:
        self.loc, self.scale = broadcast_all(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Logistic:
        """Return the distribution with its batch dimensions expanded."""
        new: Logistic = self._get_checked_instance(Logistic, _instance)
        Logistic.__init__(new, self.loc.expand(batch_shape), self.scale.expand(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """The centre."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """π²/3 scale²."""
        return self.scale.square() * (torch.pi**2 / 3)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log σ(z) + log σ(-z) - log scale of z = (value - loc)/scale."""
        if self._validate_args:
            self._validate_sample(value)
        z = (value - self.loc) / self.scale
        return logsigmoid(z) + logsigmoid(-z) - self.scale.log()

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Return draws, by the quantile function."""
        shape = self._extended_shape(torch.Size(sample_shape))
        u = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.icdf(u.clamp_min(torch.finfo(u.dtype).tiny))

    def cdf(self, value: Tensor) -> Tensor:
        """Return the probability of a draw below the value."""
        return torch.sigmoid((value - self.loc) / self.scale)

    def icdf(self, value: Tensor) -> Tensor:
        """Return the quantile."""
        return self.loc + self.scale * torch.logit(value)
