"""Log-densities that stay accurate far out in the tails and close to the ends, where torch's are not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    ContinuousBernoulli,
    Distribution,
    GeneralizedPareto,
    InverseGamma,
    Kumaraswamy,
    MixtureSameFamily,
    RelaxedBernoulli,
    VonMises,
    Weibull,
)
from torch.nn.functional import softplus

from torch_klloss.distributions.supports import log_prob_within
from torch_klloss.numerics.elementary import magnitude


def log_density(d: Distribution, x: Tensor, contains_support: bool | Tensor | None) -> Tensor:
    """Return log d(x) `[*nodes, *batch]`, -inf outside d's support.

    Args:
        d: the distribution, unvalidated.
        x: points `[*nodes, *batch]`.
        contains_support: what `contained` returned for the distribution that the points belong to.
    """
    if contains_support is not True:
        return log_prob_within(d, x, contains_support, x.shape)
    if type(d) is MixtureSameFamily and type(d.component_distribution) in _FORMULAS:
        components = log_density(d.component_distribution, d._pad(x), True)
        return (components + d.mixture_distribution.logits.log_softmax(-1)).logsumexp(-1)
    formula = _FORMULAS.get(type(d))
    return log_prob_within(d, x, True, x.shape) if formula is None else formula(d, x)


def _generalized_pareto(d: GeneralizedPareto, x: Tensor) -> Tensor:
    """Return log d(x); torch's refuses every dtype but the default one."""
    c, z = d.concentration, (x - d.loc) / d.scale
    is_zero = c.abs() < 1e-12
    kept = torch.where(is_zero, 1.0, c)
    bent = (1 + 1 / kept) * torch.log1p(torch.where(is_zero, 0.0, kept * z))
    return -torch.where(is_zero, z * (1 + c * (1 - z / 2)), bent) - d.scale.log()


def _inverse_gamma(d: InverseGamma, x: Tensor) -> Tensor:
    """Return log d(x); torch's loses the slope of 1/x where that underflows."""
    a, rate = d.concentration, d.rate
    return a * rate.log() - a.lgamma() - (a + 1) * x.log() - rate / x


def _weibull(d: Weibull, x: Tensor) -> Tensor:
    """Return log d(x); torch's loses the slope of a power where that underflows."""
    k, log_ratio = d.concentration, x.log() - d.scale.log()
    return k.log() - d.scale.log() + (k - 1) * log_ratio - (k * log_ratio).exp()


def _kumaraswamy(d: Kumaraswamy, x: Tensor) -> Tensor:
    """Return log d(x); torch's computes a chain of powers that rounds to infinity near 0 and 1."""
    a, b = d.concentration1, d.concentration0
    log_x = x.log()
    return a.log() + b.log() + (a - 1) * log_x + (b - 1) * _log1mexp(a * log_x)


def _von_mises(d: VonMises, x: Tensor) -> Tensor:
    """Return log d(x); torch's normaliser has seven digits."""
    c = d.concentration
    return -2 * c * torch.sin((x - d.loc) / 2) ** 2 - torch.special.i0e(c).log() - math.log(2 * math.pi)


def _relaxed_bernoulli(d: RelaxedBernoulli, x: Tensor) -> Tensor:
    """Return log d(x); torch's rounds points below 1e-38 to 0."""
    log_x, log_rest = x.log(), torch.log1p(-x)
    gap = d.logits - d.temperature * (log_x - log_rest)
    return torch.as_tensor(d.temperature).log() + gap - 2 * softplus(gap, threshold=700) - log_x - log_rest


def _continuous_bernoulli(d: ContinuousBernoulli, x: Tensor) -> Tensor:
    """Return log d(x); torch's loses its normaliser at log-odds beyond 30."""
    half = magnitude(d.logits) / 2
    near = half < 0.03  # three terms of the series of log(sinh(h)/h) are enough here
    square, far = half**2, torch.where(near, 1.0, half)
    series = square / 6 - square**2 / 180 + square**3 / 2835
    log_norm = torch.where(near, series, far + torch.log1p(-torch.exp(-2 * far)) - (2 * far).log())
    return d.logits * (x - 0.5) - log_norm


def _log1mexp(y: Tensor) -> Tensor:
    """Return log(1 - exp(y)) for y < 0."""
    near = y > -0.6931
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, y, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, y))),
    )


_FORMULAS: dict[type[Distribution], Callable[[Any, Tensor], Tensor]] = {
    ContinuousBernoulli: _continuous_bernoulli,
    GeneralizedPareto: _generalized_pareto,
    InverseGamma: _inverse_gamma,
    Kumaraswamy: _kumaraswamy,
    RelaxedBernoulli: _relaxed_bernoulli,
    VonMises: _von_mises,
    Weibull: _weibull,
}
