"""Laplace‖Laplace."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Laplace

from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.numerics.custom_gradient import custom_gradient
from torch_klloss.numerics.elementary import common_dtype, e2, has_float64, isd


@register_kl(Laplace, Laplace)
def _laplace_laplace(q: Laplace, p: Laplace) -> Tensor:
    """(bq/bp) (exp(-t) - 1 + t) + bq/bp - 1 - log(bq/bp) with t = |μq - μp|/bq: two parts, each ≥ 0.

    References:
        *Rényi divergence measures for commonly used univariate continuous distributions* (Gil, Alajaji and Linder,
        2013), rearranged.
    """
    return _kl(q.loc, q.scale, p.loc, p.scale)


def _partials(
    needs: Sequence[bool], q_loc: Tensor, q_scale: Tensor, p_loc: Tensor, p_scale: Tensor
) -> Sequence[Tensor | None]:
    q_scale, p_scale = q_scale.double(), p_scale.double()
    rising, t = _distance(q_loc, q_scale, p_loc)
    decay = torch.expm1(-t)
    x = (q_scale - p_scale) / p_scale
    by_q_loc = torch.where(rising, -decay, decay) / p_scale if needs[0] or needs[2] else None
    by_p_loc = -by_q_loc if by_q_loc is not None and needs[2] else None
    by_q_scale = x / q_scale + (decay + t * torch.exp(-t)) / p_scale if needs[1] else None
    by_p_scale = -(x + q_scale / p_scale * (decay + t)) / p_scale if needs[3] else None
    return by_q_loc, by_q_scale, by_p_loc, by_p_scale


@custom_gradient(_partials)
def _kl(q_loc: Tensor, q_scale: Tensor, p_loc: Tensor, p_scale: Tensor) -> Tensor:
    q, p, series = q_scale.double(), p_scale.double(), has_float64(q_loc, q_scale, p_loc, p_scale)
    _, t = _distance(q_loc, q, p_loc)
    value = q / p * e2(-t, series=series) + isd(q, p, series=series)
    return value.to(common_dtype(q_loc, q_scale, p_loc, p_scale))


def _distance(q_loc: Tensor, q_scale: Tensor, p_loc: Tensor) -> tuple[Tensor, Tensor]:
    """Return where μq ≥ μp, and |μq - μp|/bq in float64, without abs, which would hide the second derivative at 0."""
    distance = q_loc.double() - p_loc.double()
    rising = distance >= 0
    return rising, torch.where(rising, distance, -distance) / q_scale
