"""The weight of a loss: a number, or a schedule of it."""

from __future__ import annotations

import math

from torch_klloss.language.observers import Observed
from torch_klloss.schedules import Schedule


class Weighted(Observed):
    """Base of the losses with a weight, which `KLAnnealing` may set before every step."""

    def __init__(self, weight: float | Schedule) -> None:
        super().__init__()
        self.schedule = weight if isinstance(weight, Schedule) else None
        self._weight = None if isinstance(weight, Schedule) else _checked(weight)

    @property
    def weight(self) -> float:
        """The factor of the loss in a call without `step`; set it to drive it from outside."""
        if self._weight is None and self.schedule is not None:
            return float(self.schedule(0))
        return float(self._weight or 0.0)

    @weight.setter
    def weight(self, value: float) -> None:
        self._weight = _checked(value)

    def weight_at(self, step: float | None) -> float:
        """Return the factor at a step.

        Raises:
            ValueError: if it is a schedule that nothing drives, and there is no step.
        """
        if self.schedule is None or (step is None and self._weight is not None):
            return self.weight
        if step is None:
            raise ValueError(
                f"weight is {self.schedule!r} and needs a step: pass step= to the loss, or let the callback "
                "KLAnnealing drive it."
            )
        return _checked(self.schedule(step))


def _checked(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"weight must be a number or a Schedule, got {value!r}.")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"weight must be finite and at least 0, got {value!r}.")
    return float(value)
