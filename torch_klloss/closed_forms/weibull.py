"""Weibull‖Weibull."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Weibull

from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.numerics.custom_gradient import custom_gradient
from torch_klloss.numerics.elementary import common_dtype, has_float64, log_ratio
from torch_klloss.numerics.error_free import quotient_error
from torch_klloss.numerics.exponentials import e2, expm1
from torch_klloss.numerics.gamma_function import (
    LARGEST_R,
    digamma_and_bregman_slope,
    gamma_times,
    log_gamma_and_bregman,
)

_LARGEST = 709.0  # argument of the exponential
_LOWEST = -2800.0  # log of the power, so that its fourth root is a float64


@register_kl(Weibull, Weibull)
def _weibull_weibull(q: Weibull, p: Weibull) -> Tensor:
    """exp(w) - 1 - w + lgamma(r) + γ (r - 1) with r = kp/kq and exp(w) = Γ(1 + r) (λq/λp)^kp.

    Both parts are ≥ 0: it is the KL of two Gumbels, the negative logarithms.

    References:
        *Computing the Kullback-Leibler divergence between two Weibull distributions* (Bauckhage, 2013), rearranged.
    """
    return _kl(q.scale, q.concentration, p.scale, p.concentration)


def _partials(
    needs: Sequence[bool], q_scale: Tensor, q_shape: Tensor, p_scale: Tensor, p_shape: Tensor
) -> Sequence[Tensor | None]:
    q_scale, q_shape, p_scale, p_shape = (t.double() for t in (q_scale, q_shape, p_scale, p_shape))
    by_q_shape = by_p_shape = None
    r, x, log_scales = _ratios(q_scale, q_shape, p_scale, p_shape)
    log_gamma, _ = log_gamma_and_bregman(r, x)
    excess = expm1((log_gamma + p_shape * log_scales).clamp(max=_LARGEST))
    by_q_scale = excess * p_shape / q_scale if needs[0] else None
    by_p_scale = -excess * p_shape / p_scale if needs[2] else None
    if needs[1] or needs[3]:
        digamma, by_second = digamma_and_bregman_slope(r, x)
        by_r = by_second + excess * digamma
        by_q_shape = -by_r * r / q_shape if needs[1] else None
        by_p_shape = by_r / q_shape + excess * log_scales if needs[3] else None
    return by_q_scale, by_q_shape, by_p_scale, by_p_shape


@custom_gradient(_partials)
def _kl(q_scale: Tensor, q_shape: Tensor, p_scale: Tensor, p_shape: Tensor) -> Tensor:
    given = q_scale, q_shape, p_scale, p_shape
    exact = has_float64(*given)
    q_scale, q_shape, p_scale, p_shape = (t.double() for t in given)
    r, x, log_scales = _ratios(q_scale, q_shape, p_scale, p_shape)
    log_gamma, second = log_gamma_and_bregman(r, x)
    log_power = p_shape * log_scales
    w = log_gamma + log_power
    first = e2(w)
    if exact:
        ratio = q_scale / p_scale
        lost_log = quotient_error(q_scale, p_scale, ratio) / ratio * p_shape
        lost = torch.log(r + 0.56) * quotient_error(p_shape, q_shape, r) + lost_log
        large = gamma_times(r, torch.pow(ratio, p_shape), torch.pow(ratio, p_shape / 4)) * (1 + lost) - 1 - w
        reaches = (w > 1) & (r < LARGEST_R) & (log_power > _LOWEST) & (log_power < _LARGEST)
        first = torch.where(reaches, large, first)
    return (first + second).to(common_dtype(*given))


def _ratios(q_scale: Tensor, q_shape: Tensor, p_scale: Tensor, p_shape: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return kp/kq, how much that exceeds 1, and log(λq/λp)."""
    return p_shape / q_shape, (p_shape - q_shape) / q_shape, log_ratio(q_scale, p_scale, q_scale - p_scale)
