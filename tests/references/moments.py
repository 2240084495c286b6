"""The form of a family on the line in mpmath: its moments as q and its cross-entropy as p."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mpmath as mp
import numpy as np

from tests.references.reference import Exact, log_uniform

Draw = Callable[[np.random.Generator, str, int], dict[str, Any]]


class Moments:
    """The moments of one q, from E[x^k] for low < k < high and from what a family adds."""

    def __init__(self, power: Any = None, low: Any = -mp.inf, high: Any = mp.inf, **others: Any) -> None:
        self._power, self._low, self._high, self._others = power, low, high, others

    def power(self, k: Any) -> Any:
        return self._power(k) if self._low < k < self._high else mp.inf

    def mean(self) -> Any:
        return self._others["mean"]() if "mean" in self._others else self.power(1)

    def second(self) -> Any:
        return self._others["second"]() if "second" in self._others else self.power(2)

    @cached_property
    def _mean_of_log(self) -> Any:
        return mp.diff(self._power, 0)

    def log(self) -> Any:
        return self._others["log"]() if "log" in self._others else self._mean_of_log

    def log_second(self) -> Any:
        return mp.diff(self._power, 0, 2)

    def __getattr__(self, name: str) -> Any:
        return self._others[name]


@dataclass(frozen=True)
class Family:
    """One family: the draws of its parameters, the ends of its support, its moments as q and its cross-entropy as p.

    Args:
        draw: (rng, regime, num_draws) -> parameters under torch's names.
        support: parameters -> its two ends.
        entropy: parameters -> differential entropy; None where the family is never q.
        moments: parameters -> moments.
        cross_entropy: (parameters, moments of q) -> E_q[-log p]; None where the family is never p.
    """

    draw: Draw
    support: Callable[[Exact], tuple[Any, Any]]
    entropy: Callable[[Exact], Any] | None = None
    moments: Callable[[Exact], Moments] | None = None
    cross_entropy: Callable[[Exact, Any], Any] | None = None


def spread(low: float, high: float, wide_low: float, wide_high: float) -> Callable[..., Any]:
    """Return a draw that is log-uniform between the two numbers of a regime."""
    spans = {"moderate": (low, high), "wide": (wide_low, wide_high)}
    return lambda rng, regime, n: log_uniform(rng, *spans[regime], n)


positive = spread(0.2, 5, 1e-3, 1e3)
shape = spread(0.3, 20, 1e-2, 1e3)


def real(rng: np.random.Generator, regime: str, n: int) -> Any:
    return rng.choice([-1, 1], n) * positive(rng, regime, n)


def drawn(**parameters: Callable[..., Any]) -> Draw:
    return lambda rng, regime, n: {key: draw(rng, regime, n) for key, draw in parameters.items()}


def location_scale() -> Draw:
    return drawn(loc=real, scale=positive)


def whole_line(p: Exact) -> tuple[Any, Any]:
    return -mp.inf, mp.inf


def half_line(p: Exact) -> tuple[Any, Any]:
    return mp.mpf(0), mp.inf


def unit(p: Exact) -> tuple[Any, Any]:
    return mp.mpf(0), mp.mpf(1)


def gamma_ratio(a: Any, k: Any) -> Any:
    return mp.gamma(a + k) / mp.gamma(a)
