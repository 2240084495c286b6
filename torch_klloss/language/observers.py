"""Observers of the losses of language models, as the callbacks are."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torch_klloss.numerics.tracing import is_in_backward


@dataclass(frozen=True)
class TokenCall:
    """One call of a loss of token distributions, as its observers see it.

    Attributes:
        loss: the loss.
        arguments: what it was called with, by name.
        value: what it returned, without a gradient.
    """

    loss: nn.Module
    arguments: dict[str, Any]
    value: Tensor


class TokenObserver(Protocol):
    """An object that is told of every call of a loss."""

    def observe(self, call: TokenCall) -> None:
        """Take what is needed from the call."""


class Observed(nn.Module):
    """Base of losses that tell observers of their calls. Copies and pickles have no observers."""

    def __init__(self) -> None:
        super().__init__()
        self.observers: list[TokenObserver] = []
        self._observer_hook: Any = None
        self._handle: Any = None

    def add_observer(self, observer: TokenObserver, called: nn.Module | None = None) -> None:
        """Tell an observer of every call from now on.

        Args:
            observer: the observer.
            called: the module that is called in place of the loss, where `torch.compile` or FSDP wraps it.
        """
        if not self.observers:
            self._observer_hook = torch.compiler.disable(self._after_call)
            called = self if called is None else called
            self._handle = called.register_forward_hook(self._observer_hook, with_kwargs=True)
        self.observers.append(observer)

    def remove_observer(self, observer: TokenObserver) -> None:
        """Tell the observer no more; one that was not added is ignored."""
        self.observers = [other for other in self.observers if other is not observer]
        if not self.observers and self._handle is not None:
            self._handle.remove()
            self._observer_hook = self._handle = None

    def _after_call(self, module: nn.Module, args: Any, kwargs: dict[str, Any], value: Tensor) -> None:
        if is_in_backward():  # a checkpoint repeats its forward
            return
        for observer in self.observers:
            observer.observe(TokenCall(self, kwargs, value.detach()))

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles get: all but the observers, and the hook that tells them."""
        state = vars(self) | {"observers": [], "_observer_hook": None, "_handle": None}
        if self._observer_hook is not None:
            hooks = self._forward_hooks.items()
            state["_forward_hooks"] = OrderedDict((k, hook) for k, hook in hooks if hook is not self._observer_hook)
        return state
