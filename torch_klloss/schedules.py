"""Schedules of the weight of the KL: small frozen objects that map a step to a weight.

    weight = Linear(steps=1000)     # from 0 to 1 over 1000 steps
    loss = ELBOLoss(beta=weight)    # driven by loss(…, step=…), or by the KLAnnealing callback

The caller chooses the unit of a step: optimiser steps, epochs, or fractions of epochs. Every schedule begins at
`start`, and is exactly `stop` from `step >= total_steps` on. Schedules compare by value, pickle, and print as they are
built. To write your own, derive from `Schedule`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from torch_klloss.numerics.arguments import check_integer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Constant",
    "Cosine",
    "Cyclical",
    "Linear",
    "Schedule",
    "Sigmoid",
]


def __dir__() -> list[str]:
    return sorted(__all__)


class Schedule(ABC):
    """A function from a step to a weight.

    Examples:
        >>> from dataclasses import dataclass
        >>> from torch_klloss.schedules import Schedule
        >>> @dataclass(frozen=True)
        ... class Switch(Schedule):
        ...     at: float
        ...     def __call__(self, step: float) -> float:
        ...         return float(step >= self.at)
        ...     @property
        ...     def total_steps(self) -> float:
        ...         return self.at
        >>> Switch(at=10)(9), Switch(at=10)(10)
        (0.0, 1.0)
    """

    @abstractmethod
    def __call__(self, step: float) -> float:
        """Return the weight at a step >= 0."""

    @property
    @abstractmethod
    def total_steps(self) -> float:
        """The step at which the warm-up ends: the weight is constant from there on."""

    def curve(self, num_points: int = 201) -> tuple[list[float], list[float]]:
        """Return steps from 0 to a tenth beyond the warm-up, and their weights, for a plot.

        Examples:
            >>> from torch_klloss.schedules import Linear
            >>> Linear(steps=10).curve(num_points=3)
            ([0.0, 5.5, 11.0], [0.0, 0.55, 1.0])
        """
        last = 1.1 * self.total_steps or 1.0
        steps = [last * k / (num_points - 1) for k in range(num_points)]
        return steps, [self(step) for step in steps]

    def figure(self, num_steps: float | None = None) -> Figure:
        """Return the figure of the weight over the steps; `plots.schedule_figure` draws several schedules.

        Args:
            num_steps: the last step drawn; by default a tenth beyond the end of the warm-up.

        Raises:
            ImportError: if matplotlib is missing.
            ValueError: if `num_steps` is not above 0.

        Examples:
            >>> from torch_klloss.schedules import Linear
            >>> Linear(steps=10).figure(num_steps=20).axes[0].get_ylabel()
            'weight β'
        """
        from torch_klloss.plots import schedule_figure

        return schedule_figure(self, num_steps)


@dataclass(frozen=True)
class Constant(Schedule):
    """The same weight at every step.

    Examples:
        >>> from torch_klloss.schedules import Constant
        >>> Constant(4.0)(0), Constant(4.0).total_steps
        (4.0, 0)
    """

    value: float

    def __post_init__(self) -> None:
        _check_finite(value=self.value)

    def __call__(self, step: float) -> float:
        """Return the weight."""
        _check_step(step)
        return float(self.value)

    @property
    def total_steps(self) -> float:
        """Zero: there is no warm-up."""
        return 0


@dataclass(frozen=True)
class _Rise(Schedule):
    """A rise from `start` to `stop` over `steps` steps, after `delay` steps at `start`; `stop` from then on."""

    start: float = 0.0
    stop: float = 1.0
    _: KW_ONLY
    steps: float
    delay: float = 0

    def __post_init__(self) -> None:
        _check_finite(start=self.start, stop=self.stop, steps=self.steps, delay=self.delay)
        if self.steps <= 0:
            raise ValueError(f"steps must be above 0, got {self.steps!r}; a weight without a warm-up is a Constant.")
        if self.delay < 0:
            raise ValueError(f"delay must be at least 0, got {self.delay!r}.")

    def __call__(self, step: float) -> float:
        _check_step(step)
        fraction = (step - self.delay) / self.steps
        if fraction <= 0:
            return float(self.start)
        if fraction >= 1:
            return float(self.stop)
        return self.start + (self.stop - self.start) * self._progress(fraction)

    @property
    def total_steps(self) -> float:
        return self.delay + self.steps

    @abstractmethod
    def _progress(self, fraction: float) -> float:
        """Return the fraction of the rise after a fraction in (0, 1) of the steps."""


@dataclass(frozen=True)
class Linear(_Rise):
    """A straight line from `start` to `stop`.

    Args:
        start: the first weight.
        stop: the last weight.
        steps: how many steps the rise takes.
        delay: how many steps the weight stays at `start` before the rise.

    References:
        *Ladder variational autoencoders* (Sønderby et al., 2016), "warm-up".

    Examples:
        >>> from torch_klloss.schedules import Linear
        >>> [Linear(steps=4)(step) for step in range(6)]
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """

    def _progress(self, fraction: float) -> float:
        return fraction


@dataclass(frozen=True)
class Sigmoid(_Rise):
    """A logistic curve from `start` to `stop`, scaled to meet both ends exactly.

    Args:
        start: as in `Linear`.
        stop: as in `Linear`.
        steps: as in `Linear`.
        delay: as in `Linear`.
        sharpness: the range of the curve's argument: near 0 a straight line, towards infinity a step.

    References:
        *Generating sentences from a continuous space* (Bowman et al., 2016), section 3.1.

    Examples:
        >>> from torch_klloss.schedules import Sigmoid
        >>> [round(Sigmoid(steps=4)(step), 3) for step in range(6)]
        [0.0, 0.07, 0.5, 0.93, 1.0, 1.0]
    """

    _: KW_ONLY
    sharpness: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_finite(sharpness=self.sharpness)
        if self.sharpness <= 0:
            raise ValueError(f"sharpness must be above 0, got {self.sharpness!r}; the straight line is Linear.")

    def _progress(self, fraction: float) -> float:
        # tanh(k/2 (2f - 1)) runs over the same curve, without the difference of two numbers near ½ at small k.
        half = self.sharpness / 4
        return 0.5 + 0.5 * math.tanh(half * (2 * fraction - 1)) / math.tanh(half)


@dataclass(frozen=True)
class Cosine(_Rise):
    """Half a period of a cosine from `start` to `stop`, flat at both ends.

    Args:
        start: as in `Linear`.
        stop: as in `Linear`.
        steps: as in `Linear`.
        delay: as in `Linear`.

    References:
        *SGDR: stochastic gradient descent with warm restarts* (Loshchilov and Hutter, 2017), for the shape.

    Examples:
        >>> from torch_klloss.schedules import Cosine
        >>> [round(Cosine(steps=4)(step), 3) for step in range(6)]
        [0.0, 0.146, 0.5, 0.854, 1.0, 1.0]
    """

    def _progress(self, fraction: float) -> float:
        return math.sin(math.pi * fraction / 2) ** 2


@dataclass(frozen=True)
class Cyclical(_Rise):
    """Repeated rises from `start` to `stop`: each cycle is a straight line, then a rest at `stop`.

    Args:
        start: the weight at the beginning of a cycle.
        stop: the weight at its end, and after the last cycle.
        steps: how many steps all cycles take together.
        delay: how many steps the weight stays at `start` before the first cycle.
        cycles: how many cycles there are.
        ramp: the fraction of a cycle that the rise takes, in (0, 1].

    References:
        *Cyclical annealing schedule: a simple approach to mitigating KL vanishing* (Fu et al., 2019).

    Examples:
        >>> from torch_klloss.schedules import Cyclical
        >>> [Cyclical(steps=8, cycles=2)(step) for step in range(9)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0]
    """

    _: KW_ONLY
    cycles: int = 4
    ramp: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("cycles", self.cycles)
        _check_finite(ramp=self.ramp)
        if not 0 < self.ramp <= 1:
            raise ValueError(f"ramp must lie in (0, 1], the fraction of a cycle that rises, got {self.ramp!r}.")

    def _progress(self, fraction: float) -> float:
        return min(1.0, fraction * self.cycles % 1.0 / self.ramp)


def _check_finite(**values: float) -> None:
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{key} must be a number, got {type(value).__name__}.")
        if not math.isfinite(value):
            raise ValueError(f"{key} must be finite, got {value!r}.")


def _check_step(step: float) -> None:
    if not step >= 0:
        raise ValueError(f"step must be at least 0, got {step!r}: training begins at step 0.")
