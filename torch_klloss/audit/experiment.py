"""Calling a loss that may do anything: what it returned, what its gradients are, what it did on the side."""

from __future__ import annotations

import contextlib
import copy
import io
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.audit.probes import Layout
from torch_klloss.audit.signatures import Call, Leaves
from torch_klloss.rng import private_rng

Arrangement = Literal["total", "example", "element", "latent"]
GROUPS = 32
"""Into so many groups the calls of a stochastic loss are taken: their means are nearly Normal."""

_CPU = torch.device("cpu")


class CallError(Exception):
    """Raised where a loss cannot be judged; its text says what it did."""


@dataclass(frozen=True)
class Reply:
    """Hold what one call gave.

    Attributes:
        value: what was returned, detached.
        gradients: of the weighted sum of `value`, by leaf; None where no gradient flows to it.
        arguments: what it was called with, detached.
        changed: the names of arguments that the call changed.
        drew: whether it drew from torch's global stream.
    """

    value: Tensor
    gradients: dict[str, Tensor | None]
    arguments: tuple[Any, ...]
    changed: tuple[str, ...]
    drew: bool


@dataclass
class Asked:
    """Hold a loss, how it is called, and the probes that it is asked about.

    Attributes:
        fn: the loss.
        call: its signature and the order of its arguments.
        layout: of the probes.
        leaves: flat, float64.
        rank: the number of dimensions of an argument.
        dtype: of the arguments.
        gradient: whether the gradient is asked for.
    """

    fn: Callable[..., Any]
    call: Call
    layout: Layout
    leaves: Leaves
    rank: int
    dtype: torch.dtype
    gradient: bool
    split: dict[str, list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.split = {name: self.layout.split(leaf) for name, leaf in self.leaves.items()}

    def reply(self, probe: int, seed: int) -> Reply:
        """Call the loss for one probe.

        Raises:
            CallError: if it raises, or returns what cannot be a KL.
        """
        leaves = {}
        for name, parts in self.split.items():
            part = parts[probe] if self.rank > 1 else parts[probe][0]
            leaves[name] = part.detach().to(self.dtype, copy=True).requires_grad_(self.gradient)
        return call_once(self.fn, self.call, leaves, seed, probe)


def call_once(fn: Callable[..., Any], call: Call, leaves: Leaves, seed: int, probe: int = 0) -> Reply:
    """Call the loss, from a random stream of its own, and take its gradient.

    The arguments come from `seed` and `probe` alone where they are samples; a loss's own draws from `seed` too.
    """
    with _quiet(), _seeded(seed):
        arguments = call.arguments(leaves)
        before = [_snapshot(argument) for argument in arguments]
        stream = torch.get_rng_state()
        try:
            value = fn(*arguments)
        except Exception as error:
            raise CallError(f"it raises {type(error).__name__}: {_first_line(error)}") from error
        drew = not torch.equal(stream, torch.get_rng_state())
        _check(value)
        after = [_snapshot(argument) for argument in arguments]
        pairs = zip(call.names, before, after, strict=False)
        changed = tuple(name for name, old, new in pairs if not _same(old, new))
        gradients = _gradients(value, leaves)
    detached = tuple(_detached(argument) for argument in arguments)
    return Reply(value.detach().double(), gradients, detached, changed, drew)


def weights_like(value: Tensor) -> Tensor:
    """Return the weights that the gradient of an unreduced loss is taken with: unlike one another, of mean one."""
    index = torch.arange(value.numel(), dtype=torch.float64)
    return (1 + 0.5 * torch.sin(1.7 * index + 0.3)).reshape(value.shape) if value.numel() > 1 else torch.ones_like(value)


def _gradients(value: Tensor, leaves: Leaves) -> dict[str, Tensor | None]:
    if not value.requires_grad:
        return dict.fromkeys(leaves)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    try:
        found = torch.autograd.grad(
            value, list(wanted.values()), weights_like(value).to(value.dtype), allow_unused=True
        )
    except Exception as error:
        raise CallError(f"its backward pass raises {type(error).__name__}: {_first_line(error)}") from error
    return {name: None if grad is None else grad.double() for name, grad in zip(wanted, found, strict=True)}


def _check(value: Any) -> None:
    if value is None:
        raise CallError("it returns None: is a `return` missing?")
    if not isinstance(value, Tensor):
        hint = ": without .item() or .numpy() a gradient could flow" if not isinstance(value, tuple | dict) else ""
        raise CallError(f"it returns {_article(type(value).__name__)}, not a Tensor{hint}")
    if value.is_complex():
        raise CallError(f"it returns a complex tensor ({value.dtype}); a KL is real")
    if not value.is_floating_point():
        raise CallError(f"it returns a tensor of integers or booleans ({value.dtype}); a KL is a floating-point number")


def _article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "(no message)"


def _snapshot(argument: Any) -> list[Tensor]:
    if isinstance(argument, Tensor):
        return [argument.detach().clone()]
    if isinstance(argument, Distribution):
        base = getattr(argument, "base_dist", argument)
        return [getattr(base, name).detach().clone() for name in base.arg_constraints if name in base.__dict__]
    return []


def _same(old: list[Tensor], new: list[Tensor]) -> bool:
    return all(a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(old, new, strict=True))


def _detached(argument: Any) -> Any:
    return argument.detach().double() if isinstance(argument, Tensor) else argument


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch, `random` and NumPy for the block, and give them back as they were."""
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
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.enable_grad():
        warnings.simplefilter("ignore")
        yield


def isolated(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of a module, whose buffers calls may change; anything else as it is."""
    if isinstance(fn, torch.nn.Module):
        with contextlib.suppress(Exception):
            return copy.deepcopy(fn)
    return fn


# --- many calls ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Observation:
    """Hold what a loss returned for all probes, laid end to end.

    Attributes:
        arrangement: what there is a value for: the whole batch, an example, an element, a latent dimension.
        value: `[num_observed]`, the mean over the calls.
        std_error: of `value`; zero for a deterministic loss.
        gradients: by leaf, `[num_elements]`, the mean over the calls; None where no gradient flows.
        gradient_errors: the standard errors of the gradients.
        probe_of_value: which probe a value belongs to, `[num_observed]`.
        arguments: of every probe, of its last call.
        num_calls: for each probe.
        changed: the arguments that were changed.
        drew: whether torch's global stream was drawn from.
    """

    arrangement: Arrangement
    value: Tensor
    std_error: Tensor
    gradients: dict[str, Tensor | None]
    gradient_errors: dict[str, Tensor]
    probe_of_value: Tensor
    arguments: tuple[tuple[Any, ...], ...]
    num_calls: int
    changed: tuple[str, ...]
    drew: bool

    @property
    def stochastic(self) -> bool:
        """Whether the values are means over calls, with an error."""
        return self.num_calls > 1


def observe(asked: Asked, seed: int, num_calls: int = 1) -> Observation:
    """Call the loss `num_calls` times for every probe.

    Raises:
        CallError: if a call fails, or the shape of what it returns follows no rule.
    """
    replies = [
        [asked.reply(probe, seed + call) for call in range(num_calls)] for probe in range(len(asked.layout.shapes))
    ]
    arrangement = arrangement_of([calls[0].value.shape for calls in replies], asked)
    values = [_mean_and_error([reply.value.reshape(-1) for reply in calls]) for calls in replies]
    gradients: dict[str, Tensor | None] = {}
    errors: dict[str, Tensor] = {}
    for name in asked.leaves:
        of_leaf = [[reply.gradients.get(name) for reply in calls] for calls in replies]
        if all(grad is None for calls in of_leaf for grad in calls):
            gradients[name] = None
            continue
        sizes = [part.numel() for part in asked.split[name]]
        parts = [
            _mean_and_error([torch.zeros(size, dtype=torch.float64) if g is None else g.reshape(-1) for g in calls])
            for size, calls in zip(sizes, of_leaf, strict=True)
        ]
        gradients[name] = torch.cat([mean for mean, _ in parts])
        errors[name] = torch.cat([error for _, error in parts])
    counts = torch.tensor([len(mean) for mean, _ in values])
    everything = [reply for calls in replies for reply in calls]
    return Observation(
        arrangement=arrangement,
        value=torch.cat([mean for mean, _ in values]),
        std_error=torch.cat([error for _, error in values]),
        gradients=gradients,
        gradient_errors=errors,
        probe_of_value=torch.arange(len(values)).repeat_interleave(counts),
        arguments=tuple(calls[-1].arguments for calls in replies),
        num_calls=num_calls,
        changed=tuple(dict.fromkeys(name for reply in everything for name in reply.changed)),
        drew=any(reply.drew for reply in everything),
    )


def _mean_and_error(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    stacked = torch.stack(rows)
    if len(rows) == 1:
        return stacked[0], torch.zeros_like(stacked[0])
    groups = torch.stack([chunk.mean(0) for chunk in stacked.chunk(min(GROUPS, len(rows)))])
    return stacked.mean(0), groups.std(0) / len(groups) ** 0.5


def arrangement_of(shapes: list[torch.Size], asked: Asked) -> Arrangement:
    """Return what there is a value for.

    Raises:
        CallError: if the shapes fit nothing.
    """
    for arrangement in _FITS:
        fits = _FITS[arrangement]
        if all(fits(tuple(shape), probe, asked) for shape, probe in zip(shapes, asked.layout.shapes, strict=True)):
            return arrangement
    got, probe = tuple(shapes[0]), asked.layout.shapes[0]
    raise WrongShapeError(
        f"it returns shape {got} at {describe(probe)}: a KL has one value in all, one for each example {probe[:1]}, "
        f"or one for each element {probe}"
    )


class WrongShapeError(CallError):
    """Raised where a loss returns a shape that no reduction has."""


def describe(shape: tuple[int, ...]) -> str:
    """Return a probe's shape in words, such as "16 x 8"."""
    return " x ".join(map(str, shape))


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _joint(asked: Asked) -> bool:
    return asked.call.signature.name == "log_probs"


_FITS: dict[Arrangement, Callable[[tuple[int, ...], tuple[int, ...], Asked], bool]] = {
    "total": lambda shape, probe, asked: not _without_ones(shape),
    "example": lambda shape, probe, asked: asked.rank > 1 and _without_ones(shape) == _without_ones(probe[:1]),
    "element": lambda shape, probe, asked: not _joint(asked) and _without_ones(shape) == _without_ones(probe),
    "latent": lambda shape, probe, asked: not _joint(asked) and _without_ones(shape) == _without_ones(probe[1:]),
}
