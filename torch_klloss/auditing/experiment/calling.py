"""Calls of an arbitrary loss: its value, its gradient and its side effects."""

from __future__ import annotations

import contextlib
import copy
import io
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.auditing.experiment.containment import CHANGED_BY_LOSSES, OutOfTimeError, check_time, without_forks
from torch_klloss.auditing.experiment.parameters import Binding
from torch_klloss.auditing.experiment.signatures import Leaves
from torch_klloss.distributions.simplify import flatten_independent
from torch_klloss.rng import private_rng

F = TypeVar("F", bound=Callable[..., Any])
_CPU = torch.device("cpu")


class CallError(Exception):
    """Raised where a loss cannot be judged; its text says what the loss did."""


@dataclass(frozen=True)
class Reply:
    """The outcome of one call.

    Attributes:
        value: the returned value, detached.
        gradients: of the weighted sum of `value`, by leaf; None where no gradient flows to a leaf.
        arguments: of the call, detached.
        changed: the arguments and the global state that the call changed.
        drew: whether the call drew from torch's global stream.
        stream: the state of that stream afterwards.
    """

    value: Tensor
    gradients: dict[str, Tensor | None]
    arguments: tuple[Any, ...]
    changed: tuple[str, ...]
    drew: bool
    stream: Tensor


def reply_to(fn: Callable[..., Any], binding: Binding, leaves: Leaves, *, watched: bool) -> Reply:
    """Call the loss with the present random stream, and take its gradient; record its side effects where `watched`.

    Raises:
        CallError: if it raises, or returns what cannot be a KL.
    """
    arguments = binding.arguments({name: leaf.clone() for name, leaf in leaves.items()})  # as outputs of a network are
    before = [_snapshot(argument) for argument in arguments] if watched else []
    stream = torch.get_rng_state() if watched else None
    state = [get() for _, get, _ in CHANGED_BY_LOSSES]
    try:
        with without_forks():
            value = fn(*arguments)
        check_time()
    except OutOfTimeError:
        raise
    except BaseException as error:  # a loss may exit, and may interrupt
        raise CallError(f"it raises {described(error)}") from error
    finally:
        disturbed = _restore(state)
    after_stream = torch.get_rng_state() if watched else torch.empty(0)
    drew = stream is not None and not torch.equal(stream, after_stream)
    if isinstance(value, float) and not any(leaf.requires_grad for leaf in leaves.values()):
        value = torch.tensor(value, dtype=torch.float64)  # a number to log
    _check(value)
    after = [_snapshot(argument) for argument in arguments] if watched else []
    pairs = zip(binding.names, before, after, strict=False)
    changed = (*(name for name, old, new in pairs if not _same(old, new)), *disturbed)
    gradients = _gradients(value, leaves)
    given = arguments if watched else ()
    detached = tuple(argument.detach().double() if isinstance(argument, Tensor) else argument for argument in given)
    return Reply(value.detach().double().cpu(), gradients, detached, changed, drew, after_stream)


def _restore(state: list[Any]) -> list[str]:
    """Restore torch's global state, and return what the loss had changed."""
    disturbed = [
        (word, put, old) for (word, get, put), old in zip(CHANGED_BY_LOSSES, state, strict=True) if get() != old
    ]
    for _, put, old in disturbed:
        put(old)
    return [word for word, *_ in disturbed]


def weights_like(value: Tensor) -> Tensor:
    """Return the weights for the gradient of an unreduced loss: all different, of mean about one."""
    if value.numel() <= 1:
        return torch.ones_like(value)
    index = torch.arange(value.numel(), dtype=torch.float64)
    return (1 + 0.5 * torch.sin(1.7 * index + 0.3)).reshape(value.shape)


def _gradients(value: Tensor, leaves: Leaves) -> dict[str, Tensor | None]:
    if not value.requires_grad:
        return dict.fromkeys(leaves)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    try:
        weighted = (value * weights_like(value).to(value.dtype)).sum()
        found = torch.autograd.grad(weighted, list(wanted.values()), allow_unused=True)
    except OutOfTimeError:
        raise
    except BaseException as error:
        raise CallError(f"its backward pass raises {described(error)}") from error
    return {name: None if grad is None else grad.double() for name, grad in zip(wanted, found, strict=True)}


def _check(value: Any) -> None:
    if value is None:
        raise CallError("it returns None: is a `return` missing?")
    if not isinstance(value, Tensor):
        logged = "; for a number that is logged and not trained with: audit(…, gradient=False)"
        hint = "" if isinstance(value, tuple | dict) else logged
        kind = type(value).__name__
        raise CallError(f"it returns {'an' if kind[:1].lower() in 'aeiou' else 'a'} {kind}, not a Tensor{hint}")
    if value.is_complex():
        raise CallError(f"it returns a complex tensor ({value.dtype}); a KL is real")
    if not value.is_floating_point():
        raise CallError(f"it returns a tensor of integers or booleans ({value.dtype}); a KL is a floating-point number")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text."""
    try:
        return (str(error).strip().splitlines() or ["(no message)"])[0]
    except Exception as other:
        return f"(its message raises {type(other).__name__})"


def described(error: BaseException) -> str:
    """Return an error in words: its type, and the first line of its text."""
    return f"{type(error).__name__}: {first_line(error)}".rstrip(".")


def _snapshot(argument: Any) -> dict[str, Tensor]:
    if isinstance(argument, Tensor):
        return {"": argument.detach().clone()}
    if isinstance(argument, Distribution):
        base, _ = flatten_independent(argument)
        return {name: base.__dict__[name].detach().clone() for name in base.arg_constraints if name in base.__dict__}
    return {}


def _same(old: dict[str, Tensor], new: dict[str, Tensor]) -> bool:
    """Return whether no old tensor has changed; a distribution may have computed new ones."""
    return all(
        before.shape == new[name].shape and torch.equal(before.nan_to_num(), new[name].nan_to_num())
        for name, before in old.items()
    )


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch, `random` and NumPy for the block, and restore their states afterwards."""
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    random.seed(seed)
    if numpy:
        numpy.random.seed(seed % 2**32)
    try:
        with private_rng(seed, _CPU):
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress prints and warnings and record gradients for the block."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.enable_grad():
        warnings.simplefilter("ignore")
        yield


def isolated(fn: F) -> F:
    """Return a copy of a loss or module, whose calls may change its state; itself where it cannot be copied."""
    with contextlib.suppress(Exception):
        return copy.deepcopy(fn)
    return fn
