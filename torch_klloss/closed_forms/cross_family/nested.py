"""Written formulas for families with common members, where the KL is 0: sums of parts ≥ 0 that vanish there.

isd(a, b) is a/b - 1 - log(a/b), lag(x) is x - log(1 + x), e2(x) is exp(x) - 1 - x, and Bl(x, y) is the Bregman
divergence of lgamma.
"""

from __future__ import annotations

import torch
import torch.distributions as dist
from torch import Tensor

from torch_klloss.closed_forms.cross_family.registration import cross_family
from torch_klloss.closed_forms.von_mises import _kl as von_mises_kl
from torch_klloss.numerics.constants import EULER
from torch_klloss.numerics.elementary import at_least, log_ratio
from torch_klloss.numerics.error_free import product_gap
from torch_klloss.numerics.gamma_function import log_gamma_and_bregman
from torch_klloss.numerics.lgamma import binet_digamma_difference, bregman
from torch_klloss.numerics.moments import exp_lead, generalised_kl, itakura_saito, log1p_lag


def lgamma_bregman(x: Tensor, y: Tensor) -> Tensor:
    """Return lgamma(x) - lgamma(y) - ψ(y) (x - y) ≥ 0."""
    return bregman(x, y) + generalised_kl(x, y, x - y)


@cross_family(dist.Weibull, dist.Exponential)
def weibull_exponential(scale: Tensor, k: Tensor, rate: Tensor) -> Tensor:
    """isd(λ E[x], 1) + Bl(1/k, 1): the part of the mean, and the KL from the Exponential of that mean."""
    return _weibull_gamma(scale, k, torch.ones_like(rate), rate)


@cross_family(dist.Weibull, dist.Gamma)
def _weibull_gamma(scale: Tensor, k: Tensor, shape: Tensor, rate: Tensor) -> Tensor:
    """α e2(log(β E[x]/α)) + Bl(1/k, 1) + B(α, 1) + (α - 1) (log E[x] - E[log x] - γ)."""
    one = torch.ones_like(k)
    log_factor, shapes = log_gamma_and_bregman(1 / k, (1 - k) / k)
    log_mean = log_ratio(rate * scale, shape, product_gap(rate, scale, shape, one)) + log_factor
    bend = log_factor - EULER * ((k - 1) / k)
    return shape * exp_lead(log_mean) + shapes + bregman(shape, one) + (shape - 1) * bend


@cross_family(dist.Exponential, dist.Weibull)
def exponential_weibull(rate: Tensor, scale: Tensor, k: Tensor) -> Tensor:
    """An Exponential is the Gamma of shape 1."""
    return _gamma_weibull(torch.ones_like(rate), rate, scale, k)


@cross_family(dist.Gamma, dist.Weibull)
def _gamma_weibull(shape: Tensor, rate: Tensor, scale: Tensor, k: Tensor) -> Tensor:
    """e2(L) + Bl(α + k, α + 1) + B(1, α) + lag(k - 1) - (k - 1) (α - 1)/α, L = log E[(x/λ)^k]."""
    one = torch.ones_like(shape)
    L = torch.lgamma(shape + k) - torch.lgamma(shape) - k * torch.log(rate * scale)
    shapes = lgamma_bregman(shape + k, shape + one) + bregman(one, shape)
    return exp_lead(L) + shapes + log1p_lag(k - 1) - (k - 1) * (shape - 1) / shape


@cross_family(dist.Kumaraswamy, dist.Uniform)
def kumaraswamy_uniform(a: Tensor, b: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """lag(1/a - 1) + lag(1/b - 1) - (1 - 1/a) (ψ(b + 1) - ψ(2)) and log(width)."""
    two = torch.full_like(b, 2.0)
    digammas = binet_digamma_difference(b - 1, b + 1, two) + log_ratio(b + 1, two, b - 1)
    flat = log1p_lag(1 / a - 1) + log1p_lag(1 / b - 1) - (a - 1) / a * digammas
    return flat + torch.log1p((high - 1) - low)


@cross_family(dist.GeneralizedPareto, dist.Exponential)
def generalized_pareto_exponential(loc: Tensor, scale: Tensor, c: Tensor, rate: Tensor) -> Tensor:
    """isd(λ (E[x] - μ), 1) + lag(-c) + λμ, with E[x] - μ = σ/(1 - c)."""
    one = torch.ones_like(rate)
    mean = itakura_saito(rate * scale, 1 - c, product_gap(rate, scale, one, 1 - c))
    return mean + log1p_lag(-c) + rate * loc


@cross_family(dist.GeneralizedPareto, dist.Uniform)
def generalized_pareto_uniform(loc: Tensor, scale: Tensor, c: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """lag(-c - 1), and the logarithm of p's width over q's, σ/(-c): for c < 0, where q has an upper end."""
    beyond = product_gap(high - loc, -c, scale, torch.ones_like(scale))
    return log1p_lag(-c - 1) + torch.log1p(((loc - low) * -c + beyond) / scale)


@cross_family(dist.Cauchy, dist.StudentT)
def cauchy_student_t(q_loc: Tensor, q_scale: Tensor, df: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Bl(½ν, ½) - Bl(½ν + ½, 1) - ½ (ν - 1) log(c/γ) + ½ (ν + 1) log(1 + ((c - γ)² + d²)/(4cγ)), c = σ√ν, d = μq - μ.

    For log((c + γ)² + d²) is the mean of log(c² + (x - μ)²); the last logarithm is the KL from the Cauchy of scale c.
    """
    root = df.sqrt()
    c, half = scale * root, df / 2
    gap = (scale - q_scale) + scale * ((df - 1) / (root + 1))
    shapes = lgamma_bregman(half, torch.full_like(half, 0.5)) - lgamma_bregman(half + 0.5, torch.ones_like(half))
    distance = torch.log1p(((gap / c) * (gap / q_scale) + ((q_loc - loc) / c) * ((q_loc - loc) / q_scale)) / 4)
    return shapes - (df - 1) / 2 * log_ratio(c, q_scale, gap) + (df + 1) / 2 * distance


@cross_family(dist.VonMises, dist.Uniform)
def von_mises_uniform(loc: Tensor, concentration: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The KL from the Uniform on the circle, which is a VonMises of concentration 0, and log(width/2π)."""
    zeros = torch.zeros_like(loc), torch.zeros_like(concentration)  # two, for a compiled Function takes no tensor twice
    beyond = ((high - torch.pi) - (low + torch.pi)) / (2 * torch.pi)
    return von_mises_kl(loc, concentration, *zeros) + torch.log1p(at_least(beyond, 0.0))
