"""Written formulas for a p on an interval, as in `to_line`: Beta, ContinuousBernoulli, Uniform."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Beta, ContinuousBernoulli, Uniform

from torch_klloss.closed_forms import dirichlet
from torch_klloss.closed_forms.cross_family.registration import cross_family, nowhere
from torch_klloss.closed_forms.cross_family.to_half_line import beta_exponential
from torch_klloss.numerics.constants import HALF_LOG_2PI
from torch_klloss.numerics.elementary import at_least, at_most, log_ratio, magnitude, within
from torch_klloss.numerics.error_free import product_gap
from torch_klloss.numerics.moments import stirling, tilt_divergence, tilt_log_norm, uniform_log_drop, uniform_log_width


def _beyond_unit(low: Tensor, high: Tensor) -> Tensor:
    return (low > 0) | (high < 1)


@cross_family(Beta, Uniform, infinite=lambda a, b, low, high: _beyond_unit(low, high))
def _beta_uniform(a: Tensor, b: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The KL from the Uniform on [0, 1], which is Beta(1, 1), and log(width); infinite unless p contains [0, 1]."""
    return _beta_beta(a, b, torch.ones_like(a), torch.ones_like(b)) + torch.log1p((high - 1) - low)


@cross_family(ContinuousBernoulli, Uniform, infinite=lambda log_odds, low, high: _beyond_unit(low, high))
def _continuous_bernoulli_uniform(log_odds: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The KL from the Uniform on [0, 1] and log(width); infinite unless p contains [0, 1]."""
    return tilt_divergence(magnitude(log_odds)) + torch.log1p((high - 1) - low)


@cross_family(Beta, ContinuousBernoulli, infinite=nowhere)
def _beta_continuous_bernoulli(a: Tensor, b: Tensor, log_odds: Tensor) -> Tensor:
    """With log-odds -t, p is an Exponential cut off at 1: the KL from that and log(1 - exp(-t)); mirrored for t < 0.

    For |t| < 2 it is rather the KL from the Uniform on [0, 1], log(norm of p) and -log-odds E[x].
    """
    t, mirrored = magnitude(log_odds), log_odds > 0
    cut = at_least(t, 2.0)
    falling = beta_exponential(torch.where(mirrored, b, a), torch.where(mirrored, a, b), cut)
    falling = falling + torch.log1p(-torch.exp(-cut))
    flat = _beta_beta(a, b, torch.ones_like(a), torch.ones_like(b)) + tilt_log_norm(at_most(t, 2.0))
    flat = flat - within(log_odds, -2.0, 2.0) * ((a - b) / (a + b) / 2)
    return torch.where(t > 2, falling, flat)


def _beta_beta(a: Tensor, b: Tensor, p_a: Tensor, p_b: Tensor) -> Tensor:
    return dirichlet.kl(torch.stack((a, b), -1), torch.stack((p_a, p_b), -1))


def _beyond_beta(low: Tensor, high: Tensor, *_: Tensor) -> Tensor:
    return (low < 0) | (high > 1)


@cross_family(Uniform, ContinuousBernoulli, infinite=_beyond_beta)
def _uniform_continuous_bernoulli(low: Tensor, high: Tensor, log_odds: Tensor) -> Tensor:
    """It is log(norm of p) - log(width) - log-odds E[x], from the end that p favours; infinite outside [0, 1]."""
    mirrored = log_odds < 0
    left, right = torch.where(mirrored, 1 - high, low), torch.where(mirrored, low, 1 - high)
    t = magnitude(log_odds)
    near, far = at_most(t, 1.0), at_least(t, 1.0)
    width = high - low
    flat = tilt_log_norm(near) + near * (right - left) / 2 - uniform_log_width(low, high)
    peaked = far * (right + right + width) / 2 - (far * width).log() + torch.log1p(-torch.exp(-far))
    return torch.where(t < 1, flat, peaked)


@cross_family(Uniform, Beta, infinite=_beyond_beta)
def _uniform_beta(low: Tensor, high: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """It is log B(a, b) - log(width) - (a - 1) E[log x] - (b - 1) E[log(1 - x)]; infinite outside [0, 1]."""
    is_near = torch.maximum((a - 1).abs(), (b - 1).abs()) < 0.5
    one = torch.ones_like(a)
    near = _uniform_flat_beta(low, high, torch.where(is_near, a, one), torch.where(is_near, b, one))
    far = _uniform_curved_beta(low, high, a, b)
    return torch.where(is_near, near, far) - uniform_log_width(low, high)


def _uniform_flat_beta(low: Tensor, high: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the KL without -log(width): the KL of Beta(1, 1), and what the ends change in 1 + E[log x] = 0."""
    one, rest, width = torch.ones_like(a), 1 - high, high - low
    left = torch.log1p(-rest) + (1 - uniform_log_drop(low, width))
    right = torch.log1p(-low) + (1 - uniform_log_drop(rest, width))
    return _beta_beta(one, one, a, b) - (a - 1) * left - (b - 1) * right


def _uniform_curved_beta(low: Tensor, high: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the KL without -log(width), from logarithms of x over p's mean and Stirling's formula for B(a, b)."""
    total, rest, width = a + b, 1 - high, high - low
    drop, rest_drop = uniform_log_drop(low, width), uniform_log_drop(rest, width)
    log_norm = stirling(a) + stirling(b) - stirling(total) + HALF_LOG_2PI + (total / a / b).log() / 2
    over_mean = log_ratio(high * total, a, product_gap(high, b, rest, a)) - drop
    rest_over_mean = log_ratio((1 - low) * total, b, product_gap(1 - low, a, low, b)) - rest_drop
    logs = (torch.log1p(-rest) - drop) + (torch.log1p(-low) - rest_drop)
    return log_norm + logs - (a * over_mean + b * rest_over_mean)
