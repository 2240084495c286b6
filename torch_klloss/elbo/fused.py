"""The plain loss of a VAE as one node of the graph: recording operations is what small batches spend their time on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.nn import functional

from torch_klloss.closed_forms import standard_normal
from torch_klloss.elbo.divergence import is_out_of_bounds, is_plain_normal
from torch_klloss.elbo.likelihoods import LikelihoodName, log_bernoulli
from torch_klloss.elbo.terms import ELBOTerms
from torch_klloss.losses import KLLoss
from torch_klloss.numerics.exponentials import expm1
from torch_klloss.numerics.tracing import is_autocast_enabled

_SUM = 2  # reduction="sum" in torch's own kernels


def can_fuse(kl: KLLoss, recon: Tensor, x: Tensor, mean: Tensor, logvar: Tensor) -> bool:
    """Return whether the fused kernel applies: eager float32 tensors, and a loss that takes the closed form."""
    if not recon.dtype == x.dtype == torch.float32 or x.requires_grad or is_autocast_enabled():
        return False
    return mean.dim() > kl.batch_dims and is_plain_normal(kl, mean, logvar)


def plain_elbo(
    recon: Tensor,
    x: Tensor,
    mean: Tensor,
    logvar: Tensor,
    beta: float,
    likelihood: LikelihoodName,
    batch_dims: int,
) -> ELBOTerms | None:
    """Return the terms of reconstruction + β · KL, means over the examples, of float32 tensors.

    Args:
        recon: the output of the decoder, `[*examples, …]`; checked, as is x.
        x: the data, of the same shape.
        mean: of the posterior, `[*examples, *latent]`.
        logvar: of the same shape.
        beta: the weight of the KL.
        likelihood: what recon is.
        batch_dims: how many leading dimensions index examples.

    Returns:
        The terms; None if the posterior needs a warning, which the general path gives.
    """
    try:
        loss, reconstruction, kl, each = _PlainELBO.apply(recon, x, mean, logvar, beta, likelihood, batch_dims)
    except _ExtremePosteriorError:
        return None
    return ELBOTerms(loss, reconstruction, kl, each, beta, (kl,))


class _ExtremePosteriorError(Exception):
    pass


class _PlainELBO(torch.autograd.Function):
    """Compute (loss, reconstruction, KL, KL per dimension)."""

    @staticmethod
    def forward(
        ctx: Any, recon: Tensor, x: Tensor, mean: Tensor, logvar: Tensor, beta: float, likelihood: str, batch_dims: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the four terms."""
        count = math.prod(mean.shape[:batch_dims])
        ctx.save_for_backward(recon, x, mean, logvar)
        ctx.settings = beta, likelihood, count
        ctx.set_materialize_grads(False)
        value, (_, by_logvar) = standard_normal.kernel((False, True), mean, logvar)
        ctx.by_logvar = torch.as_tensor(by_logvar, dtype=logvar.dtype)
        each = _sum(value, batch_dims).div_(count)
        if Distribution._validate_args and (math.isnan(each.sum().item()) or is_out_of_bounds(logvar)):
            raise _ExtremePosteriorError
        reconstruction, kl = _SUMMED_NLL[likelihood](recon, x).div_(count), each.sum()
        return torch.add(reconstruction, kl, alpha=beta), reconstruction, kl, each

    @staticmethod
    def backward(
        ctx: Any, by_loss: Tensor | None, by_nll: Tensor | None, by_kl: Tensor | None, by_each: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients to recon, mean and logvar."""
        recon, x, mean, logvar = ctx.saved_tensors
        beta, likelihood, count = ctx.settings
        needs_recon, _, needs_mean, needs_logvar, *_ = ctx.needs_input_grad
        to_loss, to_kl = _as_number(by_loss), _as_number(by_kl)
        to_nll = _added((to_loss, 1 / count), (by_nll, 1 / count))
        to_kl = _added((to_loss, beta / count), (to_kl, 1 / count), (by_each, 1 / count))
        # A second derivative needs the first one in the graph.
        each_by_logvar = expm1(logvar) / 2 if torch.is_grad_enabled() else ctx.by_logvar
        by_recon = None if to_nll is None or not needs_recon else _NLL_GRADIENT[likelihood](to_nll, recon, x)
        if to_kl is None:
            return by_recon, *(None,) * 6
        by_mean = mean * to_kl if needs_mean else None
        by_logvar = each_by_logvar * to_kl if needs_logvar else None
        return by_recon, None, by_mean, by_logvar, *(None,) * 3


def _sum(terms: Tensor, batch_dims: int) -> Tensor:
    if batch_dims == 1:
        return terms.sum(0)
    return terms.sum(tuple(range(batch_dims))) if batch_dims else terms


def _as_number(grad: Tensor | None) -> Tensor | float | None:
    """Return a scalar gradient in the CPU's memory as a number, and any other as it is."""
    if grad is None or grad.dim() > 0 or not grad.is_cpu or torch.is_grad_enabled():
        return grad
    return grad.item()


def _added(*terms: tuple[Tensor | float | None, float]) -> Tensor | float | None:
    """Return Σ gradient · factor over the gradients that are not None; None if all are."""
    total: Tensor | float | None = None
    for grad, factor in terms:
        if grad is not None:
            total = grad * factor if total is None else total + grad * factor
    return total


def _gaussian(recon: Tensor, x: Tensor) -> Tensor:
    return 0.5 * functional.mse_loss(recon, x, reduction="sum") + x.numel() * 0.5 * math.log(2 * math.pi)


def _logits_gradient(grad: Tensor | float, recon: Tensor, x: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return (recon.sigmoid() - x) * grad
    return recon.sigmoid().sub_(x).mul_(grad)


def _probs_gradient(grad: Tensor | float, recon: Tensor, x: Tensor) -> Tensor:
    grad = torch.as_tensor(grad, dtype=recon.dtype, device=recon.device)
    gradient: Tensor = torch.ops.aten.binary_cross_entropy_backward(grad, recon, x, None, _SUM)
    return gradient


# Keyed by the name of the likelihood.
_SUMMED_NLL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bernoulli": lambda recon, x: -log_bernoulli(recon, x).sum(),
    "bernoulli_logits": lambda recon, x: torch.binary_cross_entropy_with_logits(recon, x, None, None, _SUM),
    "gaussian": _gaussian,
}
_NLL_GRADIENT: dict[str, Callable[[Tensor | float, Tensor, Tensor], Tensor]] = {
    "bernoulli": _probs_gradient,
    "bernoulli_logits": _logits_gradient,
    "gaussian": lambda grad, recon, x: (recon - x) * grad,
}
