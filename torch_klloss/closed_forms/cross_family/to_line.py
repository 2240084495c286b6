"""Written formulas for a p on the whole line: Normal, Gumbel, Laplace.

KL(q‖p) = KL(q‖p*) + KL(p*‖p) where p* is the member of p's family with the moments of q that its log-density needs: two
parts, each ≥ 0, and the first depends only on the shape of q. The formulas are this sum, or as near to it as p's family
allows. Entropy and cross-entropy, large and of opposite sign, would cancel. Differences that decide how near q and p
are, as of a mean and a location, are corrected by their rounding errors.

References:
    *Rényi divergence measures for commonly used univariate continuous distributions* (Gil, Alajaji and Linder, 2013).
    *Information geometry and its applications* (Amari, 2016), section 1.6, for the sum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import (
    Beta,
    ContinuousBernoulli,
    Exponential,
    Gamma,
    Gumbel,
    Laplace,
    Normal,
    Pareto,
    Uniform,
)

from torch_klloss.closed_forms.cross_family.registration import cross_family, nowhere
from torch_klloss.numerics.constants import EULER, HALF_LOG_2PI
from torch_klloss.numerics.elementary import at_least, magnitude
from torch_klloss.numerics.error_free import multiple, product_error, product_gap, quotient_error, sum_error
from torch_klloss.numerics.exponentials import expm1
from torch_klloss.numerics.moments import (
    beta_excess,
    beta_mean_gap,
    beta_std,
    exp_lead,
    gamma_excess,
    itakura_saito,
    log1p_lag,
    pareto_tail_drop,
    tilt_divergence,
    tilt_log_norm,
    tilt_mean,
    tilt_std,
)

# Constants as a float64 and the rest of their digits.
_EULER = (EULER, -4.942915152430645e-18)
_PI_OVER_ROOT_6 = (1.282549830161864, 1.6029947261005143e-17)
_ROOT_2 = (1.4142135623730951, -9.667293313452913e-17)
_OVER_ROOT_12 = (0.28867513459481287, 1.6725140369678172e-17)


# p a Normal. p* has the mean and the variance of q; KL(q‖p*), the excess of q, is ½ log(2πe variance) - entropy.


def _to_normal(
    excess: Tensor | float, mean_gap: Tensor, std: Tensor, scale: Tensor, lost: Tensor | float = 0.0
) -> Tensor:
    """Return the excess and KL(p*‖p); `lost` is the rounding error of the standard deviation, if known."""
    gap = (std - scale) + lost
    return excess + (itakura_saito(std, scale, gap) + ((mean_gap / scale).square() + (gap / scale).square()) / 2)


@cross_family(Beta, Normal, infinite=nowhere)
def _beta_normal(a: Tensor, b: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The mean is a/S, the variance ab/(S²(S + 1)), S = a + b. The excess goes to 0 as the Beta becomes Normal."""
    std, lost = beta_std(a, b)
    return _to_normal(beta_excess(a, b), beta_mean_gap(a, b, loc), std, scale, lost)


