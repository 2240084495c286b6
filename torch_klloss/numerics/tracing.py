"""Detection of torch.compile, torch.func, forward-mode AD, backward passes and autocast, by torch's private API."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

_FunctionT = TypeVar("_FunctionT", bound=Callable[..., object])


def constant_in_graphs(function: _FunctionT) -> _FunctionT:
    """Have `torch.compile` call the function once, and keep its result, instead of tracing it.

    It is `torch.compiler.assume_constant_result`, which would import the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_traced() -> bool:
    """Return whether `torch.compile`, `torch.func` or forward-mode AD is active, which may not branch on values."""
    forward_level = torch.autograd.forward_ad._current_level  # every formula asks several times: no further calls
    return torch.compiler.is_compiling() or forward_level >= 0 or torch._C._are_functorch_transforms_active()


def needs_plain_operations() -> bool:
    """Return whether the derivative has to come from plain operations: under `torch.compile` and in forward mode."""
    return torch.compiler.is_compiling() or is_forward_mode()


def in_eager_mode(function: _FunctionT) -> _FunctionT:
    """Return a function that talks to other processes, for a call that `torch.compile` leaves out of its graph.

    Raises:
        NotImplementedError: under `torch.func` and in forward mode.
    """
    if is_func_transformed() or is_forward_mode():
        raise NotImplementedError(
            "VocabShards cannot be used under torch.func or in forward mode, since no process has all logits: call the "
            "loss outside, and differentiate it by backward() or torch.autograd.grad."
        )
    return torch.compiler.disable(function)


def concrete(t: Tensor) -> Tensor:
    """Return the numbers of a tensor, with the dimensions that `torch.func.vmap` hides in unknown places."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t.detach()


def apply_outside_of_func(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Call a function of autograd as its `apply` does, once no transform of `torch.func` is known to be active."""
    return super(torch.autograd.Function, function).apply(*torch._functorch.utils.unwrap_dead_wrappers(args))  # type: ignore[misc]


def distinct(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors, a view in place of one that comes again: `torch.compile` gives a function none twice."""
    ahead = [any(t is other for other in tensors[:i]) for i, t in enumerate(tensors)]
    return tuple(t.view_as(t) if again else t for t, again in zip(tensors, ahead, strict=True))


def is_func_transformed() -> bool:
    """Return whether a transform of `torch.func`, such as vmap or grad, is active."""
    return torch._C._are_functorch_transforms_active()


def is_forward_mode() -> bool:
    """Return whether forward-mode AD is active."""
    return torch.autograd.forward_ad._current_level >= 0


def is_in_backward() -> bool:
    """Return whether autograd runs a backward pass, which repeats the forward of a checkpoint."""
    return torch._C._current_graph_task_id() != -1


def is_autocast_enabled() -> bool:
    """Return whether autocast is enabled for any device."""
    return torch._C._is_any_autocast_enabled()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast is off for the device."""
    return torch.autocast(device.type, enabled=False) if is_autocast_enabled() else nullcontext()


def without_func() -> AbstractContextManager[None]:
    """Return a context in which no transform of `torch.func` is active, for code that writes in place."""
    return torch._C._DisableFuncTorch()
