"""One pair of types in mpmath: how its parameters are drawn, what its KL is, and the gradient of that.

`Reference` describes a pair. Every module beside this one keeps its pairs in a list `REFERENCES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mpmath
import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

DIGITS = 60
REGIMES = ("moderate", "wide", "near")

Params = dict[str, Tensor]
"""The parameters of a batch: each tensor is [num_draws, *event of the parameter]."""
Exact = Mapping[str, Any]
"""The parameters of one draw: numpy object arrays of mpf, or an mpf where the parameter is a scalar."""


@dataclass(frozen=True)
class Reference:
    """Describe one pair of types: how to draw it, how to build it, what its KL is.

    Args:
        name: what the pair is called in tables.
        type_q: the type that the rule is registered for as q.
        type_p: the same for p.
        draw: (regime, num_draws, rng, dtype) -> (parameters of q, parameters of p), float64 arrays whose first
            dimension is `num_draws`; the harness rounds them to the dtype.
        kl: the KL of one draw, from mpf parameters (arrays of them, or scalars), in mpmath.
        build_q: makes q of its parameters, passed by keyword; the type itself by default.
        build_p: the same for p; as q by default.
        gradient: the derivatives of one draw, (q, p) -> (by q's parameters, by p's parameters), dicts shaped as the
            parameters; by default the KL is differentiated numerically.
        constants: parameters that are not differentiated, such as a number of trials.
        held: parameters that the constructor changes and that count as it left them (the normalised `probs` of a
            Categorical): they are read off the distribution under their names.
        regimes: the regimes that `draw` knows.
        digits: that `kl` is evaluated with; more than 60 where it takes differences of very unlike numbers.
        recorded: whether its truth takes so long to compute that `recorded.py` keeps it.
    """

    name: str
    type_q: type[Distribution]
    type_p: type[Distribution]
    draw: Callable[[str, int, np.random.Generator, torch.dtype], tuple[dict[str, Any], dict[str, Any]]]
    kl: Callable[[Exact, Exact], Any]
    build_q: Callable[..., Distribution] | None = None
    build_p: Callable[..., Distribution] | None = None
    gradient: Callable[[Exact, Exact], tuple[Exact, Exact]] | None = None
    constants: frozenset[str] = frozenset()
    held: frozenset[str] = frozenset()
    regimes: tuple[str, ...] = REGIMES
    digits: int = DIGITS
    recorded: bool = False

    def build(self, q: Params, p: Params) -> tuple[Distribution, Distribution]:
        """Return the two distributions of these parameters."""
        make_q = self.build_q or self.type_q
        make_p = self.build_p or (make_q if self.type_p is self.type_q else self.type_p)
        return make_q(**q), make_p(**p)

    def gradient_at(self, q: Exact, p: Exact) -> list[Any]:
        """Return the derivatives of one draw by every parameter that has one, entry by entry."""
        if self.gradient is None:
            by_parameter = differentiate(self.kl, q, p, self.constants)
        else:
            sides = zip(self.gradient(q, p), (q, p), strict=True)
            by_parameter = [by[key] for by, params in sides for key in params if key not in self.constants]
        return [entry for entries in by_parameter for entry in np.asarray(entries, dtype=object).reshape(-1)]


def differentiate(f: Callable[[Exact, Exact], Any], q: Exact, p: Exact, constants: frozenset[str]) -> list[Any]:
    """Return the derivatives of f by every parameter, one array (or scalar) a parameter, by central differences.

    At a precision of 3n/2 digits and a relative step of 10^(-n/2), truncation and rounding both leave n good digits.
    """
    gradient = []
    for side, params in enumerate((q, p)):
        for key in params:
            if key not in constants:
                entries = np.asarray(params[key], dtype=object)
                by_key = np.empty_like(entries)
                for index in np.ndindex(entries.shape):
                    by_key[index] = _central_difference(f, (q, p), side, key, index)
                gradient.append(by_key)
    return gradient


def near(x: Any, rng: np.random.Generator, low: float = 1e-8, high: float = 1e-2) -> Any:
    """Return x with relative changes of a size that is log-uniform between `low` and `high`, one size a draw."""
    x = np.asarray(x, dtype=float)
    size = log_uniform(rng, low, high, (len(x),) + (1,) * (x.ndim - 1))
    return x * (1 + size * rng.standard_normal(x.shape))


def log_uniform(rng: np.random.Generator, low: float, high: float, shape: Any) -> Any:
    """Return numbers whose logarithm is uniform between those of `low` and `high`."""
    return np.exp(rng.uniform(np.log(low), np.log(high), shape))


def _central_difference(
    f: Callable[[Exact, Exact], Any], pair: tuple[Exact, Exact], side: int, key: str, at: Any
) -> Any:
    def shifted(step: Any) -> Any:
        entries = np.array(pair[side][key], dtype=object)
        entries[at] = entries[at] + step
        changed = {**pair[side], key: entries if entries.ndim else entries[()]}
        return f(changed, pair[1]) if side == 0 else f(pair[0], changed)

    x = np.asarray(pair[side][key], dtype=object)[at]
    digits = mpmath.mp.dps
    with mpmath.workdps(3 * digits // 2):
        step = (abs(x) or mpmath.mpf(1)) * mpmath.mpf(10) ** -(digits // 2)
        return (shifted(step) - shifted(-step)) / (2 * step)
