"""Asking a loss about many probes: its values and gradients laid end to end, and what its values are of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from torch_klloss.auditing.experiment.calling import CallError, Reply, quiet, reply_to, seeded
from torch_klloss.auditing.experiment.parameters import Call
from torch_klloss.auditing.experiment.probes import Categoricals, Layout, Normals
from torch_klloss.auditing.experiment.signatures import Leaves

Arrangement = Literal["total", "example", "element", "latent"]
GROUPS = 32
"""Into so many groups the calls of a stochastic loss are taken: their means are nearly Normal."""


_UNLIKE = 1000  # more than there are probes: no two of them share a stream


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
            return [reply_to(self.fn, self.call, self.leaves_of(probe), watched=n == 0) for n in range(num_calls)]


@dataclass(frozen=True)
class Observation:
    """Hold what a loss returned for all probes, laid end to end.

    Attributes:
        arrangement: what there is a value for: the whole batch, an example, an element, a latent dimension.
        value: `[num_observed]`, the mean over the calls.
        std_error: of `value`; zero for a deterministic loss.
        sum_error: the standard error of the sum of a probe's values, which may share their noise, `[num_probes]`.
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
    sum_error: Tensor
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
    rows = [torch.stack([reply.value.reshape(-1) for reply in calls]) for calls in replies]
    values = [_mean_and_error(of_probe) for of_probe in rows]
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
