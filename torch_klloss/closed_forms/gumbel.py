"""Gumbel‖Gumbel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Gumbel

from torch_klloss.closed_forms.formula import register_formula
from torch_klloss.numerics.blocks import Derivatives
from torch_klloss.numerics.constants import EULER
from torch_klloss.numerics.elementary import common_dtype, has_float64
from torch_klloss.numerics.error_free import difference_error, quotient_error
from torch_klloss.numerics.exponentials import e2, expm1
from torch_klloss.numerics.gamma_function import (
    LARGEST_R,
    digamma_and_bregman_slope,
    gamma_times,
    log_gamma_and_bregman,
)

_LOWEST, _HIGHEST = -709.0, 2800.0  # of m, so that the fourth root of exp(-m) is a float64


def _direct(
    needs: Sequence[bool], q_loc: Tensor, q_scale: Tensor, p_loc: Tensor, p_scale: Tensor
) -> tuple[Tensor, Derivatives, Tensor]:
    per_scale = 1.0 / p_scale
    r, m = q_scale * per_scale, (q_loc - p_loc) * per_scale
    log_gamma = torch.lgamma(r)
    log_next = log_gamma + torch.log(r)  # of 1 + r
    grown = torch.exp(log_next - m)
    excess = grown - 1.0
    linear = EULER * (r - 1.0)
    value = excess - (log_next - m) + log_gamma + linear
    size = grown + 1.0 + log_next.abs() + m.abs() + log_gamma.abs() + linear.abs()
    by_p_loc = excess * per_scale if needs[0] or needs[2] else None
    by_q_loc = -by_p_loc if by_p_loc is not None and needs[0] else None
    by_q_scale = by_p_scale = None
    if needs[1] or needs[3]:
        digamma = torch.digamma(r)
        by_q_scale = (excess * (digamma + 1.0 / r) + digamma + EULER) * per_scale
        by_p_scale = torch.addcmul(excess * m * per_scale, r, by_q_scale, value=-1) if needs[3] else None
    derivatives = by_q_loc, by_q_scale if needs[1] else None, by_p_loc if needs[2] else None, by_p_scale
    return value, derivatives, size


def _partials(
    needs: Sequence[bool], q_loc: Tensor, q_scale: Tensor, p_loc: Tensor, p_scale: Tensor
) -> Sequence[Tensor | None]:
    by_q_scale = by_p_scale = None
    q_scale, p_scale = q_scale.double(), p_scale.double()
    r, x = q_scale / p_scale, (q_scale - p_scale) / p_scale
    m = (q_loc.double() - p_loc.double()) / p_scale
    log_gamma, _ = log_gamma_and_bregman(r, x)
    excess = expm1((log_gamma - m).clamp(max=709.0))  # inf would make NaN of products with 0
    by_p_loc = excess / p_scale if needs[0] or needs[2] else None
    by_q_loc = -by_p_loc if by_p_loc is not None and needs[0] else None
    if needs[1] or needs[3]:
        digamma, by_second = digamma_and_bregman_slope(r, x)
        by_q_scale = (by_second + excess * digamma) / p_scale if needs[1] else None
        by_p_scale = -(r * by_second + excess * (r * digamma - m)) / p_scale if needs[3] else None
    return by_q_loc, by_q_scale, by_p_loc, by_p_scale


@register_formula(Gumbel, "loc", "scale", partials=_partials, direct=_direct, needs_float64=True)
def kl(q_loc: Tensor, q_scale: Tensor, p_loc: Tensor, p_scale: Tensor) -> Tensor:
    """exp(w) - 1 - w + lgamma(r) + γ (r - 1) with r = βq/βp and w = lgamma(1 + r) - (μq - μp)/βp.

    Both parts are ≥ 0: the second is the Bregman divergence of lgamma between r and 1.

    References:
        *Statistics of extremes* (Gumbel, 1958), for E[exp(-r G)] = Γ(1 + r) of the standard Gumbel G.
    """
    exact = has_float64(q_loc, q_scale, p_loc, p_scale)
    dtype = common_dtype(q_loc, q_scale, p_loc, p_scale)
    q_loc, q_scale, p_loc, p_scale = (t.double() for t in (q_loc, q_scale, p_loc, p_scale))
    r, x, m = q_scale / p_scale, (q_scale - p_scale) / p_scale, (q_loc - p_loc) / p_scale
    log_gamma, second = log_gamma_and_bregman(r, x)
    w = log_gamma - m
    first = e2(w)
    if exact:
        lost_r = quotient_error(q_scale, p_scale, r)
        lost_m = quotient_error(q_loc - p_loc, p_scale, m) + difference_error(q_loc, p_loc) / p_scale
        digamma = torch.log(r + 0.56)  # of 1 + r, as good as a correction needs it
        kept = m.clamp(_LOWEST, _HIGHEST)
        large = gamma_times(r, torch.exp(-kept), torch.exp(-kept / 4.0)) * (1.0 + (digamma * lost_r - lost_m)) - 1.0 - w
        first = torch.where((w > 1) & (r < LARGEST_R) & (m > _LOWEST) & (m < _HIGHEST), large, first)
    return (first + second).to(dtype)
