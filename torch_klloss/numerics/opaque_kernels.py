"""Kernels as operations of torch's own, which `torch.compile` calls as they are instead of tracing them.

A kernel that looks at its values, to be quick where it can be, is of no use in a graph: there it would compute what is
careful everywhere. The compiler sees one operation here, with its shapes and its derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_klloss.numerics.blocks import Derivatives, evaluate
from torch_klloss.numerics.dimensions import common_shape
from torch_klloss.numerics.tracing import is_func_transformed

_KERNELS: dict[str, tuple[Any, int]] = {}


def name_kernel(name: str, kernel: Any, event_dims: int) -> None:
    """Make a kernel known by a name, which stands for it in a graph."""
    _KERNELS[name] = kernel, event_dims


def is_opaque_to(tensors: Sequence[Tensor]) -> bool:
    """Return whether the compiler shall call a kernel as it is: for float32 on the CPU, unless it exports the graph."""
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting() or is_func_transformed():
        return False
    return all(t.is_cpu and t.dtype == torch.float32 for t in tensors)


def call(name: str, tensors: Sequence[Tensor], num_summed: int) -> Tensor:
    """Return the values of a named kernel, summed over the last `num_summed` dimensions."""
    needs = [t.requires_grad and torch.is_grad_enabled() for t in tensors]
    value: Tensor = _operation(name, needs, num_summed, list(tensors))[0]
    return value


@torch.library.custom_op("torch_klloss::kernel", mutates_args=())
def _operation(name: str, needs: Sequence[bool], num_summed: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    kernel, event_dims = _KERNELS[name]
    with torch.no_grad():
        value, found = evaluate(kernel, needs, tensors, event_dims, num_summed)
    shape = common_shape(*[t.shape for t in tensors])
    return [value.contiguous(), *(_of_shape(d, shape, tensors) for d in _needed(found, needs))]


def _needed(derivatives: Derivatives, needs: Sequence[bool]) -> list[Tensor]:
    return [d for d, need in zip(derivatives, needs, strict=True) if need and d is not None]


def _of_shape(derivative: Tensor, shape: torch.Size, tensors: Sequence[Tensor]) -> Tensor:
    derivative = derivative.expand(shape).contiguous()
    return derivative.clone() if any(derivative.data_ptr() == t.data_ptr() for t in tensors) else derivative


@_operation.register_fake
def _(name: str, needs: Sequence[bool], num_summed: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    shape = torch.broadcast_shapes(*[t.shape for t in tensors])
    kept = shape[: len(shape) - _KERNELS[name][1] - num_summed]
    return [tensors[0].new_empty(kept), *(tensors[0].new_empty(shape) for need in needs if need)]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    name, ctx.needs, num_summed, tensors = inputs
    ctx.num_new = num_summed + _KERNELS[name][1]
    ctx.shapes = [t.shape for t in tensors]
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[None, None, None, list[Tensor | None]]:
    grad = grads[0][(..., *(None,) * ctx.num_new)]
    derivatives = iter(ctx.saved_tensors)
    found = [
        (grad * next(derivatives)).sum_to_size(shape) if need else None
        for need, shape in zip(ctx.needs, ctx.shapes, strict=True)
    ]
    return None, None, None, found


_operation.register_autograd(_backward, setup_context=_setup_context)
