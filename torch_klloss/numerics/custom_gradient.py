"""Custom gradients: hand-written derivatives, faster than recording every operation and as accurate as the formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_klloss.numerics.tracing import is_func_transformed, needs_plain_operations

Value = Callable[..., Tensor]
Partials = Callable[..., Sequence[Tensor | None]]


def custom_gradient(partials: Partials) -> Callable[[Value], Value]:
    """Give an elementwise formula of tensors a hand-written derivative.

    Args:
        partials: called with the tuple of flags that says which derivatives are needed and then with the formula's
            tensors, it returns one derivative a tensor, None where none is needed. It is made of torch
            operations, so that it can be differentiated again.

    Returns:
        A decorator. The decorated formula takes tensors that broadcast, works under `torch.func`, and is plain torch
        operations in forward mode and under `torch.compile`, which fuses them better.
    """

    def decorator(value: Value) -> Value:
        def pull_back(needs: Sequence[bool], grad: Tensor, *tensors: Tensor) -> tuple[Tensor | None, ...]:
            derivatives = partials(needs, *tensors)
            return tuple(
                None if d is None else _unbroadcast(grad * d, t) for d, t in zip(derivatives, tensors, strict=True)
            )

        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            if torch.is_grad_enabled():  # a second derivative is wanted: every operation is recorded
                return pull_back(ctx.needs_input_grad, grad, *ctx.saved_tensors)
            return in_blocks(partial(pull_back, ctx.needs_input_grad), grad, *ctx.saved_tensors)

        def forward_and_save(ctx: Any, *tensors: Tensor) -> Tensor:
            ctx.save_for_backward(*tensors)
            (result,) = in_blocks(lambda *block: (value(*block),), *tensors)
            return torch.as_tensor(result)

        def save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            ctx.save_for_backward(*inputs)

        # A call of the form that torch.func needs takes three times as long.
        eager: Any = type(
            "Formula",
            (torch.autograd.Function,),
            {"forward": staticmethod(forward_and_save), "backward": staticmethod(backward)},
        )
        functional: Any = type(
            "FunctionalFormula",
            (torch.autograd.Function,),
            {
                "forward": staticmethod(value),
                "setup_context": staticmethod(save),
                "backward": staticmethod(backward),
                "generate_vmap_rule": True,
            },
        )

        def formula(*tensors: Tensor) -> Tensor:
            if needs_plain_operations():
                return value(*tensors)
            form = functional if is_func_transformed() else eager
            result: Tensor = form.apply(*tensors)
            return result

        return formula

    return decorator


def in_blocks(
    function: Callable[..., Sequence[Tensor | None]], *tensors: Tensor, size: int = 2**15
) -> tuple[Tensor | None, ...]:
    """Return what a function of the rows returns, computed in blocks whose intermediates stay in the cache.

    One block where the tensors are small, differ in shape, have no rows, or are not on the CPU.
    """
    first = tensors[0]
    if first.dim() < 2:
        return tuple(function(*tensors))
    rows = max(1, size // max(1, first[:1].numel()))
    if first.numel() <= 2 * size or len(first) <= rows or any(t.shape != first.shape or not t.is_cpu for t in tensors):
        return tuple(function(*tensors))
    results: list[Tensor | None] = []
    for i, block in enumerate(zip(*(t.split(rows) for t in tensors), strict=True)):
        part = function(*block)
        if i == 0:
            results = [None if p is None else p.new_empty((len(first), *p.shape[1:])) for p in part]
        for result, p in zip(results, part, strict=True):
            if result is not None and p is not None:
                result[i * rows : i * rows + len(p)] = p
    return tuple(results)


def _unbroadcast(grad: Tensor, like: Tensor) -> Tensor:
    grad = grad if grad.shape == like.shape else grad.sum_to_size(like.shape)
    return grad if grad.dtype == like.dtype else grad.to(like.dtype)
