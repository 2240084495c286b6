"""MultivariateNormal and LowRankMultivariateNormal, in all four orders.

Every formula is made of the difference of the two sets of parameters, so that the KL is exactly 0 at q = p and keeps
its digits near it. Parameters are used as given: a distribution built from a covariance brings its own Cholesky
factor, and nothing here multiplies it out again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal
from torch.nn.functional import pad

from torch_klloss.closed_forms import exponential
from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.distributions.tensors import dtype_of
from torch_klloss.numerics.devices import can_be_read
from torch_klloss.numerics.elementary import at_least, widened
from torch_klloss.numerics.moments import itakura_saito, log1p_lag
from torch_klloss.numerics.tracing import is_traced

_AnyNormal = MultivariateNormal | LowRankMultivariateNormal

# Up to this dimension float32 is computed in float64 on the CPU. Beyond, a product of matrices in float64 takes two to
# three times as long, and only the cheap parts are: p's inverse factor, the diagonals and the means.
_WIDE = 32
# Matrices larger than this have lost no digits beside the identity.
_SMALL = 0.1
# From here on, as the ratio of p's diagonal to q's, a difference of the two covariances is no smaller than they are.
_FAR = 16.0


@register_kl(MultivariateNormal, MultivariateNormal, needs_float64=False)
def _mvn_mvn(q: MultivariateNormal, p: MultivariateNormal) -> Tensor:
    """½ ‖E‖² + Σ (Eᵢᵢ - log(1 + Eᵢᵢ)) + ½ ‖Lp⁻¹(μq - μp)‖² with E = Lp⁻¹(Lq - Lp): three terms, each ≥ 0.

    ‖Lp⁻¹Lq‖² = ‖I + E‖² = d + 2 tr E + ‖E‖²; both factors are lower triangular, so that Eᵢᵢ is the relative
    difference of their diagonals and Π (1 + Eᵢᵢ) the ratio of their determinants. The relative error is a small
    multiple of eps · cond(Lp): of float64's eps for float32 factors of at most 32 dimensions on the CPU, and of the
    factors' own otherwise.
    """
    return _from_factors(q, p, q._unbroadcasted_scale_tril, p._unbroadcasted_scale_tril, _widened)


_mvn_mvn.is_nan_outside = True  # type: ignore[attr-defined]


def _widened(x: Tensor) -> Tensor:
    """Return x in float64 on the CPU: elsewhere a product of matrices in it may take fifty times as long."""
    return widened(x) if can_be_read(x) else x


@register_kl(LowRankMultivariateNormal, MultivariateNormal)
@register_kl(MultivariateNormal, LowRankMultivariateNormal)
def _mvn_low_rank(q: _AnyNormal, p: _AnyNormal) -> Tensor:
    """The KL of two MultivariateNormals, in float64.

    The low-rank covariance gets a triangular factor: the other one has one of that size anyway.
    """
    return _from_factors(q, p, _scale_tril(q), _scale_tril(p), Tensor.double)


def _from_factors(q: _AnyNormal, p: _AnyNormal, L_q: Tensor, L_p: Tensor, wide: Callable[[Tensor], Tensor]) -> Tensor:
    ratio = exponential.kl(*(L.diagonal(dim1=-2, dim2=-1) for L in (L_p, L_q)), num_summed=1)
    distance = _solve(wide(L_p), (wide(q.loc) - wide(p.loc)).unsqueeze(-1))
    inner = wide if q.event_shape[0] <= _WIDE else partial(Tensor.to, dtype=dtype_of(q, p))
    return (ratio + (_spread(inner(L_q), inner(L_p)) + _square(distance)) / 2).to(dtype_of(q, p))


def _spread(L_q: Tensor, L_p: Tensor) -> Tensor:
    """Return ‖Lp⁻¹(Lq - Lp)‖²."""
    is_shared = L_q.dim() > 2 and L_p.shape[:-2].numel() == 1
    if not is_shared or L_p.dim() > L_q.dim() or is_traced():
        return _square(_solve(L_p, (L_q - L_p).tril()))
    value: Tensor = _SharedSpread.apply(L_q, L_p)
    return value


class _SharedSpread(torch.autograd.Function):
    """‖Lp⁻¹(Lq - Lp)‖² for many Lq, whose passes over memory cost as much as the two products."""

    @staticmethod
    def forward(ctx: Any, L_q: Tensor, L_p: Tensor) -> Tensor:
        inverse = _inverse(L_p.view(L_p.shape[-2:])).to(L_q.dtype)
        spread = inverse @ (L_q - L_p).tril_()
        ctx.save_for_backward(L_q, L_p, inverse, spread)
        return _square(spread)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        L_q, L_p, inverse, spread = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            wanted = [t for t, needed in zip((L_q, L_p), ctx.needs_input_grad, strict=True) if needed]
            found = iter(torch.autograd.grad(_square(_solve(L_p, (L_q - L_p).tril())), wanted, grad, create_graph=True))
            return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)
        grad = 2 * grad[..., None, None]
        by_q = (inverse.mT @ spread).mul_(grad).tril_()
        if not ctx.needs_input_grad[1]:
            return by_q, None
        flat, weighted = spread.flatten(0, -3), (spread * grad).flatten(0, -3)
        square = torch.addbmm(torch.zeros_like(inverse), weighted, flat.mT)
        by_p = -by_q.flatten(0, -3).sum(0) - (inverse.mT @ square).tril()
        return by_q if ctx.needs_input_grad[0] else None, by_p.view(L_p.shape)


def _solve(factor: Tensor, x: Tensor) -> Tensor:
    """Return factor⁻¹ x, through one inverse where several x share a factor.

    The inverse of a triangular matrix by substitution is accurate row by row; a product with it takes a fifth of
    the time of a triangular solve.
    """
    if factor.shape[:-2].numel() >= x.shape[:-2].numel():
        return torch.linalg.solve_triangular(factor, x, upper=False)
    return _inverse(factor).to(x.dtype) @ x


def _inverse(factor: Tensor) -> Tensor:
    factor = _widened(factor)
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, identity, upper=False)


def _square(x: Tensor) -> Tensor:
    """Return the sum of squares over the last two dimensions."""
    flat = x.flatten(-2)
    return torch.linalg.vecdot(flat, flat)


def _scale_tril(d: _AnyNormal) -> Tensor:
    """Return the Cholesky factor of the covariance: as given, or of WWᵀ + D in float64."""
    if isinstance(d, MultivariateNormal):
        return d._unbroadcasted_scale_tril
    return _cholesky_of_sum(d._unbroadcasted_cov_factor.double(), d._unbroadcasted_cov_diag.double())


def _cholesky_of_sum(W: Tensor, D: Tensor) -> Tensor:
    """Return the Cholesky factor of WWᵀ + diag(D), from [D^½, W] and not from the sum, which D may be lost in."""
    columns = torch.broadcast_shapes(W.shape[:-2], D.shape[:-1])
    root = torch.diag_embed(D.sqrt())
    stacked = torch.cat([x.expand(columns + x.shape[-2:]) for x in (root, W.mT)], -2)
    R = torch.linalg.qr(stacked).R
    return R.mT * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


@register_kl(LowRankMultivariateNormal, LowRankMultivariateNormal)
def _low_rank_low_rank(q: LowRankMultivariateNormal, p: LowRankMultivariateNormal) -> Tensor:
    """½ [tr Γ - log det(I + Γ) + Σ (δᵢ - log(1 + δᵢ)) + rest + (μq - μp)ᵀ Σp⁻¹ (μq - μp)], in O(d r²) operations.

    In coordinates where p's diagonal is 1, with V p's factor, U = V + B q's, 1 + δ q's diagonal and Cp = I + VᵀV = LLᵀ,
    the determinants are those of the diagonals and of I + Γ = L⁻¹ (I + Uᵀ diag(1/(1 + δ)) U) L⁻ᵀ. Everything of first
    order in B and δ has cancelled in the rest:

    tr(Cp⁻¹ VᵀV BᵀB) - ‖L⁻¹VᵀB‖² + Σ δᵢ/(1 + δᵢ) (‖bᵢ‖² + 2 aᵢ·bᵢ - δᵢ ‖aᵢ‖²), rows aᵢ of V L⁻ᵀ and bᵢ of B L⁻ᵀ.

    The relative error is a small multiple of eps · cond(I + VVᵀ). Where that passes 1 the sum is noise, and no KL is
    below 0. With a rank of d/2 or more the matrices are taken as they are, of d x d.
    """
    W_q, D_q, W_p, D_p = (t.double() for d in (q, p) for t in (d._unbroadcasted_cov_factor, d._unbroadcasted_cov_diag))
    V, B = _whitened_factors(W_q, W_p, D_p.sqrt().unsqueeze(-1))
    L = _cholesky_of_one_plus(V.mT @ V)
    distance = _solve_one_plus(V, L, ((q.loc.double() - p.loc.double()) / D_p.sqrt()).unsqueeze(-1))
    is_low = 2 * V.shape[-1] < V.shape[-2]
    spread = _low_rank_spread(V, B, L, D_q, D_p) if is_low else _full_rank_spread(V, B, D_q, D_p)
    return at_least((spread + _square(distance)) / 2, 0.0).to(dtype_of(q, p))


def _whitened_factors(q_factor: Tensor, p_factor: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """Return p's factor and what q's has beyond it, both over the root of p's diagonal; missing columns are zeros."""
    rank = max(q_factor.shape[-1], p_factor.shape[-1], 1)
    q_factor, p_factor = (pad(f, (0, rank - f.shape[-1])) for f in (q_factor, p_factor))
    return p_factor / root, (q_factor - p_factor) / root


