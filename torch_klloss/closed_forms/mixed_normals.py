"""Independent Normals against a MultivariateNormal or a LowRankMultivariateNormal, in all four orders.

A diagonal covariance stays a vector, and beside a low-rank one no matrix of d x d is formed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, LowRankMultivariateNormal, MultivariateNormal, Normal

from torch_klloss.closed_forms.registry import has_closed_form, kl_divergence, register_kl
from torch_klloss.closed_forms.structural import simplified
from torch_klloss.distributions.families import LogVarNormal
from torch_klloss.distributions.pushforward import is_a
from torch_klloss.distributions.tensors import dtype_of
from torch_klloss.numerics.dimensions import sum_last
from torch_klloss.numerics.elementary import widened
from torch_klloss.numerics.moments import itakura_saito


def _diagonal(d: Distribution) -> Normal | None:
    """Return the Normals whose last batch dimension is d's event; None where d is something else."""
    if isinstance(d, Independent) and d.reinterpreted_batch_ndims == 1 and is_a(d.base_dist, Normal):
        return d.base_dist
    return None


def _supports(q: Distribution, p: Distribution) -> bool:
    is_mixed = _diagonal(q) is not None or _diagonal(p) is not None
    return is_mixed or simplified(q, p) is not None or _marginals_match(q, p)


@register_kl(Independent, MultivariateNormal, supports=_supports, needs_float64=False)
def _diagonal_mvn(q: Independent, p: MultivariateNormal) -> Tensor:
    """Σ isd(σᵢ, Lᵢᵢ) + ½ Σ (σᵢ/Lᵢᵢ - 1)² + ½ Σ_{i>j} (Mᵢⱼ σⱼ)² + ½ ‖M (μq - μp)‖² with M = L⁻¹, L the factor of p.

    Four terms, each ≥ 0, from which nothing of first order has cancelled. The relative error is a small multiple of
    eps · cond(L).

    Raises:
        NotImplementedError: if the components of q neither are Normals nor simplify to Normals.
    """
    base = _diagonal(q)
    if base is None:
        return _otherwise(q, p)
    L = widened(p._unbroadcasted_scale_tril)
    scale, diagonal = _scale(base), L.diagonal(dim1=-2, dim2=-1)
    identity = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    M = torch.linalg.solve_triangular(L, identity, upper=False)
    below = (scale.square() * M.tril(-1).square().sum(-2)).sum(-1)
    distance = (M @ (widened(base.loc) - widened(p.loc)).unsqueeze(-1)).squeeze(-1).square().sum(-1)
    return (_of_scales(scale, diagonal) + (below + distance) / 2).to(dtype_of(q, p))


@register_kl(MultivariateNormal, Independent, supports=_supports, needs_float64=False)
def _mvn_diagonal(q: MultivariateNormal, p: Independent) -> Tensor:
    """Σ isd(Lᵢᵢ, σᵢ) + ½ Σ (Lᵢᵢ/σᵢ - 1)² + ½ Σ_{i>j} (Lᵢⱼ/σᵢ)² + ½ Σ ((μq - μp)ᵢ/σᵢ)², L the factor of q.

    Four terms, each ≥ 0.

    Raises:
        NotImplementedError: if the components of p neither are Normals nor simplify to Normals.
    """
    base = _diagonal(p)
    if base is None:
        return _otherwise(q, p)
    L, scale = widened(q._unbroadcasted_scale_tril), _scale(base)
    below = (L.tril(-1).square().sum(-1) / scale.square()).sum(-1)
    distance = ((widened(q.loc) - widened(base.loc)) / scale).square().sum(-1)
    diagonal = L.diagonal(dim1=-2, dim2=-1)
    return (_of_scales(diagonal, scale) + (below + distance) / 2).to(dtype_of(q, p))


@register_kl(Independent, LowRankMultivariateNormal, supports=_supports)
@register_kl(LowRankMultivariateNormal, Independent, supports=_supports)
def _diagonal_low_rank(q: Any, p: Any) -> Tensor:
    """The KL of two low-rank covariances, one of rank 0, by the capacitance matrix of r x r.

    Raises:
        NotImplementedError: if the components of the other one neither are Normals nor simplify to Normals.
    """
    base = _diagonal(q if isinstance(q, Independent) else p)
    if base is None:
        return _otherwise(q, p)
    scale = _scale(base).double()
    is_nan = scale.isnan()  # no matrix with a NaN has a Cholesky factor
    loc, variance = base.loc.double(), torch.where(is_nan, 1.0, scale).square()
    diagonal = LowRankMultivariateNormal(loc, variance.new_zeros(loc.shape[-1], 1), variance, validate_args=False)
    value = kl_divergence(*(diagonal if isinstance(d, Independent) else d for d in (q, p)))
    return torch.where(is_nan.any(-1), torch.nan, value).to(dtype_of(q, p))


def _otherwise(q: Distribution, p: Distribution) -> Tensor:
    """Return the KL of a pair whose independent side is not made of Normals."""
    simple = simplified(q, p)
    if simple is None:
        return _by_marginals(q, p)
    simple_q, simple_p, peeled = simple
    return sum_last(kl_divergence(simple_q, simple_p), peeled)


def _between(q: Distribution, p: Distribution) -> tuple[Normal, Distribution]:
    """Return independent Normals with the means and variances of q's components, and the independent components.

    A component without moments has a standard Normal.
    """
    is_q: bool = isinstance(q, Independent)
    product: Any = q if is_q else p
    if product.reinterpreted_batch_ndims != 1:
        raise NotImplementedError("its components must be scalars")
    if not type(product.base_dist).log_prob.__module__.startswith("torch.distributions."):
        raise NotImplementedError("its components override log_prob, so that their moments are unknown")
    moments: Any = product.base_dist if is_q else q
    mean, scale = moments.mean, moments.variance.sqrt()
    exist = mean.isfinite() & scale.isfinite()  # elsewhere the KL of the components decides
    kept = torch.where(exist, mean, 0.0), torch.where(exist, scale, 1.0)
    return Normal(*kept, validate_args=False), product.base_dist


def _marginals_match(q: Distribution, p: Distribution) -> bool:
    try:
        between, base = _between(q, p)
        return has_closed_form(base, between) if isinstance(q, Independent) else has_closed_form(between, base)
    except NotImplementedError:
        return False


def _by_marginals(q: Distribution, p: Distribution) -> Tensor:
    """Return KL(q‖m) + KL(m‖p), both ≥ 0, for the independent Normals m with the moments of q; inf without a variance.

    The sum is KL(q‖p): log m is a sum over components and log(m/p) quadratic, so that E_q[log(m/p)] depends only on the
    moments that q and m share if p is Gaussian, and on the marginals that they share if q is.

    Raises:
        NotImplementedError: if the independent side's components have no closed form with a Normal.
    """
    between, base = _between(q, p)
    joint = Independent(between, 1)
    if not isinstance(q, Independent):
        return kl_divergence(q, joint) + kl_divergence(between, base).sum(-1)
    apart = kl_divergence(base, between).sum(-1)  # inf without a variance
    return torch.where(apart.isinf(), apart, apart + kl_divergence(joint, p))


def _scale(d: Normal) -> Tensor:
    """Return the standard deviations, widened, from the log-variance where d was built from one."""
    return (0.5 * widened(d.logvar)).exp() if isinstance(d, LogVarNormal) else widened(d.scale)


def _of_scales(q: Tensor, p: Tensor) -> Tensor:
    """Return the KL of independent Normals of equal means."""
    return (itakura_saito(q, p, q - p) + ((q - p) / p).square() / 2).sum(-1)
