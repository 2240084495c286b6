"""The gamma function at 1 + r: its logarithm around r = 1, and its product with a factor of the opposite size.

The functions take both r and x = r - 1, for the digits of x that r has lost.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_klloss.numerics.constants import EULER
from torch_klloss.numerics.elementary import at_most, horner, within, x_minus_log1p

LARGEST_R = 450.0  # beyond which the fourth root of Γ(1 + r) is no float64
_NEAR = 0.25
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


def log_gamma_and_bregman(r: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return lgamma(1 + r), and the Bregman divergence lgamma(r) + γ (r - 1) ≥ 0, for x = r - 1."""
    is_near, t = x.abs() < _NEAR, x.clamp(-_NEAR, _NEAR)
    series = t * t * horner(t, _ZETA_OVER_K)
    log_gamma = torch.where(is_near, t * (1.0 - EULER) + series, torch.lgamma(1.0 + r))
    far = log_gamma - torch.log(r) + EULER * (r - 1.0)
    return log_gamma, torch.where(is_near, x_minus_log1p(t) + series, far)


def digamma_and_bregman_slope(r: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ψ(1 + r), and the derivative of the Bregman divergence, ψ(r) + γ, for x = r - 1."""
    t = x.clamp(-_NEAR, _NEAR)
    near = t / (1.0 + t) + t * horner(t, _ZETA)
    digamma = torch.digamma(1.0 + r)
    return digamma, torch.where(x.abs() < _NEAR, near, digamma - 1.0 / r + EULER)


def gamma_times(r: Tensor, factor: Tensor, fourth_root: Tensor) -> Tensor:
    """Return Γ(1 + r) times a factor, where the exponential of the sum of their logarithms would lose digits.

    By Stirling's formula from r = 8 on, as the fourth power of a root that neither over- nor underflows: each factor is
    good to the last place.
    """
    small, large = at_most(r, 8.0), within(r, 8.0, LARGEST_R)
    series = horner(1.0 / (large * large), _STIRLING) / large
    root = torch.pow(large, large / 4.0) * torch.exp(-large / 4.0) * fourth_root
    stirling = (root * root) * (torch.sqrt(2.0 * math.pi * large) * torch.exp(series)) * (root * root)
    return torch.where(r < 8, torch.exp(torch.lgamma(1.0 + small)) * factor, stirling)