def _low_rank_spread(V: Tensor, B: Tensor, L: Tensor, D_q: Tensor, D_p: Tensor) -> Tensor:
    """Return twice the KL at equal means, from matrices of r x r."""
    U, VB, BB = V + B, V.mT @ B, B.mT @ B
    delta, shrink = (D_q - D_p) / D_p, (D_q - D_p) / D_q
    L_q = _cholesky_of_one_plus(U.mT @ (U * (D_p / D_q).unsqueeze(-1)))
    a, b = (torch.linalg.solve_triangular(L, x.mT, upper=False) for x in (V, B))
    change = VB + VB.mT + BB - U.mT @ (shrink.unsqueeze(-1) * U)
    rest = (torch.cholesky_solve(V.mT @ V, L) * BB).sum((-2, -1)) - _square(a @ B)
    rest = rest + (shrink * (b.square() + 2 * a * b - delta.unsqueeze(-2) * a.square()).sum(-2)).sum(-1)
    near = _trace_minus_log_det(_conjugate(L, change), L, L_q) + _isd(D_q, D_p).sum(-1) + rest
    log_det = (L_q.diagonal(dim1=-2, dim2=-1) / L.diagonal(dim1=-2, dim2=-1)).log().sum(-1) * 2
    trace = (D_q / D_p * (1 - a.square().sum(-2))).sum(-1) + _square(_solve_one_plus(V, L, U))
    far = trace - V.shape[-2] - (D_q / D_p).log().sum(-1) - log_det
    return torch.where(shrink.amin(-1) > -_FAR, near, far)


