"""Formulas with a hand-written derivative: one runner for all of them, on every device and in every mode of torch.

A kernel computes the values of a formula and its partial derivatives, which have most operations in common. The
runner computes both at once: whole tensors where these are small or on an accelerator, blocks that stay in the cache on
the CPU, with the sum over the last dimensions taken on the way. The way back is then one product a parameter. Under
`torch.compile`, which fuses both ways itself, and `torch.func` the way back computes the derivatives anew; in forward
mode the values are plain operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from torch_klloss.numerics import opaque_kernels
from torch_klloss.numerics.blocks import Derivatives, evaluate
from torch_klloss.numerics.dimensions import sum_last
from torch_klloss.numerics.elementary import common_dtype, narrowed
from torch_klloss.numerics.tracing import (
    apply_outside_of_func,
    distinct,
    is_forward_mode,
    is_func_transformed,
    is_traced,
)

Value = Callable[..., Tensor]
Partials = Callable[..., Derivatives]
Kernel = Callable[..., tuple[Tensor, Derivatives]]


class Formula(Protocol):
    """A formula of tensors that broadcast, `[*batch, *event]` each, with values `[*batch]`."""

    def __call__(self, *tensors: Tensor, num_summed: int = 0) -> Tensor:
        """Return the values, summed over the last `num_summed` batch dimensions."""
        ...


def custom_gradient(partials: Partials, *, event_dims: int = 0) -> Callable[[Value], Formula]:
    """Give a formula of tensors a hand-written derivative.

    Args:
        partials: called with the tuple of flags that says which derivatives are needed and then with the formula's
            tensors, it returns one derivative a tensor, None where none is needed. It is made of torch operations, so
            that it can be differentiated again.
        event_dims: as in `formula_of`.

    Returns:
        A decorator for the function that computes the values.
    """

    def decorator(value: Value) -> Formula:
        return formula_of(kernel_of(value, partials), event_dims=event_dims, partials=partials)

    return decorator


def kernel_of(value: Value, partials: Partials) -> Kernel:
    """Return the kernel that computes values and derivatives apart."""

    def kernel(needs: Sequence[bool], *tensors: Tensor) -> tuple[Tensor, Derivatives]:
        return value(*tensors), partials(needs, *tensors) if any(needs) else [None for _ in tensors]

    return kernel


def formula_of(
    kernel: Kernel, *, event_dims: int = 0, partials: Partials | None = None, opaque: str | None = None
) -> Formula:
    """Make the formula that a kernel computes.

    Args:
        kernel: called with the tuple of flags that says which derivatives are needed and then with tensors of one dtype
            that broadcast, it returns their values and one derivative a tensor, None where none is needed. It is made
            of torch operations, so that it can be differentiated again. A derivative is a tensor of its own or the very
            parameter that it belongs to. What is computed in float64 is rounded to the dtype of the tensors.
        event_dims: how many of the last dimensions of its tensors the formula takes as one event; it is elementwise in
            all others.
        partials: the derivatives alone, where the kernel does not need the values for them.
        opaque: a name by which the compiler calls the kernel as it is, instead of tracing it, as `opaque_kernels` does.
    """
    if opaque is not None:
        opaque_kernels.name_kernel(opaque, kernel, event_dims)

    def value(*tensors: Tensor) -> Tensor:
        result = kernel([False for _ in tensors], *tensors)[0]
        return narrowed(result, tensors[0])

    def pull_back(needs: Sequence[bool], grad: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        derivatives = kernel(needs, *tensors)[1] if partials is None else partials(needs, *tensors)
        return [
            None if d is None else _unbroadcast(_with_event(grad, event_dims) * d, t)
            for d, t in zip(derivatives, tensors, strict=True)
        ]

    def forward(ctx: Any, num_summed: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.num_summed = num_summed
        result, ctx.partials = evaluate(kernel, ctx.needs_input_grad[1:], tensors, event_dims, num_summed)
        return result

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad, needs, tensors = _with_event(grad, ctx.num_summed), ctx.needs_input_grad[1:], ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted: every operation is recorded
            return None, *pull_back(needs, grad, tensors)
        # The first way back writes over what was kept; another, through a retained graph, computes it again.
        derivatives, ctx.partials = ctx.partials, None
        if derivatives is None:
            _, derivatives = evaluate(kernel, needs, tensors, event_dims, 0)
        grad = _with_event(grad, event_dims)
        return None, *[None if d is None else _scaled(d, grad, t) for d, t in zip(derivatives, tensors, strict=True)]

    def functional_forward(*tensors: Tensor) -> Tensor:
        with torch.no_grad():  # which the kernels ask for
            return value(*tensors)

    def save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def functional_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.compiler.is_compiling() or is_func_transformed():  # torch.func may differentiate it again
            return tuple(pull_back(ctx.needs_input_grad, grad, ctx.saved_tensors))
        with torch.no_grad():  # so that both ways take the same form, and have most of it in common
            return tuple(pull_back(ctx.needs_input_grad, grad, ctx.saved_tensors))

    # A call of the form that torch.func needs takes three times as long.
    eager: Any = type(
        "Formula", (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )
    functional: Any = type(
        "FunctionalFormula",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(functional_forward),
            "setup_context": staticmethod(save),
            "backward": staticmethod(functional_backward),
            "generate_vmap_rule": True,
        },
    )

    def formula(*tensors: Tensor, num_summed: int = 0) -> Tensor:
        tensors = _in_common_dtype(tensors)
        if is_traced():
            if opaque is not None and opaque_kernels.is_opaque_to(tensors):
                return opaque_kernels.call(opaque, tensors, num_summed)
            if is_forward_mode():
                return sum_last(value(*tensors), num_summed)
            is_plain = _is_only_a_value(tensors)
            return sum_last(
                functional_forward(*tensors) if is_plain else functional.apply(*distinct(*tensors)), num_summed
            )
        if torch.is_grad_enabled():
            for t in tensors:
                if t.requires_grad:
                    result: Tensor = apply_outside_of_func(eager, num_summed, *tensors)
                    return result
        with torch.no_grad():
            return evaluate(kernel, [False for _ in tensors], tensors, event_dims, num_summed)[0]

    return formula


def _is_only_a_value(tensors: Sequence[Tensor]) -> bool:
    """Return whether the compiler sees that nobody asks for a derivative: it traces no function of autograd then."""
    return torch.compiler.is_compiling() and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def _with_event(grad: Tensor, event_dims: int) -> Tensor:
    """Return `[*dims]` as `[*dims, 1, …]`, so that it multiplies every entry of an event."""
    return grad[(..., *(None,) * event_dims)] if event_dims else grad


def _scaled(derivative: Tensor, grad: Tensor, parameter: Tensor) -> Tensor:
    """Return the gradient to a parameter, written over its derivative where that has its size."""
    fits = grad.shape == derivative.shape or _broadcasts_to(grad, derivative)
    if fits and derivative.shape == parameter.shape and derivative is not parameter:
        return derivative.mul_(grad)
    return _unbroadcast(derivative * grad, parameter)


def _broadcasts_to(x: Tensor, like: Tensor) -> bool:
    missing = like.dim() - x.dim()
    return missing >= 0 and all(n == 1 or n == m for n, m in zip(x.shape, like.shape[missing:], strict=True))


def _unbroadcast(grad: Tensor, like: Tensor) -> Tensor:
    grad = grad if grad.shape == like.shape else grad.sum_to_size(like.shape)
    return grad if grad.dtype == like.dtype else grad.to(like.dtype)


def _in_common_dtype(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the tensors in one dtype, to which a number without dimensions counts as well."""
    dtype = tensors[0].dtype
    for t in tensors:
        if t.dtype is not dtype:
            dtype = common_dtype(*tensors)
            return tuple(t.to(dtype) for t in tensors)
    return tensors
