"""The pair of every VAE: a Normal given by its log-variance, against the standard Normal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.distributions.families import LogVarNormal, StandardNormal
from torch_klloss.numerics.custom_gradient import custom_gradient
from torch_klloss.numerics.dimensions import sum_last
from torch_klloss.numerics.elementary import e2, horner
from torch_klloss.numerics.tracing import is_traced

_BLOCK = 2**17  # elements: a block of two inputs and two buffers stays in a core's cache
_FEW = 2**13  # elements: below, the number of calls counts
_NEAR = 0.3
_TAYLOR = tuple(1 / math.factorial(k) for k in range(2, 7))


def _summed(q: LogVarNormal, p: StandardNormal, num_dims: int) -> Tensor:
    """Return the KL summed over the last dimensions, in one pass where torch would take one an operation."""
    loc, logvar = q.loc, q.logvar
    if q.batch_shape != p.batch_shape or not _can_fuse(loc, logvar):
        return sum_last(_log_var_normal_standard_normal(q, p), num_dims)
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


def _kl(loc: Tensor, logvar: Tensor) -> Tensor:
    return _CompiledKL.apply(loc, logvar) if torch.compiler.is_compiling() else _careful_kl(loc, logvar)


def _partials(needs: Sequence[bool], loc: Tensor, logvar: Tensor) -> Sequence[Tensor | None]:
    return loc if needs[0] else None, torch.expm1(logvar) / 2 if needs[1] else None


@custom_gradient(_partials)
def _careful_kl(loc: Tensor, logvar: Tensor) -> Tensor:
    lead = e2(logvar.double(), series=logvar.dtype == torch.float64)
    return torch.addcmul(lead.to(logvar.dtype), loc, loc) / 2


class _CompiledKL(torch.autograd.Function):
    """The same for the compiler, which fuses it: few terms near v = 0, where its own exp(v) - 1 has no digits."""

    generate_vmap_rule = True

    @staticmethod
    def forward(loc: Tensor, logvar: Tensor) -> Tensor:
        return (loc * loc + _lead_and_growth(logvar)[0]) / 2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        loc, logvar = ctx.saved_tensors
        return grad * loc, grad * _lead_and_growth(logvar)[1] / 2


def _lead_and_growth(v: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp(v) - 1 - v and exp(v) - 1."""
    if v.dtype == torch.float64:
        lead = e2(v)
        return lead, v + lead
    growth, near, is_near = v.exp() - 1, v * v * horner(v, _TAYLOR), v.abs() < _NEAR
    return torch.where(is_near, near, growth - v), torch.where(is_near, v + near, growth)


def _can_fuse(*tensors: Tensor) -> bool:
    """Return whether the blocks pay: on the processor, outside of what torch traces or transforms."""
    return not is_traced() and all(t.device.type == "cpu" and t.numel() > 0 for t in tensors)


class _SummedKL(torch.autograd.Function):
    """Sum the KL over the columns of `[examples, latent]`, and keep exp(v) - 1 for the way back, where it is due."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, logvar: Tensor) -> Tensor:
        growth, rows = torch.empty_like(logvar), max(1, _BLOCK // logvar.shape[1])
        if len(loc) <= rows:
            kl = _fill(loc, logvar, growth)
        else:
            kl = torch.cat(
                [_fill(*block) for block in zip(*(t.split(rows) for t in (loc, logvar, growth)), strict=True)]
            )
        # exp(v) - 1 - v of a small v has lost its digits: what is small is taken again, with care.
        enough = 0.02 * loc.shape[1]
        if not kl.amin().item() >= enough:
            small = kl < enough
            kl[small] = _kl(loc[small], logvar[small]).sum(-1)
        ctx.save_for_backward(loc, logvar)
        ctx.growth = growth
        return kl

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        loc, logvar = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        by_loc = loc * grad if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return by_loc, None
        half = grad * 0.5
        if torch.is_grad_enabled():  # a second derivative is wanted: record how the first one comes about
            return by_loc, logvar.expm1() * half
        # The first way back writes over what was kept; a second one, through a retained graph, computes it again.
        growth, ctx.growth = ctx.growth, None
        return by_loc, (logvar.expm1() if growth is None else growth).mul_(half)


def _fill(loc: Tensor, logvar: Tensor, growth: Tensor) -> Tensor:
    """Return the KL of each row, and write exp(v) - 1 into `growth`."""
    scratch = None
    if logvar.numel() < _FEW:
        torch.expm1(logvar, out=growth)
    else:  # as tanh(v/2) (exp(v) + 1) it keeps its digits just as well, in half the time
        scratch = torch.exp(logvar)
        torch.mul(logvar, 0.5, out=growth).tanh_().addcmul_(growth, scratch)
    return torch.sub(growth, logvar, out=scratch).addcmul_(loc, loc).sum(-1).mul_(0.5)