def _full_rank_spread(V: Tensor, B: Tensor, D_q: Tensor, D_p: Tensor) -> Tensor:
    """Return twice the KL at equal means, from matrices of d x d."""
    U, BV, ratio = V + B, B @ V.mT, D_q / D_p
    change = BV + BV.mT + B @ B.mT + torch.diag_embed((D_q - D_p) / D_p)
    L, L_q = _cholesky_of_sum(V, torch.ones_like(ratio)), _cholesky_of_sum(U, ratio)
    return _trace_minus_log_det(_conjugate(L, change), L, L_q)


def _trace_minus_log_det(gamma: Tensor, L: Tensor, L_q: Tensor) -> Tensor:
    """Return tr Γ - log det(I + Γ) ≥ 0, from an approximate factor K = L⁻¹ L_q of I + Γ.

    With E = K - I it is ‖E‖² + 2 Σ (Eᵢᵢ - log(1 + Eᵢᵢ)). One step of Newton's method from K gives E the digits that
    a small Γ has and that I + Γ has lost.
    """
    E = torch.linalg.solve_triangular(L, L_q - L, upper=False)
    identity = torch.eye(E.shape[-1], dtype=E.dtype, device=E.device)
    residual = _conjugate(E + identity, gamma - E - E.mT - E @ E.mT)
    half = residual.tril(-1) + torch.diag_embed(residual.diagonal(dim1=-2, dim2=-1) / 2)
    is_small = E.abs().amax((-2, -1), keepdim=True) < _SMALL
    E = E + torch.where(is_small, half + E @ half, 0.0)
    diagonals = (f.diagonal(dim1=-2, dim2=-1) for f in (E, L_q, L))
    return _square(E) + 2 * _x_minus_log_ratio(*diagonals).sum(-1)


def _isd(a: Tensor, b: Tensor) -> Tensor:
    return itakura_saito(a, b, a - b)


def _x_minus_log_ratio(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return x - log(1 + x), given a/b as 1 + x for an x near -1."""
    return torch.where(x > -0.5, log1p_lag(x.clamp_min(-0.5)), x - (a / b).log())


def _cholesky_of_one_plus(x: Tensor) -> Tensor:
    """Return the factor of I + x, NaN where a parameter is: nothing else can keep it from having one."""
    L, failed = torch.linalg.cholesky_ex(x + torch.eye(x.shape[-1], dtype=x.dtype, device=x.device))
    return torch.where((failed > 0)[..., None, None], torch.nan, L)


def _conjugate(L: Tensor, x: Tensor) -> Tensor:
    """Return L⁻¹ x L⁻ᵀ."""
    left = torch.linalg.solve_triangular(L, x, upper=False)
    return torch.linalg.solve_triangular(L, left.mT, upper=False).mT


def _solve_one_plus(V: Tensor, L: Tensor, x: Tensor) -> Tensor:
    """Return (I + V (I + L)⁻¹ Vᵀ)⁻¹ x; that matrix times its transpose is I + VVᵀ, with LLᵀ = I + VᵀV."""
    shifted = L + torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    y = torch.linalg.solve_triangular(L, V.mT @ x, upper=False)
    return x - V @ torch.linalg.solve_triangular(shifted.mT, y, upper=True)
