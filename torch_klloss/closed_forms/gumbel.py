"""Gumbel‖Gumbel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Gumbel

from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.numerics.custom_gradient import analytic
from torch_klloss.numerics.elementary import common_dtype, difference_error, e2, has_float64, horner, x_minus_log1p
from torch_klloss.numerics.lgamma import product_error

_EULER = 0.5772156649015329
_NEAR = 0.25
_LOWEST, _HIGHEST = -709.0, 2800.0  # of m, so that the fourth root of exp(-m) is a float64
_FAR = 450.0  # r beyond which Γ(1 + r) exp(-m) is the exponential of a sum, in float64 good to r log r units
# ζ(k) - 1 for k = 2, 3, …, with alternating signs: lgamma(2 + x) = (1 - γ) x + Σ ± (ζ(k) - 1) x^k / k.
_ZETA = (
    0.6449340668482264,
    -0.2020569031595943,
    0.08232323371113819,
    -0.03692775514336993,
    0.01734306198444914,
    -0.008349277381922827,
    0.00407735619794434,
    -0.0020083928260822143,
    0.0009945751278180853,
    -0.0004941886041194645,
    0.0002460865533080483,
    -0.00012271334757848915,
    6.124813505870483e-05,
    -3.058823630702049e-05,
    1.528225940865187e-05,
    -7.637197637899763e-06,
    3.81729326499984e-06,
    -1.908212716553939e-06,
    9.539620338727962e-07,
)
_ZETA_OVER_K = tuple(c / k for k, c in enumerate(_ZETA, start=2))
# Stirling's series, in 1/r²; good to 1e-16 for r ≥ 8.
_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156, -3617 / 122400)


@register_kl(Gumbel, Gumbel)
def _gumbel_gumbel(q: Gumbel, p: Gumbel) -> Tensor:
    """exp(w) - 1 - w + lgamma(r) + γ (r - 1) with r = βq/βp and w = lgamma(1 + r) - (μq - μp)/βp.

    Both parts are ≥ 0: the second is the Bregman divergence of lgamma between r and 1.

    References:
        *Statistics of extremes* (Gumbel, 1958), for E[exp(-r G)] = Γ(1 + r) of the standard Gumbel G.
    """
    return _kl(q.loc, q.scale, p.loc, p.scale)


def _partials(
    needs: Sequence[bool], q_loc: Tensor, q_scale: Tensor, p_loc: Tensor, p_scale: Tensor
) -> Sequence[Tensor | None]:
    by_q_loc = by_q_scale = by_p_loc = by_p_scale = None
    q_scale, p_scale = q_scale.double(), p_scale.double()
    r, x = q_scale / p_scale, (q_scale - p_scale) / p_scale
    m = (q_loc.double() - p_loc.double()) / p_scale
    log_gamma, _ = _log_gamma(r, x)
    excess = torch.expm1((log_gamma - m).clamp(max=709.0))  # inf would make NaN of products with 0
    if needs[0] or needs[2]:
        by_p_loc = excess / p_scale
        by_q_loc = -by_p_loc if needs[0] else None
    if needs[1] or needs[3]:
        t = x.clamp(-_NEAR, _NEAR)
        near = t / (1 + t) + t * horner(t, _ZETA)
        digamma = torch.digamma(1 + r)
        by_second = torch.where(x.abs() < _NEAR, near, digamma - 1 / r + _EULER)
        by_q_scale = (by_second + excess * digamma) / p_scale if needs[1] else None
        by_p_scale = -(r * by_second + excess * (r * digamma - m)) / p_scale if needs[3] else None
    return by_q_loc, by_q_scale, by_p_loc, by_p_scale


@analytic(_partials)
def _kl(q_loc: Tensor, q_scale: Tensor, p_loc: Tensor, p_scale: Tensor) -> Tensor:
    exact = has_float64(q_loc, q_scale, p_loc, p_scale)
    dtype = common_dtype(q_loc, q_scale, p_loc, p_scale)
    q_loc, q_scale, p_loc, p_scale = (t.double() for t in (q_loc, q_scale, p_loc, p_scale))
    r, x, m = q_scale / p_scale, (q_scale - p_scale) / p_scale, (q_loc - p_loc) / p_scale
    log_gamma, second = _log_gamma(r, x)
    w = log_gamma - m
    first = e2(w, series=exact)
    if exact:
        lost_r = _lost(q_scale, r, p_scale)
        lost_m = _lost(q_loc - p_loc, m, p_scale) + difference_error(q_loc, p_loc) / p_scale
        digamma = torch.log(r + 0.56)  # of 1 + r, as good as a correction needs it
        large = _gamma_over_exp(r, m) * (1 + (digamma * lost_r - lost_m)) - 1 - w
        first = torch.where((w > 1) & (r < _FAR) & (m > _LOWEST) & (m < _HIGHEST), large, first)
    return (first + second).to(dtype)


def _log_gamma(r: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return lgamma(1 + r), and the Bregman divergence lgamma(r) + γ (r - 1) ≥ 0, for x = r - 1."""
    is_near, t = x.abs() < _NEAR, x.clamp(-_NEAR, _NEAR)
    series = t * t * horner(t, _ZETA_OVER_K)
    log_gamma = torch.where(is_near, t * (1 - _EULER) + series, torch.lgamma(1 + r))
    far = log_gamma - torch.log(r) + _EULER * (r - 1)
    return log_gamma, torch.where(is_near, x_minus_log1p(t) + series, far)


def _gamma_over_exp(r: Tensor, m: Tensor) -> Tensor:
    """Return Γ(1 + r) exp(-m), where the exponential of the rounded sum of the logarithms would lose digits.

    By Stirling's formula from r = 8 on, as the fourth power of a root that neither over- nor underflows: each factor is
    good to the last place.
    """
    m, small, large = m.clamp(_LOWEST, _HIGHEST), r.clamp(max=8), r.clamp(8, _FAR)
    series = horner(1 / (large * large), _STIRLING) / large
    root = torch.pow(large, large / 4) * torch.exp(-large / 4) * torch.exp(-m / 4)
    stirling = (root * root) * (torch.sqrt(2 * math.pi * large) * torch.exp(series)) * (root * root)
    return torch.where(r < 8, torch.exp(torch.lgamma(1 + small)) * torch.exp(-m), stirling)


def _lost(a: Tensor, quotient: Tensor, b: Tensor) -> Tensor:
    """Return a/b - quotient, where the quotient is a/b rounded."""
    product = quotient * b
    return ((a - product) - product_error(quotient, b, product)) / b
