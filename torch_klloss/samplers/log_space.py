"""Families whose draws underflow, in the space of their logarithms.

A Gamma of shape 0.01 puts a tenth of its mass below 1e-100. As G(a) has the law of G(a + 1) U^(1/a), its logarithm is
drawn without that loss; a Beta is a ratio of two such, and a Dirichlet a softmax.

References:
    *A simple method for generating gamma variables* (Marsaglia and Tsang, 2000).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from torch_klloss.samplers.quantiles import log_gamma_quantile, logit_beta_quantile
from torch_klloss.samplers.transport import register_transport


class LogGamma(Distribution):
    """The logarithm of a Gamma of rate 1."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real
    has_rsample = True

    def __init__(self, concentration: Tensor) -> None:
        self.concentration = concentration
        super().__init__(concentration.shape, validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Return draws."""
        return log_gamma(self.concentration, self._extended_shape(torch.Size(sample_shape)))


class LogitBeta(Distribution):
    """The logit of a Beta: the difference of the logarithms of two Gammas."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real
    has_rsample = True

    def __init__(self, concentration1: Tensor, concentration0: Tensor) -> None:
        self.concentration1, self.concentration0 = torch.broadcast_tensors(concentration1, concentration0)
        super().__init__(self.concentration1.shape, validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Return draws."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return log_gamma(self.concentration1, shape) - log_gamma(self.concentration0, shape)


class LogDirichlet(Distribution):
    """The logarithms of a Dirichlet: of Gammas, less that of their sum."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, concentration: Tensor) -> None:
        self.concentration = concentration
        super().__init__(concentration.shape[:-1], concentration.shape[-1:], validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Return draws."""
        return log_gamma(self.concentration, self._extended_shape(torch.Size(sample_shape))).log_softmax(-1)


def log_gamma(concentration: Tensor, shape: torch.Size) -> Tensor:
    """Return logarithms of Gammas of rate 1, with a pathwise gradient to the concentration."""
    a = concentration.expand(shape)
    is_small = a < 1
    whole = torch.distributions.Gamma(a + is_small.to(a.dtype), torch.ones_like(a), validate_args=False).rsample()
    log_uniform = -torch.empty_like(a).detach().exponential_()
    return whole.log() + torch.where(is_small, log_uniform / a, 0.0)


@register_transport(LogGamma)
def log_gamma_transport(q: LogGamma, u: Tensor) -> Tensor:
    """Return quantiles."""
    return log_gamma_quantile(q.concentration, u).to(u)


@register_transport(LogitBeta)
def logit_beta(q: LogitBeta, u: Tensor) -> Tensor:
    """Return quantiles."""
    return logit_beta_quantile(q.concentration1, q.concentration0, u).to(u)


@register_transport(LogDirichlet, lambda q: q.event_shape[-1] - 1)
def log_dirichlet(q: LogDirichlet, u: Tensor) -> Tensor:
    """Return points by breaking a stick: the k-th takes a Beta(α_k, α_{k+1} + … + α_K) share of the rest."""
    a = q.concentration
    rest = a.flip(-1).cumsum(-1).flip(-1)[..., 1:]
    y = logit_beta_quantile(a[..., :-1], rest, u)
    log_left = torch.nn.functional.logsigmoid(-y).cumsum(-1)
    log_left = torch.nn.functional.pad(log_left, (1, 0))
    log_share = torch.nn.functional.pad(torch.nn.functional.logsigmoid(y), (0, 1))
    return (log_left + log_share).to(u)
