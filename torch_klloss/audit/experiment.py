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
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.audit.probes import Categoricals, Layout, Normals
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
        changed: the arguments, and the global state, that the call changed.
        drew: whether it drew from torch's global stream.
        stream: where that stream stood afterwards.
    """

    value: Tensor
    gradients: dict[str, Tensor | None]
    arguments: tuple[Any, ...]
    changed: tuple[str, ...]
    drew: bool
    stream: Tensor


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

    @cached_property
    def pair(self) -> Normals | Categoricals:
        """The distributions that the probes are of."""
        pair: Normals | Categoricals = self.call.signature.pair(self.leaves, self.layout)
        return pair

    def leaves_of(self, probe: int) -> Leaves:
        """Return one probe's leaves, as the loss gets them: new ones for every call."""
        leaves = {}
        for name, parts in self.split.items():
            part = parts[probe] if self.rank > 1 else parts[probe][0]
            leaves[name] = part.detach().to(self.dtype, copy=True).requires_grad_(self.gradient)
        return leaves

    def reply(self, probe: int, seed: int) -> Reply:
        """Call the loss for one probe.

        Raises:
            CallError: if it raises, or returns what cannot be a KL.
        """
        return self.replies(probe, seed, 1)[0]

    def replies(self, probe: int, seed: int, num_calls: int) -> list[Reply]:
        """Call the loss `num_calls` times for one probe, from one random stream.

        Raises:
            CallError: if it raises, or returns what cannot be a KL.
        """
        with quiet(), seeded(_UNLIKE * seed + probe):
            return [_call(self.fn, self.call, self.leaves_of(probe), watched=n == 0) for n in range(num_calls)]


_UNLIKE = 1000  # more than there are probes: no two of them share a stream


def call_once(fn: Callable[..., Any], call: Call, leaves: Leaves, seed: int) -> Reply:
    """Call the loss, from a random stream of its own, and take its gradient.

    Raises:
        CallError: if it raises, or returns what cannot be a KL.
    """
    with quiet(), seeded(seed):
        return _call(fn, call, leaves, watched=True)


def _call(fn: Callable[..., Any], call: Call, leaves: Leaves, *, watched: bool) -> Reply:
    """Call the loss from the present stream; where `watched`, see what it does on the side."""
    arguments = call.arguments({name: leaf.clone() for name, leaf in leaves.items()})  # as outputs of a network are
    before = [_snapshot(argument) for argument in arguments] if watched else []
    stream = torch.get_rng_state() if watched else None
    state = _global_state()
    try:
        value = fn(*arguments)
    except (Exception, SystemExit) as error:
        raise CallError(f"it raises {type(error).__name__}: {_first_line(error)}") from error
    finally:
        disturbed = _restore(state)
    after_stream = torch.get_rng_state() if watched else torch.empty(0)
    drew = stream is not None and not torch.equal(stream, after_stream)
    if isinstance(value, float) and not any(leaf.requires_grad for leaf in leaves.values()):
        value = torch.tensor(value, dtype=torch.float64)  # a number to log
    _check(value)
    after = [_snapshot(argument) for argument in arguments] if watched else []
    pairs = zip(call.names, before, after, strict=False)
    changed = (*(name for name, old, new in pairs if not _same(old, new)), *disturbed)
    gradients = _gradients(value, leaves)
    detached = tuple(_detached(argument) for argument in arguments) if watched else ()
    return Reply(value.detach().double().cpu(), gradients, detached, changed, drew, after_stream)


_GlobalState = tuple[torch.dtype, bool, int]


def _global_state() -> _GlobalState:
    return torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()


def _restore(state: _GlobalState) -> list[str]:
    """Undo what a loss did to torch's global state; return what that was."""
    words = ("torch's default dtype", "whether torch records gradients", "torch's number of threads")
    disturbed = [word for word, old, new in zip(words, state, _global_state(), strict=True) if old != new]
    if disturbed:
        torch.set_default_dtype(state[0])
        torch.set_grad_enabled(state[1])
        torch.set_num_threads(state[2])
    return disturbed


def weights_like(value: Tensor) -> Tensor:
    """Return the weights that the gradient of an unreduced loss is taken with: unlike one another, of mean one."""
    index = torch.arange(value.numel(), dtype=torch.float64)
    return (
        (1 + 0.5 * torch.sin(1.7 * index + 0.3)).reshape(value.shape) if value.numel() > 1 else torch.ones_like(value)
    )


def _gradients(value: Tensor, leaves: Leaves) -> dict[str, Tensor | None]:
    if not value.requires_grad:
        return dict.fromkeys(leaves)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    try:
        weighted = (value * weights_like(value).to(value.dtype)).sum()
        found = torch.autograd.grad(weighted, list(wanted.values()), allow_unused=True)
    except Exception as error:
        raise CallError(f"its backward pass raises {type(error).__name__}: {_first_line(error)}") from error
    return {name: None if grad is None else grad.double() for name, grad in zip(wanted, found, strict=True)}


