"""A Normal given by its log-variance, against any other Normal: the posterior of a VAE and a learned prior."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Normal

from torch_klloss.closed_forms import normal
from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.distributions.families import LogVarNormal
from torch_klloss.numerics.blocks import Derivatives
from torch_klloss.numerics.custom_gradient import formula_of
from torch_klloss.numerics.elementary import has_digits_to_spare, narrowed
from torch_klloss.numerics.exponentials import growth
from torch_klloss.numerics.quick_kernels import narrow_or_wide


@formula_of
@narrow_or_wide
def kl_of_log_variances(
    needs: Sequence[bool], q_loc: Tensor, q_logvar: Tensor, p_loc: Tensor, p_logvar: Tensor
) -> tuple[Tensor, Derivatives]:
    """½ ((μq - μp)² exp(-vp) + exp(x) - 1 - x) with x = vq - vp; both terms are ≥ 0."""
    grown, lead = growth(q_logvar, p_logvar)
    gap, precision = q_loc - p_loc, torch.exp(-p_logvar)
    by_q_loc = gap * precision
    value = torch.addcmul(lead, gap, by_q_loc) * 0.5
    by_p_logvar = torch.addcmul(grown, gap, by_q_loc) * -0.5 if needs[3] else None
    by_p_loc = -by_q_loc if needs[2] else None
    return value, (by_q_loc if needs[0] else None, grown * 0.5 if needs[1] else None, by_p_loc, by_p_logvar)


@formula_of
@narrow_or_wide
def kl_to_scale(
    needs: Sequence[bool], q_loc: Tensor, q_logvar: Tensor, p_loc: Tensor, p_scale: Tensor
) -> tuple[Tensor, Derivatives]:
    """½ (((μq - μp)/σp)² + r - 1 - log r) with r = exp(vq)/σp²; both terms are ≥ 0.

    Where no digits are to spare, r is the square of exp(½ vq)/σp, so that the KL is exactly 0 at equal scales.
    """
    if not has_digits_to_spare(q_loc):
        q_scale = torch.exp(0.5 * q_logvar)
        value, (by_q_loc, by_scale, by_p_loc, by_p_scale) = normal.kernel(needs, q_loc, q_scale, p_loc, p_scale)
        return value, (by_q_loc, None if by_scale is None else by_scale * q_scale / 2.0, by_p_loc, by_p_scale)
    wide_scale = p_scale.double()
    ratio = torch.exp(q_logvar.double()) / (wide_scale * wide_scale)
    grown, distance = ratio - 1.0, (q_loc - p_loc) / p_scale
    lead = grown - torch.log(ratio)  # both of the rounded ratio, whose rounding drops out
    value = torch.addcmul(narrowed(lead, distance), distance, distance) / 2.0
    grown = narrowed(grown, distance) if needs[1] or needs[3] else grown
    by_q_loc = distance / p_scale if needs[0] or needs[2] else None
    by_p_loc = -by_q_loc if by_q_loc is not None and needs[2] else None
    by_p_scale = torch.addcmul(grown, distance, distance) / -p_scale if needs[3] else None
    return value, (by_q_loc if needs[0] else None, grown / 2.0 if needs[1] else None, by_p_loc, by_p_scale)


def _summed_log_variances(q: LogVarNormal, p: LogVarNormal, num_summed: int) -> Tensor:
    return kl_of_log_variances(q.loc, q.logvar, p.loc, p.logvar, num_summed=num_summed)


def _summed_to_scale(q: LogVarNormal, p: Normal, num_summed: int) -> Tensor:
    return kl_to_scale(q.loc, q.logvar, p.loc, p.scale, num_summed=num_summed)


@register_kl(LogVarNormal, LogVarNormal, summed=_summed_log_variances, needs_float64=False)
def _log_var_normal_log_var_normal(q: LogVarNormal, p: LogVarNormal) -> Tensor:
    return _summed_log_variances(q, p, 0)


@register_kl(LogVarNormal, Normal, summed=_summed_to_scale, needs_float64=False)
def _log_var_normal_normal(q: LogVarNormal, p: Normal) -> Tensor:
    return _summed_to_scale(q, p, 0)