@cross_family(ContinuousBernoulli, Normal, infinite=nowhere)
def _continuous_bernoulli_normal(log_odds: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The entropy is minus the KL from the Uniform on [0, 1]."""
    t = magnitude(log_odds)
    std, lost = tilt_std(t)
    from_end, lost_end = tilt_mean(t)
    rest = 1 - loc
    lost_rest = sum_error(torch.ones_like(loc), -loc, rest)
    mean_gap = torch.where(log_odds < 0, (from_end - loc) + lost_end, (rest - from_end) + (lost_rest - lost_end))
    return _to_normal(HALF_LOG_2PI + 0.5 + std.log() + tilt_divergence(t), mean_gap, std, scale, lost)


@cross_family(Exponential, Normal, infinite=nowhere)
def _exponential_normal(rate: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The mean and the standard deviation are 1/λ, the entropy 1 - log λ."""
    mean_gap = product_gap(torch.ones_like(rate), torch.ones_like(rate), rate, loc) / rate
    std = 1 / rate
    return _to_normal(HALF_LOG_2PI - 0.5, mean_gap, std, scale, quotient_error(torch.ones_like(rate), rate, std))


@cross_family(Gamma, Normal, infinite=nowhere)
def _gamma_normal(shape: Tensor, rate: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The mean is α/β, the variance α/β². The excess goes to 0 as the Gamma becomes Normal."""
    mean_gap = product_gap(shape, torch.ones_like(rate), rate, loc) / rate
    root = shape.sqrt()
    std = root / rate
    lost = quotient_error(root, rate, std) + quotient_error(shape, root, root) / rate / 2
    return _to_normal(gamma_excess(shape), mean_gap, std, scale, lost)


@cross_family(Gumbel, Normal, infinite=nowhere)
def _gumbel_normal(q_loc: Tensor, q_scale: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The mean is μ + γβ, the variance (πβ)²/6, the entropy log β + 1 + γ."""
    std, lost = multiple(_PI_OVER_ROOT_6, q_scale)
    offset, lost_offset = multiple(_EULER, q_scale)
    gap = q_loc - loc
    mean_gap = (gap + offset) + (sum_error(q_loc, -loc, gap) + lost_offset)
    return _to_normal(HALF_LOG_2PI + math.log(_PI_OVER_ROOT_6[0]) - 0.5 - EULER, mean_gap, std, scale, lost)


@cross_family(Laplace, Normal, infinite=nowhere)
def _laplace_normal(q_loc: Tensor, q_scale: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The variance is 2b², the entropy log(2b) + 1."""
    std, lost = multiple(_ROOT_2, q_scale)
    return _to_normal(0.5 * math.log(math.pi) - 0.5, q_loc - loc, std, scale, lost)


@cross_family(Pareto, Normal, infinite=lambda start, alpha, loc, scale: alpha <= 2)
def _pareto_normal(start: Tensor, alpha: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The variance is s²α/((α - 1)²(α - 2)), and infinite up to α = 2; the mean is s + s/(α - 1).

    The excess is ½ log(2π) - ½ - 1/α - log(1 - 1/α) - ½ log(1 - 2/α).
    """
    std = start / (alpha - 1) * (alpha / (alpha - 2)).sqrt()
    excess = HALF_LOG_2PI - 0.5 + pareto_tail_drop(alpha) - torch.log1p(-2 / alpha) / 2
    return _to_normal(excess, (start - loc) + start / (alpha - 1), std, scale)


@cross_family(Uniform, Normal, infinite=nowhere)
def _uniform_normal(low: Tensor, high: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The variance is (width)²/12, the entropy log(width)."""
    left, right, width = low - loc, high - loc, high - low
    std, lost = multiple(_OVER_ROOT_12, width)
    lost = lost + _OVER_ROOT_12[0] * sum_error(high, -low, width)
    mean_gap = ((left + right) + (sum_error(low, -loc, left) + sum_error(high, -loc, right))) / 2
    return _to_normal(HALF_LOG_2PI + 0.5 - 0.5 * math.log(12), mean_gap, std, scale, lost)


# p a Gumbel. With L = log E[exp(-(x - μ)/β)] the KL is exp(L) - 1 - L ≥ 0 and the least that a μ can make of it, where
# L = 0: 1 + log β - entropy + E[x]/β + log E[exp(-x/β)].


@cross_family(Exponential, Gumbel, infinite=nowhere)
def _exponential_gumbel(rate: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The least is t - log(t (1 + t)) with t = 1/(λβ), and L = μ/β - log(1 + t)."""
    t = 1 / (rate * scale)
    return log1p_lag(t) - t.log() + exp_lead(loc / scale - torch.log1p(t))


@cross_family(Gamma, Gumbel, infinite=nowhere)
def _gamma_gumbel(shape: Tensor, rate: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The least is 1 - entropy + log β + α (t - log(1 + t)) with t = 1/(rate β), and L = μ/β - α log(1 + t)."""
    t = 1 / (rate * scale)
    bend = shape * log1p_lag(t)
    least = gamma_excess(shape) + (0.5 - HALF_LOG_2PI) - shape.log() / 2 - t.log() + bend
    near = product_gap(rate, loc, shape, torch.ones_like(shape)) / (rate * scale) + bend
    return least + exp_lead(torch.where(t < 1, near, loc / scale - shape * torch.log1p(t)))


@cross_family(Normal, Gumbel, infinite=nowhere)
def _normal_gumbel(q_loc: Tensor, q_scale: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The least is 1 - ½ log 2π + ½ (s² - 1) - log s with s = σ/β, and L = ½ s² - (μq - μ)/β."""
    s, x, gap = q_scale / scale, (q_scale - scale) / scale, q_loc - loc
    mean, square = gap / scale, s * s
    rounded = square / 2 - mean
    lost_square = product_error(s, s, square) + 2 * s * quotient_error(q_scale, scale, s)
    lost_mean = quotient_error(gap, scale, mean) + sum_error(q_loc, -loc, gap) / scale
    lost = (lost_square / 2 - lost_mean + sum_error(square / 2, -mean, rounded)).detach()
    L = rounded + lost
    first = exp_lead(L) + torch.where(L < 700, expm1(L.clamp_max(700.0)) * sum_error(rounded, lost, L), 0.0).detach()
    return (1 - HALF_LOG_2PI) + (itakura_saito(q_scale, scale, q_scale - scale) + x * x / 2) + first


@cross_family(Uniform, Gumbel, infinite=nowhere)
def _uniform_gumbel(low: Tensor, high: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The least is 1 - log w + log(sinh(w/2)/(w/2)) with w = width/β; L = log((1 - exp(-w))/w) - (low - μ)/β."""
    w = (high - low) / scale
    log_norm, large = tilt_log_norm(w), at_least(w, 1.0)
    from_low = torch.where(w < 1, log_norm - w / 2, torch.log(-expm1(-large) / large))
    return (1 + log_norm - w.log()) + exp_lead(from_low - (low - loc) / scale)


# p a Laplace.


@cross_family(Normal, Laplace, infinite=nowhere)
def _normal_laplace(q_loc: Tensor, q_scale: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """With m = E|x - μ| it is m/b - 1 - log(m/b), and 1 + log(2m) - entropy.

    At z = (μq - μ)/σ, m/σ = √(2/π) exp(-z²/2) + z erf(z/√2).
    """
    z = (q_loc - loc) / q_scale
    spread = math.sqrt(2 / math.pi) * torch.exp(-z * z / 2) + z * torch.erf(z / math.sqrt(2))
    mean = spread * q_scale
    return itakura_saito(mean, scale, mean - scale) + spread.log() + (math.log(2) + 0.5 - HALF_LOG_2PI)
