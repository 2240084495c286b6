"""Written formulas for a p on the half-line, as in `to_line`: Gamma, Exponential, Pareto.

isd(a, b) is a/b - 1 - log(a/b) ≥ 0 throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Beta, ContinuousBernoulli, Exponential, Gamma, Pareto, Uniform

from torch_klloss.closed_forms.cross_family.registration import cross_family, nowhere
from torch_klloss.numerics.constants import HALF_LOG_2PI
from torch_klloss.numerics.elementary import at_least, log_ratio, magnitude
from torch_klloss.numerics.error_free import product_error, product_gap, quotient_error, sum_error
from torch_klloss.numerics.exponentials import expm1
from torch_klloss.numerics.lgamma import bregman
from torch_klloss.numerics.moments import (
    generalised_kl,
    itakura_saito,
    pareto_tail_drop,
    stirling,
    stirling_bregman_gap,
    stirling_gap,
    stirling_slope,
    stirling_slope_gap,
    tilt_divergence,
    tilt_mean,
    uniform_jensen_gap,
    uniform_log_drop,
)

# p a Gamma or an Exponential. With R Stirling's remainder, D = log E[x] - E[log x] ≥ 0 and m = β E[x] the KL is
# α log(α/m) - α + m + R(α) + ½ log(2π/α) + (α - 1) D - (entropy - log E[x]).


def _to_gamma(shape: Tensor, m: Tensor, gap: Tensor, rest: Tensor) -> Tensor:
    """Return the part of the mean, from gap = α - m, plus the part of the shape and the rest."""
    return generalised_kl(shape, m, gap) + (stirling(shape) + HALF_LOG_2PI - shape.log() / 2) + rest


def _to_exponential(rate: Tensor, mean: Tensor, lost: Tensor | float = 0.0) -> Tensor:
    """Return isd(λ E[x], 1) + 1: the KL but for log E[x] - entropy; `lost` is the rounding error of the mean."""
    one = torch.ones_like(rate)
    return itakura_saito(rate * mean, one, product_gap(rate, mean, one, one) + rate * lost) + 1


@cross_family(Exponential, Gamma, infinite=nowhere)
def _exponential_gamma(q_rate: Tensor, shape: Tensor, rate: Tensor) -> Tensor:
    """An Exponential is the Gamma of shape 1."""
    return _gamma_gamma(torch.ones_like(shape), q_rate, shape, rate)


@cross_family(Gamma, Exponential, infinite=nowhere)
def _gamma_exponential(q_shape: Tensor, q_rate: Tensor, rate: Tensor) -> Tensor:
    """An Exponential is the Gamma of shape 1."""
    return _gamma_gamma(q_shape, q_rate, torch.ones_like(rate), rate)


def _gamma_gamma(q_shape: Tensor, q_rate: Tensor, shape: Tensor, rate: Tensor) -> Tensor:
    means = generalised_kl(shape * q_rate, q_shape * rate, product_gap(shape, q_rate, q_shape, rate))
    return means / q_rate + bregman(shape, q_shape)


@cross_family(Beta, Gamma, infinite=nowhere)
def _beta_gamma(a: Tensor, b: Tensor, shape: Tensor, rate: Tensor) -> Tensor:
    """α isd(βa/S, α) + ½ isd(αb, aS) + a/(2bS) and differences of Stirling's remainder R, with S = a + b.

    These are R(α) - R(a) - (α - a) R'(a) + (α - a) R'(S) + R(S) - R(b) - (b - 1) (R'(S) - R'(b)). Written so, it keeps
    its digits where it is small: where (α, β) is near (a, S) for a large b, and where both are nearly Normal.
    """
    total = a + b
    lost = sum_error(a, b, total)
    mean = generalised_kl(shape * total, rate * a, product_gap(shape, total, rate, a) + shape * lost) / total
    spread = itakura_saito(shape * b, a * total, product_gap(shape, b, a, total) - a * lost)
    rest = (shape - a) * stirling_slope(total) + stirling_gap(a, total, b) - (b - 1) * stirling_slope_gap(a, total, b)
    return mean + spread / 2 + (a / total / b / 2 + stirling_bregman_gap(shape, a) + rest)


@cross_family(Beta, Exponential, infinite=nowhere)
def beta_exponential(a: Tensor, b: Tensor, rate: Tensor) -> Tensor:
    """An Exponential is the Gamma of shape 1."""
    return _beta_gamma(a, b, torch.ones_like(rate), rate)


@cross_family(ContinuousBernoulli, Exponential, infinite=nowhere)
def _continuous_bernoulli_exponential(log_odds: Tensor, rate: Tensor) -> Tensor:
    """With log-odds -t it is isd(λ, t) - log(1 - exp(-t)) + (t - λ)/(exp(t) - 1): an Exponential that is cut off at 1.

    For t < 1 it is rather the KL from the Uniform on [0, 1], isd(λ E[x], 1) and 1 + log E[x].
    """
    t, size = at_least(-log_odds, 1.0), magnitude(at_least(log_odds, -1.0))
    falling = itakura_saito(rate, t, rate - t) - torch.log1p(-torch.exp(-t)) + (t - rate) / expm1(t)
    from_end = tilt_mean(size)[0]
    mean = torch.where(log_odds < 0, from_end, 1 - from_end)
    other = tilt_divergence(size) + _to_exponential(rate, mean) + mean.log()
    return torch.where(log_odds < -1, falling, other)


@cross_family(Pareto, Gamma, infinite=lambda start, alpha, shape, rate: alpha <= 1)
def _pareto_gamma(start: Tensor, alpha: Tensor, shape: Tensor, rate: Tensor) -> Tensor:
    """E[x] = sα/(α - 1), infinite up to α = 1; D = -1/α - log(1 - 1/α), entropy - log E[x] = 1 - D - log α."""
    m, m_start = rate * start * (alpha / (alpha - 1)), rate * start
    gap = product_gap(shape, alpha - 1, m_start, alpha) - product_error(rate, start, m_start).detach() * alpha
    return _to_gamma(shape, m, gap / (alpha - 1), shape * pareto_tail_drop(alpha) + alpha.log() - 1)


@cross_family(Pareto, Exponential, infinite=lambda start, alpha, rate: alpha <= 1)
def _pareto_exponential(start: Tensor, alpha: Tensor, rate: Tensor) -> Tensor:
    """With E[x] = sα/(α - 1), infinite up to α = 1, it is isd(λ E[x], 1) + D + log α."""
    less = alpha - 1
    ratio = alpha / less
    mean = start * ratio
    lost_ratio = quotient_error(alpha, less, ratio) - ratio / less * sum_error(alpha, -torch.ones_like(alpha), less)
    lost = (product_error(start, ratio, mean) + start * lost_ratio).detach()
    return _to_exponential(rate, mean, lost) - 1 + pareto_tail_drop(alpha) + alpha.log()


@cross_family(Uniform, Gamma, infinite=lambda low, high, shape, rate: low < 0)
def _uniform_gamma(low: Tensor, high: Tensor, shape: Tensor, rate: Tensor) -> Tensor:
    """The entropy is log(width); infinite unless q lives on the positive numbers."""
    mean, width = (low + high) / 2, high - low
    rest = (shape - 1) * uniform_jensen_gap(low, width) + (mean / width).log()
    m = rate * mean
    return _to_gamma(shape, m, product_gap(shape, torch.ones_like(rate), rate, mean), rest)


@cross_family(Uniform, Exponential, infinite=lambda low, high, rate: low < 0)
def _uniform_exponential(low: Tensor, high: Tensor, rate: Tensor) -> Tensor:
    """It is isd(λ E[x], 1) + 1 + log(E[x]/width); infinite unless q lives on the positive numbers."""
    total = low + high
    return _to_exponential(rate, total / 2, sum_error(low, high, total) / 2) + (total / 2 / (high - low)).log()


@cross_family(Uniform, Pareto, infinite=lambda low, high, start, alpha: low < start)
def _uniform_pareto(low: Tensor, high: Tensor, start: Tensor, alpha: Tensor) -> Tensor:
    """It is (α + 1) E[log(x/s)] - log(α width/s); infinite where q begins below s."""
    width = high - low
    log_mean = log_ratio(high, start, high - start) - uniform_log_drop(low, width)
    return (alpha + 1) * log_mean - (alpha * width / start).log()
