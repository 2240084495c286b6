"""Observations of a loss: its values and gradients at many probes, laid end to end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from torch_klloss.auditing.experiment.calling import CallError, Reply, quiet, reply_to, seeded
from torch_klloss.auditing.experiment.parameters import Binding
from torch_klloss.auditing.experiment.probes import Layout, Shape
from torch_klloss.auditing.experiment.signatures import SIGNATURES, Leaves, ProbedPair, Signature
from torch_klloss.numerics.special import student_t_quantile

Arrangement = Literal["total", "example", "element", "latent"]
GROUPS = 32
"""The number of groups that the calls of a stochastic loss are divided into: a group's mean is nearly Normal."""

_STREAM_STRIDE = 1000  # more than the number of probes, so that no two of them share a random stream


@dataclass(frozen=True)
class Subject:
    """A loss with its probes.

    Attributes:
        fn: the loss.
        binding: its signature and the order of its arguments.
        layout: of the probes.
        leaves: the tensors that the arguments are made of, flat and in float64.
        rank: the number of dimensions of an argument.
        dtype: of the arguments.
        gradient: whether its gradient is observed.
    """

    fn: Callable[..., Any]
    binding: Binding
    layout: Layout
    leaves: Leaves
    rank: int
    dtype: torch.dtype
    gradient: bool

    @property
    def signature(self) -> Signature:
        """The signature that the loss is called with."""
        return self.binding.signature

    @cached_property
    def split(self) -> dict[str, list[Tensor]]:
        """The leaves of every probe, in its shape."""
        return {name: self.layout.split(leaf) for name, leaf in self.leaves.items()}

    @cached_property
    def pair(self) -> ProbedPair:
        """The distributions of all probes."""
        pair: ProbedPair = self.signature.pair(self.leaves, self.layout)
        return pair

    def leaves_of(self, probe: int) -> Leaves:
        """Return new copies of one probe's leaves, in the dtype of the arguments."""
        leaves = {}
        for name, parts in self.split.items():
            part = parts[probe] if self.rank > 1 else parts[probe][0]
            leaves[name] = part.detach().to(self.dtype, copy=True).requires_grad_(self.gradient)
        return leaves

    def replies(self, probe: int, seed: int, num_calls: int = 1) -> list[Reply]:
        """Call the loss `num_calls` times for one probe, from one random stream.

        Raises:
            CallError: if it raises, or returns what cannot be a KL.
        """
        with quiet(), seeded(_STREAM_STRIDE * seed + probe):
            return [reply_to(self.fn, self.binding, self.leaves_of(probe), watched=n == 0) for n in range(num_calls)]


def without_loss(signature: str, layout: Layout, leaves: Leaves) -> Subject:
    """Return the probes alone, for what depends on no loss."""
    chosen = SIGNATURES[signature]
    binding = Binding(chosen, tuple(range(len(chosen.roles))), chosen.roles)
    return Subject(lambda *_: None, binding, layout, leaves, 2, torch.float64, False)


@dataclass(frozen=True)
class Observation:
    """The values and gradients of a loss at all probes, laid end to end.

    Attributes:
        arrangement: whether a value is one of the whole batch, of an example, of an element or of a latent dimension.
        value: `[num_observed]`, the mean over the calls.
        std_error: of `value`; zero for a deterministic loss.
        sum_error: the standard error of the sum of a probe's values, which may share their noise, `[num_probes]`.
        probe_of_value: the probe of each value, `[num_observed]`.
        num_calls: for each probe.
        gradients: by leaf, the mean over the calls, `[num_elements]`; None where no gradient flows. With `directions`
            the components along them, whose means are nearly Normal sooner, `[num_probes · num_directions]`.
        gradient_errors: the standard errors of the gradients.
        directions: by leaf and probe, `[num_directions, size]`; None where every element is kept.
        arguments: the arguments of every probe's first call.
        changed: the arguments and the global state that the loss changed.
        drew: whether the loss drew from torch's global stream.
    """

    arrangement: Arrangement
    value: Tensor
    std_error: Tensor
    sum_error: Tensor
    probe_of_value: Tensor
    num_calls: int
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    gradient_errors: dict[str, Tensor] = field(default_factory=dict)
    directions: Directions | None = None
    arguments: tuple[tuple[Any, ...], ...] = ()
    changed: tuple[str, ...] = ()
    drew: bool = False

    @property
    def stochastic(self) -> bool:
        """Whether the values are means over calls, with an error."""
        return self.num_calls > 1

    def along(self, name: str, elements: Tensor, layout: Layout) -> Tensor:
        """Return a leaf's gradient, `[num_elements]`, or its components along the directions of `gradients`."""
        if self.directions is None:
            return elements
        parts = zip(self.directions[name], layout.split(elements), strict=True)
        return torch.cat([directions @ part.reshape(-1) for directions, part in parts])


