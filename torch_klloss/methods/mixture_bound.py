"""Bounds of the KL between mixtures, from the KLs of their components."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from torch_klloss.distributions.batch_dims import with_batch_dim
from torch_klloss.distributions.checks import check_common_measure, type_name
from torch_klloss.distributions.domains import nan_outside
from torch_klloss.distributions.simplify import flatten_independent, peel
from torch_klloss.distributions.tensors import device_of, dtype_of, lacks_float64
from torch_klloss.estimate import KLEstimate
from torch_klloss.methods.base import BaseMethod, estimate_on_host
from torch_klloss.methods.closed_form import ClosedForm
from torch_klloss.methods.enumeration.masses import Masses, kl_terms
from torch_klloss.numerics.arguments import check_integer
from torch_klloss.numerics.devices import can_be_read
from torch_klloss.numerics.dimensions import sum_last
from torch_klloss.numerics.tracing import is_traced

Side = Literal["upper", "lower"]
_POWERS = (1 / 64, 1 / 16, 1 / 4, 1 / 2, 3 / 4)  # of g/f, one of which bounds E_f[log g] best


@dataclass(frozen=True)
class MixtureBound(BaseMethod):
    """Bound KL(q‖p) where q, p or both are mixtures (`MixtureSameFamily`), from the KLs of their components.

    The value is not the KL but a bound of it; `method` says which. No loss uses it by default.

    - "upper": the variational bound, min over φ of Σ_ab φ_ab (log(φ_ab/ψ_ab) + KL(q_a‖p_b)), where φ and ψ split the
      weights of q and of p among the pairs. The updates descend from Σ_ab π_a ω_b KL(q_a‖p_b), each step gives a
      bound, and the gradient is the gradient of the bound in q and p. Needs the closed forms of the pairs. On an
      accelerator the host asks whether it still falls at update 1, 2, 4, … and so at most ten times for 1000.
    - "lower": for Normal components (Normal, its Independent, MultivariateNormal). E_qa[log q] is bounded from below by
      log Σ_b π_b exp(-KL(q_a‖q_b)) - H(q_a), E_qa[log p] from above by log Σ_b ω_b ∫ q_a p_b, and by
      -H(q_a) + log(Σ_b ω_b^α ∫ q_a^(1-α) p_b^α)/α for several α in (0, 1). Never below 0.

    It is computed in float64; where the device has none, of copies on the CPU.

    Args:
        side: "upper" or "lower".
        num_iterations: the largest number of updates of the upper bound; they stop once it no longer falls.

    Raises:
        ValueError: if `side` is not one of the two words, or `num_iterations` is below 1.

    References:
        *Approximating the Kullback Leibler divergence between Gaussian mixture models* (Hershey and Olsen, 2007).
        *Lower and upper bounds for approximation of the Kullback-Leibler divergence between Gaussian mixture models*
        (Durrieu, Thiran and Kelly, 2012).

    Examples:
        >>> import torch
        >>> from torch.distributions import Categorical, MixtureSameFamily, Normal
        >>> from torch_klloss.methods import MixtureBound
        >>> q = MixtureSameFamily(Categorical(torch.ones(2)), Normal(torch.tensor([-1.0, 1.0]), 0.5))
        >>> upper = MixtureBound("upper").estimate(q, Normal(0.0, 1.0))
        >>> lower = MixtureBound("lower").estimate(q, Normal(0.0, 1.0))
        >>> upper.method, round(upper.value.item(), 4), bool(lower.value < upper.value)
        ('upper bound', 0.8181, True)
    """

    side: Side
    num_iterations: int = 1000
    name: ClassVar[str] = "mixture bound"

    def __post_init__(self) -> None:
        if self.side not in get_args(Side):
            raise ValueError(f"side must be 'upper' or 'lower', got {self.side!r}.")
        check_integer("num_iterations", self.num_iterations)

    def estimate_checked(
        self, q: Distribution, p: Distribution, batch_shape: torch.Size, generator: torch.Generator | None = None
    ) -> KLEstimate:
        """Return the bound, of the broadcast batch shape.

        Raises:
            NotImplementedError: if neither is a mixture, if a pair of components has no closed form, or if the
                components are not Normal, for the lower bound.
            ValueError: if q is discrete and p continuous, or the reverse.
        """
        check_common_measure(q, p)
        if lacks_float64(q, p):
            return estimate_on_host(self, q, p, batch_shape)
        inner_q, inner_p, peeled = peel(q, p)
        if not any(isinstance(d, MixtureSameFamily) for d in (inner_q, inner_p)):
            raise NotImplementedError(
                f"MixtureBound needs a MixtureSameFamily as q or p, got {type_name(q)} and {type_name(p)}; use AutoKL."
            )
        f, g = _components(inner_q), _components(inner_p)
        value = _upper(f, g, self.num_iterations) if self.side == "upper" else _lower(f, g)
        value, dtype = nan_outside(value, inner_q, inner_p), dtype_of(q, p)
        return KLEstimate(
            sum_last(value, peeled).to(dtype).expand(batch_shape), exact=False, method=f"{self.side} bound"
        )


class _Components(NamedTuple):
    """The components of a mixture `[*batch, K]`, and the logarithms of their weights in float64."""

    each: Distribution
    log_weights: Tensor


def _components(d: Distribution) -> _Components:
    if isinstance(d, MixtureSameFamily):
        return _Components(d.component_distribution, d.mixture_distribution.logits.double().log_softmax(-1))
    return _Components(with_batch_dim(d, 0), torch.zeros(1, dtype=torch.float64, device=device_of(d)))


def _pairwise(f: _Components, g: _Components) -> Tensor:
    """Return KL(f_a‖g_b), `[*batch, A, B]`."""
    return ClosedForm().estimate(with_batch_dim(f.each, 0), with_batch_dim(g.each, 1)).value.double()


def _upper(f: _Components, g: _Components, num_iterations: int) -> Tensor:
    kl, log_f, log_g = _pairwise(f, g), f.log_weights.unsqueeze(-1), g.log_weights.unsqueeze(-2)
    stranded = ((kl == math.inf) | (log_g == -math.inf)).all(-1, keepdim=True)
    kl = torch.where(stranded | (log_f == -math.inf), 0.0, kl)  # the former become inf below, the latter have no weight
    with torch.no_grad():
        to_g, from_f = _split(kl, log_f, log_g, num_iterations)
    bound = _bound_of_split(kl, log_f, log_g, to_g, from_f)
    return torch.where((stranded & (log_f > -math.inf)).any((-1, -2)), math.inf, bound)


def _split(kl: Tensor, log_f: Tensor, log_g: Tensor, num_iterations: int) -> tuple[Tensor, Tensor]:
    """Return log φ_ab/π_a and log ψ_ab/ω_b, each optimal for the other in turn."""
    from_f, last = log_f, torch.full((), math.inf, dtype=kl.dtype, device=kl.device)
    for k in range(1, num_iterations + 1):
        to_g = (log_g + from_f - kl).log_softmax(-1).nan_to_num(nan=-math.inf, neginf=-math.inf)
        joint = log_f + to_g
        total = joint.logsumexp(-2, keepdim=True)
        from_f = torch.where(total == -math.inf, log_f, joint - total)
        if is_traced() or not (can_be_read(kl) or k.bit_count() == 1):  # at doubling numbers, or the host would wait
            continue
        bound = _bound_of_split(kl, log_f, log_g, to_g, from_f)
        if not (bound < last - 1e-15 * (1 + last.abs()).nan_to_num(posinf=0.0)).any():
            break
        last = bound
    return to_g, from_f


def _bound_of_split(kl: Tensor, log_f: Tensor, log_g: Tensor, to_g: Tensor, from_f: Tensor) -> Tensor:
    """Return Σ_ab φ_ab (log(φ_ab/ψ_ab) + KL(f_a‖g_b)), an upper bound for every split."""
    phi, psi = (Masses(log.exp(), log) for log in (log_f + to_g, log_g + from_f))
    return (kl_terms(phi, psi) + torch.where(phi.value == 0, 0.0, phi.value * kl)).sum((-1, -2))


def _lower(f: _Components, g: _Components) -> Tensor:
    gaussian_f, gaussian_g = _same_blocks(_gaussian(f.each), _gaussian(g.each))
    entropy = f.each.entropy().double()
    log_f = (f.log_weights.unsqueeze(-2) - _pairwise(f, f)).logsumexp(-1) - entropy  # ≤ E_a[log f]
    a, b = gaussian_f.at(-1), gaussian_g.at(-2)
    log_g = [(g.log_weights.unsqueeze(-2) + _log_overlap(a, b)).logsumexp(-1)]  # ≥ E_a[log g], each of them
    for power in _POWERS:
        total = (power * g.log_weights.unsqueeze(-2) + _log_affinity(a, b, power)).logsumexp(-1)
        log_g.append(total / power - entropy)
    best = torch.stack(torch.broadcast_tensors(*log_g)).amin(0)
    weights = f.log_weights.exp()
    each = torch.where(weights == 0, 0.0, log_f - best)
    return (weights * each).sum(-1).clamp_min(0)


class _Gaussian(NamedTuple):
    """A product of Normals, in blocks: loc `[*batch, K, blocks, size]`, covariance with one more `size`; in float64."""

    loc: Tensor
    covariance: Tensor

    def at(self, dim: int) -> _Gaussian:
        """Insert a dimension before (-2) or after (-1) the components."""
        return _Gaussian(self.loc.unsqueeze(dim - 2), self.covariance.unsqueeze(dim - 3))


def _gaussian(d: Any) -> _Gaussian:
    dims = len(d.event_shape)
    if type(d) in (MultivariateNormal, LowRankMultivariateNormal):
        return _Gaussian(d.loc.double().unsqueeze(-2), d.covariance_matrix.double().unsqueeze(-3))
    base, _ = flatten_independent(d)
    if not isinstance(base, Normal):
        raise NotImplementedError(
            f"MixtureBound('lower') needs Normal or MultivariateNormal components, got {type_name(d)}; "
            "MonteCarloKL estimates the KL itself."
        )
    loc, variance = (t.double().flatten(-dims) if dims else t.double().unsqueeze(-1) for t in (base.loc, base.variance))
    return _Gaussian(loc.unsqueeze(-1), variance.unsqueeze(-1).unsqueeze(-1))


def _same_blocks(f: _Gaussian, g: _Gaussian) -> Sequence[_Gaussian]:
    """Return both in blocks of one size: as they are if their sizes agree, else each as one block."""
    if f.loc.shape[-1] == g.loc.shape[-1]:
        return f, g
    return [_Gaussian(d.loc.flatten(-2).unsqueeze(-2), _dense(d.covariance)) for d in (f, g)]


def _dense(covariance: Tensor) -> Tensor:
    if covariance.shape[-3] == 1:
        return covariance
    return torch.diag_embed(covariance.flatten(-3)).unsqueeze(-3)


def _quadratic(loc: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return locᵀ covariance⁻¹ loc and log det covariance, summed over the blocks."""
    factor = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(factor, loc.unsqueeze(-1), upper=False)
    return white.square().sum((-1, -2, -3)), _log_det(factor)


def _log_det(factor: Tensor) -> Tensor:
    return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum((-1, -2))


def _log_overlap(f: _Gaussian, g: _Gaussian) -> Tensor:
    """Return log ∫ f g."""
    gap = f.loc - g.loc
    distance, log_det = _quadratic(gap, f.covariance + g.covariance)
    return -0.5 * (distance + log_det + gap.shape[-1] * gap.shape[-2] * math.log(2 * math.pi))


def _log_affinity(f: _Gaussian, g: _Gaussian, power: float) -> Tensor:
    """Return log ∫ f^(1 - power) g^power."""
    distance, log_det = _quadratic(f.loc - g.loc, power * f.covariance + (1 - power) * g.covariance)
    of_f, of_g = (_log_det(torch.linalg.cholesky(d.covariance)) for d in (f, g))
    return -0.5 * (power * (1 - power) * distance + log_det - power * of_f - (1 - power) * of_g)
