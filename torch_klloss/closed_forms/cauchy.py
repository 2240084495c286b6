"""Cauchy‖Cauchy and HalfCauchy‖HalfCauchy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Cauchy, HalfCauchy

from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.numerics.custom_gradient import custom_gradient
from torch_klloss.numerics.elementary import common_dtype


@register_kl(Cauchy, Cauchy)
def _cauchy_cauchy(q: Cauchy, p: Cauchy) -> Tensor:
    """log(1 + ((σq - σp)² + (μq - μp)²) / (4 σq σp)).

    References:
        *A closed-form formula for the Kullback-Leibler divergence between Cauchy distributions* (Chyzak and
        Nielsen, 2019).
    """
    return _kl(q.loc, q.scale, p.loc, p.scale)


@register_kl(HalfCauchy, HalfCauchy)
def _half_cauchy_half_cauchy(q: HalfCauchy, p: HalfCauchy) -> Tensor:
    """By symmetry, the KL of the two Cauchy distributions around 0."""
    return _cauchy_cauchy(q.base_dist, p.base_dist)


def _partials(
    needs: Sequence[bool], q_loc: Tensor, q_scale: Tensor, p_loc: Tensor, p_scale: Tensor
) -> Sequence[Tensor | None]:
    q_scale, p_scale = q_scale.double(), p_scale.double()
    total = q_scale + p_scale
    x = (q_scale - p_scale) / total
    r = (q_loc.double() - p_loc.double()) / total
    square = r * r
    by_q_loc = 2 * r / (total * (1 + square)) if needs[0] or needs[2] else None
    by_p_loc = -by_q_loc if by_q_loc is not None and needs[2] else None
    by_q_scale = (x - square) / (q_scale * (1 + square)) if needs[1] else None
    by_p_scale = -(x + square) / (p_scale * (1 + square)) if needs[3] else None
    return by_q_loc, by_q_scale, by_p_loc, by_p_scale


@custom_gradient(_partials)
def _kl(q_loc: Tensor, q_scale: Tensor, p_loc: Tensor, p_scale: Tensor) -> Tensor:
    q, p = q_scale.double(), p_scale.double()
    gap, distance = q - p, q_loc.double() - p_loc.double()
    x = (gap / q * (gap / p) + distance / q * (distance / p)) / 4
    return torch.log1p(x).to(common_dtype(q_loc, q_scale, p_loc, p_scale))