Directions = dict[str, list[Tensor]]


def observe(subject: Subject, seed: int, num_calls: int = 1, directions: Directions | None = None) -> Observation:
    """Call the loss `num_calls` times for every probe.

    Args:
        subject: the loss and its probes.
        seed: of the random streams.
        num_calls: for each probe.
        directions: the directions along which the gradients are kept.

    Raises:
        CallError: if a call fails, or no arrangement has the shape of what it returns.
    """
    replies = [subject.replies(probe, seed, num_calls) for probe in range(len(subject.layout.shapes))]
    if any(reply.value.shape != calls[0].value.shape for calls in replies for reply in calls):
        raise CallError("it returns another shape from call to call")
    arrangement = arrangement_of([calls[0].value.shape for calls in replies], subject)
    rows = [torch.stack([reply.value.reshape(-1) for reply in calls]) for calls in replies]
    values = [_mean_and_error(of_probe) for of_probe in rows]
    gradients: dict[str, Tensor | None] = {}
    errors: dict[str, Tensor] = {}
    for name in subject.leaves:
        of_leaf = [[reply.gradients.get(name) for reply in calls] for calls in replies]
        if all(grad is None for calls in of_leaf for grad in calls):
            gradients[name] = None
            continue
        parts = []
        for probe, calls in enumerate(of_leaf):
            nothing = torch.zeros(subject.split[name][probe].numel(), dtype=torch.float64)
            found = torch.stack([nothing if grad is None else grad.reshape(-1) for grad in calls])
            parts.append(_mean_and_error(found if directions is None else found @ directions[name][probe].T))
        gradients[name] = torch.cat([mean for mean, _ in parts])
        errors[name] = torch.cat([error for _, error in parts])
    counts = torch.tensor([len(mean) for mean, _ in values])
    everything = [reply for calls in replies for reply in calls]
    return Observation(
        arrangement=arrangement,
        value=torch.cat([mean for mean, _ in values]),
        std_error=torch.cat([error for _, error in values]),
        sum_error=torch.cat([_mean_and_error(of_probe.sum(1, keepdim=True))[1] for of_probe in rows]),
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


@lru_cache
def largest_deviation(count: int, false_alarm: float, pooled: int = 1) -> float:
    """Return the largest deviation of `count` means over groups, in standard errors, but for false alarms.

    Args:
        count: the number of means.
        false_alarm: the probability that one of them deviates by more.
        pooled: the number of independent errors that each standard error is of.
    """
    return float(student_t_quantile(1 - false_alarm / (2 * count), max(pooled, 1) * (GROUPS - 1.0)))


def arrangement_of(shapes: list[torch.Size], subject: Subject) -> Arrangement:
    """Return whether a value is one of the batch, of an example, of an element or of a latent dimension.

    Raises:
        WrongShapeError: if the shapes are none of these.
    """
    for arrangement, shape_in in SHAPE_IN.items():
        is_joint = subject.signature.name == "log_probs" and arrangement in ("element", "latent")
        pairs = zip(shapes, subject.layout.shapes, strict=True)
        dims = subject.layout.example_dims
        if not is_joint and all(are_alike(shape, shape_in(probe, dims)) for shape, probe in pairs):
            return arrangement
    got, probe = tuple(shapes[0]), subject.layout.shapes[0]
    raise WrongShapeError(
        f"it returns shape {got} at {describe(probe)}: a KL has one value in all, one for each example {probe[:1]}, "
        f"or one for each element {probe}"
    )


class WrongShapeError(CallError):
    """Raised where a loss returns a shape that no arrangement has."""


def describe(shape: tuple[int, ...]) -> str:
    """Return a probe's shape in words, such as "16 x 8"."""
    return " x ".join(map(str, shape))


def are_alike(one: Sequence[int], other: Sequence[int]) -> bool:
    """Return whether two shapes are equal up to dimensions of size one."""
    return [size for size in one if size != 1] == [size for size in other if size != 1]


SHAPE_IN: Mapping[Arrangement, Callable[[Shape, int], Shape]] = {
    "total": lambda probe, example_dims: (),
    "example": lambda probe, example_dims: probe[:example_dims],
    "element": lambda probe, example_dims: probe,
    "latent": lambda probe, example_dims: probe[example_dims:],
}
"""The shape of a probe's values, by arrangement; the first that fits is the loss's."""
