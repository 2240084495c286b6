"""Wishart‖Wishart, from the Cholesky factors and with a gradient to both arguments."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Wishart

from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.numerics.elementary import common_dtype
from torch_klloss.numerics.lgamma import bregman
from torch_klloss.numerics.moments import itakura_saito


@register_kl(Wishart, Wishart)
def _wishart_wishart(q: Wishart, p: Wishart) -> Tensor:
    """νp/2 (tr M - d - log det M) + Σ_{j<d} [Bregman divergence of lgamma at (ν - j)/2 less the one of x log x at ν/2].

    M is the mean of q, νq Σq, whitened by the factor of the mean of p; both terms are sums of terms ≥ 0. Computed from
    the Cholesky factors of the scale matrices, in float64, whatever the dtype of the parameters.

    References:
        *Parametric Bayesian estimation of differential entropy and relative entropy* (Gupta and Srivastava, 2010).
    """
    q_factor, p_factor = q._unbroadcasted_scale_tril, p._unbroadcasted_scale_tril
    q_df, p_df = q.df.double(), p.df.double()
    kl = p_df / 2 * _stein(q_df, q_factor.double(), p_df, p_factor.double())
    kl = kl + _log_multigamma_excess(p_df / 2, q_df / 2, q_factor.shape[-1])
    return kl.to(common_dtype(q.df, q_factor, p.df, p_factor))


def _stein(q_df: Tensor, q_factor: Tensor, p_df: Tensor, p_factor: Tensor) -> Tensor:
    """Return tr M - d - log det M ≥ 0 of M = νq/νp G Gᵀ with G = Lp⁻¹ Lq, from G - 1 and νq - νp."""
    gap = (q_factor - p_factor).tril()
    below = torch.linalg.solve_triangular(p_factor, gap, upper=False).tril(-1)
    off_diagonal = q_df / p_df * below.square().sum((-2, -1))
    q_df, p_df = q_df.unsqueeze(-1), p_df.unsqueeze(-1)
    gap, q_scale, p_scale = (L.diagonal(dim1=-2, dim2=-1) for L in (gap, q_factor, p_factor))
    df_gap, square_gap = q_df - p_df, gap * (q_scale + p_scale)
    q_square, p_square = q_scale.square(), p_scale.square()
    # νq Lq² - νp Lp², split so that neither part exceeds the two
    cross = torch.where(df_gap < 0, df_gap * p_square + q_df * square_gap, df_gap * q_square + p_df * square_gap)
    return off_diagonal + itakura_saito(q_df * q_square, p_df * p_square, cross).sum(-1)


def _log_multigamma_excess(p: Tensor, q: Tensor, dim: int) -> Tensor:
    """Return Σ_j of the Bregman divergence of lgamma at (p - j/2, q - j/2) less the one of x log x at (p, q).

    From p - j/2 to p the latter grows by the closed form that the shift of `bregman` subtracts.
    """
    p, q = (t.unsqueeze(-1) for t in torch.broadcast_tensors(p, q))
    gap = p - q
    shift = torch.arange(dim, dtype=p.dtype, device=p.device) / 2
    low_p, low_q = p - shift, q - shift
    growth = low_p * itakura_saito(p * low_q, low_p * q, -shift * gap) + shift * itakura_saito(p, q, gap)
    return (bregman(low_p, low_q) + growth).sum(-1)
