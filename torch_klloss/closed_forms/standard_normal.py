"""The pair of every VAE: a Normal given by its log-variance, against the standard Normal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_klloss.closed_forms.analytic import analytic
from torch_klloss.closed_forms.elementary import e2
from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.distributions import LogVarNormal, StandardNormal
from torch_klloss.tracing import is_traced

_BLOCK = 2**16  # elements: a block of two inputs and two buffers stays in a core's cache


def _summed(q: LogVarNormal, p: StandardNormal, num_dims: int) -> Tensor:
    """Return the KL summed over the last dimensions, in one pass where torch would take one an operation."""
    loc, logvar = q.loc, q.logvar
    if q.batch_shape != p.batch_shape or not _can_fuse(loc, logvar):
        return _log_var_normal_standard_normal(q, p).sum(tuple(range(-num_dims, 0)))
    if loc.dim() == 2 and num_dims == 1:
        kl: Tensor = _SummedKL.apply(loc, logvar)
        return kl
    examples = q.batch_shape[: len(q.batch_shape) - num_dims]
    loc, logvar = (t.reshape(examples.numel(), -1) for t in (loc, logvar))
    return torch.as_tensor(_SummedKL.apply(loc, logvar)).view(examples)


@register_kl(LogVarNormal, StandardNormal, summed=_summed)
def _log_var_normal_standard_normal(q: LogVarNormal, p: StandardNormal) -> Tensor:
    """½ (μ² + exp(v) - 1 - v), from the log-variance v as it was given: two terms, each ≥ 0.

    References:
        *Auto-encoding variational Bayes* (Kingma and Welling, 2014), appendix B.
    """
    kl = _kl(q.loc, q.logvar)
    return kl if kl.shape == p.batch_shape else kl.expand(torch.broadcast_shapes(kl.shape, p.batch_shape))


def _partials(needs: Sequence[bool], loc: Tensor, logvar: Tensor) -> Sequence[Tensor | None]:
    return loc if needs[0] else None, torch.expm1(logvar) / 2 if needs[1] else None


@analytic(_partials)
def _kl(loc: Tensor, logvar: Tensor) -> Tensor:
    return torch.addcmul(e2(logvar.double()).to(logvar.dtype), loc, loc) / 2


def _can_fuse(*tensors: Tensor) -> bool:
    """Tell whether the blocks pay: on the processor, outside of what torch traces or transforms."""
    return not is_traced() and all(t.device.type == "cpu" and t.numel() > 0 for t in tensors)


class _SummedKL(torch.autograd.Function):
    """Sum the KL over the columns of `[examples, latent]`, and keep exp(v) - 1 for the way back."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, logvar: Tensor) -> Tensor:
        kl, growth = loc.new_empty(len(loc)), torch.empty_like(logvar)
        terms = torch.empty_like(logvar[: _rows(logvar)])
        for loc_block, logvar_block, growth_block, kl_block in _blocks(loc, logvar, growth, kl):
            terms = terms[: len(kl_block)]
            torch.expm1(logvar_block, out=growth_block)
            torch.sub(growth_block, logvar_block, out=terms)
            torch.sum(terms.addcmul_(loc_block, loc_block), -1, out=kl_block)
        kl *= 0.5
        # exp(v) - 1 - v of a small v has lost its digits: what is small is taken again, with care.
        small = kl < 0.02 * loc.shape[1]
        if small.any():
            kl[small] = _kl(loc[small], logvar[small]).sum(-1)
        ctx.save_for_backward(loc, logvar, growth)
        return kl

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        loc, logvar, growth = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted: record how the first one comes about
            growth = logvar.expm1()
        grad = grad.unsqueeze(-1)
        by_loc = loc * grad if ctx.needs_input_grad[0] else None
        return by_loc, growth * (grad / 2) if ctx.needs_input_grad[1] else None


def _rows(matrix: Tensor) -> int:
    return max(1, _BLOCK // matrix.shape[1])


def _blocks(loc: Tensor, logvar: Tensor, growth: Tensor, kl: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors in blocks of rows; as they are, where one block holds them."""
    tensors, rows = (loc, logvar, growth, kl), _rows(logvar)
    if len(kl) <= rows:
        return iter((tensors,))
    return zip(*(t.split(rows) for t in tensors), strict=True)