def _check(value: Any) -> None:
    if value is None:
        raise CallError("it returns None: is a `return` missing?")
    if not isinstance(value, Tensor):
        hint = (
            ""
            if isinstance(value, tuple | dict)
            else "; a number to log and not to train with: audit(…, gradient=False)"
        )
        raise CallError(f"it returns {_article(type(value).__name__)}, not a Tensor{hint}")
    if value.is_complex():
        raise CallError(f"it returns a complex tensor ({value.dtype}); a KL is real")
    if not value.is_floating_point():
        raise CallError(f"it returns a tensor of integers or booleans ({value.dtype}); a KL is a floating-point number")


def _article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "(no message)"


def _snapshot(argument: Any) -> dict[str, Tensor]:
    if isinstance(argument, Tensor):
        return {"": argument.detach().clone()}
    if isinstance(argument, Distribution):
        base = getattr(argument, "base_dist", argument)
        return {name: base.__dict__[name].detach().clone() for name in base.arg_constraints if name in base.__dict__}
    return {}


def _same(old: dict[str, Tensor], new: dict[str, Tensor]) -> bool:
    """Return whether all that there was is as it was; a distribution may have computed more."""
    return all(
        before.shape == new[name].shape and torch.equal(before.nan_to_num(), new[name].nan_to_num())
        for name, before in old.items()
    )


def _detached(argument: Any) -> Any:
    return argument.detach().double() if isinstance(argument, Tensor) else argument


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
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
def quiet() -> Iterator[None]:
    """Let a loss neither print nor warn for the block, and record gradients."""
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
        gradients: by leaf, the mean over the calls; None where no gradient flows. `[num_elements]`, or their components
            along `directions`, which are Normal sooner than the elements are, `[num_probes · num_directions]`.
        gradient_errors: the standard errors of the gradients.
        directions: by leaf and probe, `[num_directions, size]`; None for all elements.
        probe_of_value: which probe a value belongs to, `[num_observed]`.
        arguments: of every probe, of its first call.
        num_calls: for each probe.
        changed: the arguments that were changed.
        drew: whether torch's global stream was drawn from.
    """

    arrangement: Arrangement
    value: Tensor
    std_error: Tensor
    gradients: dict[str, Tensor | None]
    gradient_errors: dict[str, Tensor]
    directions: Directions | None
    probe_of_value: Tensor
    arguments: tuple[tuple[Any, ...], ...]
    num_calls: int
    changed: tuple[str, ...]
    drew: bool

    @property
    def stochastic(self) -> bool:
        """Whether the values are means over calls, with an error."""
        return self.num_calls > 1

    def along(self, name: str, elements: Tensor, layout: Layout) -> Tensor:
        """Return a leaf's gradient, `[num_elements]`, as `gradients` has it."""
        if self.directions is None:
            return elements
        parts = zip(self.directions[name], layout.split(elements), strict=True)
        return torch.cat([directions @ part.reshape(-1) for directions, part in parts])


Directions = dict[str, list[Tensor]]


def observe(asked: Asked, seed: int, num_calls: int = 1, directions: Directions | None = None) -> Observation:
    """Call the loss `num_calls` times for every probe.

    Args:
        asked: the loss and its probes.
        seed: of the random streams.
        num_calls: for each probe.
        directions: along which the gradients are kept.

    Raises:
        CallError: if a call fails, or the shape of what it returns follows no rule.
    """
    replies = [asked.replies(probe, seed, num_calls) for probe in range(len(asked.layout.shapes))]
    if any(reply.value.shape != calls[0].value.shape for calls in replies for reply in calls):
        raise CallError("it returns another shape from call to call")
    arrangement = arrangement_of([calls[0].value.shape for calls in replies], asked)
    values = [_mean_and_error(torch.stack([reply.value.reshape(-1) for reply in calls])) for calls in replies]
    gradients: dict[str, Tensor | None] = {}
    errors: dict[str, Tensor] = {}
    for name in asked.leaves:
        of_leaf = [[reply.gradients.get(name) for reply in calls] for calls in replies]
        if all(grad is None for calls in of_leaf for grad in calls):
            gradients[name] = None
            continue
        parts = []
        for probe, calls in enumerate(of_leaf):
            nothing = torch.zeros(asked.split[name][probe].numel(), dtype=torch.float64)
            rows = torch.stack([nothing if grad is None else grad.reshape(-1) for grad in calls])
            parts.append(_mean_and_error(rows if directions is None else rows @ directions[name][probe].T))
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
        directions=directions,
        probe_of_value=torch.arange(len(values)).repeat_interleave(counts),
        arguments=tuple(calls[0].arguments for calls in replies),
        num_calls=num_calls,
        changed=tuple(dict.fromkeys(name for reply in everything for name in reply.changed)),
        drew=any(reply.drew for reply in everything),
    )


def _mean_and_error(rows: Tensor) -> tuple[Tensor, Tensor]:
    if len(rows) == 1:
        return rows[0], torch.zeros_like(rows[0])
    groups = torch.stack([chunk.mean(0) for chunk in rows.chunk(GROUPS)])
    return groups.mean(0), groups.std(0) / len(groups) ** 0.5


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
