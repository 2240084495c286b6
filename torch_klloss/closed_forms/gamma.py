"""Gamma‖Gamma, which Chi2 inherits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Gamma

from torch_klloss.closed_forms.formula import register_formula
from torch_klloss.numerics import lgamma_at_once as at_once
from torch_klloss.numerics.blocks import Derivatives
from torch_klloss.numerics.elementary import has_float64, isd_from_gap, log_ratio, quotient
from torch_klloss.numerics.error_free import product_error
from torch_klloss.numerics.lgamma import binet_digamma_difference, binet_trigamma, bregman, trigamma
from torch_klloss.numerics.lgamma_at_once import Arguments, divergence_and_slope


def _direct(
    needs: Sequence[bool], q_shape: Tensor, q_rate: Tensor, p_shape: Tensor, p_rate: Tensor
) -> tuple[Tensor, Derivatives, Tensor]:
    """Log Γ(αp)/Γ(αq) + (αq - αp) ψ(αq) - αp log r + αq (r - 1) of the ratio r of the rates."""
    ratio, step, digamma = p_rate / q_rate, q_shape - p_shape, torch.digamma(q_shape)
    log_ratio = torch.log(ratio)
    terms = torch.lgamma(p_shape), -torch.lgamma(q_shape), step * digamma, -p_shape * log_ratio, q_shape * (ratio - 1.0)
    size = sum((t.abs() for t in terms), p_shape + q_shape * ratio)
    gap_over_rate = (q_shape * p_rate - p_shape * q_rate) / q_rate
    derivatives = (
        torch.addcmul(ratio - 1.0, step, trigamma(q_shape)) if needs[0] else None,
        -gap_over_rate / q_rate if needs[1] else None,
        torch.digamma(p_shape) - digamma - log_ratio if needs[2] else None,
        gap_over_rate / p_rate if needs[3] else None,
    )
    return sum(terms[1:], terms[0]), derivatives, size


def _partials(
    needs: Sequence[bool], q_shape: Tensor, q_rate: Tensor, p_shape: Tensor, p_rate: Tensor
) -> Sequence[Tensor | None]:
    gap, scaled_q, scaled_p = _means(q_shape, q_rate, p_shape, p_rate)
    q_shape, q_rate, p_shape, p_rate = q_shape.double(), q_rate.double(), p_shape.double(), p_rate.double()
    by_q_shape = (q_shape - p_shape) * binet_trigamma(q_shape) + gap / q_rate / q_shape if needs[0] else None
    by_q_rate = -gap / q_rate / q_rate if needs[1] else None
    by_p_shape = None
    if needs[2]:
        digammas = binet_digamma_difference(p_shape - q_shape, p_shape, q_shape)
        by_p_shape = digammas - log_ratio(scaled_q, scaled_p, gap)
    by_p_rate = gap / q_rate / p_rate if needs[3] else None
    return by_q_shape, by_q_rate, by_p_shape, by_p_rate


def _whole(
    needs: Sequence[bool], q_shape: Tensor, q_rate: Tensor, p_shape: Tensor, p_rate: Tensor
) -> tuple[Tensor, Derivatives]:
    """The formula of `_kl`, by few operations."""
    q_shape, q_rate, p_shape, p_rate = torch.broadcast_tensors(
        *(t.double() for t in (q_shape, q_rate, p_shape, p_rate))
    )
    scaled_q, scaled_p, step = q_shape * p_rate, p_shape * q_rate, p_shape - q_shape
    gap = scaled_q - scaled_p
    value, by_p_shape = divergence_and_slope(Arguments(p_shape, q_shape, step, (scaled_q, scaled_p), gap))
    over_rate = gap / q_rate
    return value, (
        torch.addcmul(over_rate / q_shape, step, at_once.binet_trigamma(q_shape), value=-1) if needs[0] else None,
        quotient(over_rate, q_rate, times=-1) if needs[1] else None,
        by_p_shape if needs[2] else None,
        over_rate / p_rate if needs[3] else None,
    )


@register_formula(Gamma, "concentration", "rate", partials=_partials, direct=_direct, whole=_whole, needs_float64=True)
def _kl(q_shape: Tensor, q_rate: Tensor, p_shape: Tensor, p_rate: Tensor) -> Tensor:
    """αp (m - 1 - log m) + B(αp, αq), with m the ratio of the means and B of `bregman`: two terms, each ≥ 0.

    Computed in float64, whatever the dtype of the parameters.

    References:
        *Rényi divergence measures for commonly used univariate continuous distributions* (Gil, Alajaji and Linder,
        2013), for the KL that this rearranges.
    """
    alpha_q, alpha_p = q_shape.double(), p_shape.double()
    return alpha_p * isd_from_gap(*_means(q_shape, q_rate, p_shape, p_rate)) + bregman(alpha_p, alpha_q)


def _means(q_shape: Tensor, q_rate: Tensor, p_shape: Tensor, p_rate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return αq βp - αp βq, exact but for the last rounding, and both products, with the ratio of the means."""
    has_all_digits = not has_float64(q_shape, q_rate, p_shape, p_rate)
    q_shape, q_rate, p_shape, p_rate = q_shape.double(), q_rate.double(), p_shape.double(), p_rate.double()
    scaled_q, scaled_p = q_shape * p_rate, p_shape * q_rate
    gap = scaled_q - scaled_p
    if not has_all_digits:
        lost = product_error(q_shape, p_rate, scaled_q) - product_error(p_shape, q_rate, scaled_p)
        gap = gap + lost.detach()
    return gap, scaled_q, scaled_p
