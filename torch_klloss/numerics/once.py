"""Gradients that cannot be differentiated again: an error in place of a derivative that would be wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def constant_in(t: Tensor, reads: Tensor, message: str) -> Tensor:
    """Return t, with a NotImplementedError if it is differentiated by anything that `reads` was computed from."""
    if not torch.is_grad_enabled():
        return t
    zero: Tensor = _Refused.apply(t.detach(), reads, message)
    return t + zero


def differentiable_once(t: Tensor, reads: Tensor, message: str) -> Tensor:
    """Return t, whose derivatives are `constant_in` what `reads` was computed from.

    They may have a graph (create_graph=True) of which no use is made. There are none in forward mode.
    """
    guarded: Tensor = _Once.apply(t, reads, message)
    return guarded


class _WithMessage(torch.autograd.Function):
    """A function of a tensor, of a tensor that it keeps, and of the message of its error."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.message = inputs[2]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        raise NotImplementedError(ctx.message)


class _Refused(_WithMessage):
    """Zeros that cannot be differentiated."""

    @staticmethod
    def forward(like: Tensor, reads: Tensor, message: str) -> Tensor:
        return torch.zeros_like(like)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(ctx.message)


class _Once(_WithMessage):
    """The identity."""

    @staticmethod
    def forward(t: Tensor, reads: Tensor, message: str) -> Tensor:
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (reads,) = ctx.saved_tensors
        return constant_in(grads[0], reads, ctx.message), None, None
