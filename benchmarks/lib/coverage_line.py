"""The true KL of two densities on the line.

The double-exponential rule at 100 digits between all kinks, at two step sizes whose difference is the error that is
stated. Whether an integral diverges is argued at either end of the support, from the slope of the logarithm of the
integrand's positive part at distances of exp(±300) and exp(±600), in numbers of 320 digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import mpmath as mp
from mpmath import exp, inf, log, mpf

from lib.coverage_densities import Line

mp.mp.dps = 100
Kind = Literal["finite", "infinite", "undefined"]
SUPPORT = "p lacks q's support"
SINGULAR = "q lives on a set to which p gives no mass"
MOMENT = "a moment diverges"


@dataclass(frozen=True)
class Truth:
    """A true KL: its kind, the value with its error where it is finite, and the reason where it is not."""

    kind: Kind
    value: float = 0.0
    error: float = 0.0
    reason: str = ""

    def __add__(self, other: Truth) -> Truth:
        for each in (self, other):
            if each.kind != "finite":
                return each
        return Truth("finite", self.value + other.value, self.error + other.error)


UNDEFINED = Truth("undefined", reason="one is discrete, the other continuous")
ZERO = Truth("finite")


def infinite(reason: str) -> Truth:
    """Return an infinite KL."""
    return Truth("infinite", reason=reason)


STEP = mpf(1) / 64
REACH = mpf("4.7")  # exp(π/2 sinh 4.7) = 1e37
CRITICAL, DECAYING = mpf("-1e-2"), mpf("-0.04")


def kl_on_the_line(q: Line, p: Line) -> Truth:
    """Return the KL of two densities on the line."""
    if not (p.reaches(q.lower) and p.reaches(q.upper)):
        return infinite(SUPPORT)
    if any(diverges(q, p, end) for end in (q.lower, q.upper)):
        return infinite(MOMENT)

    def log_ratio(x: Any, log_q: Any) -> Any:
        return log_q - p.log_density(x)

    value, error = expectation(q, log_ratio, p.kinks)
    return Truth("finite", value, error)


def diverges(q: Line, p: Line, end: Any) -> bool:
    """Return whether the positive part of q log(q/p) has an infinite integral towards an end of q's support.

    With v the logarithm of the distance, the integrand falls as exp(slope v), or faster, where it converges; a power
    that is just critical has a slope of 0, and its logarithms add about 1/300.

    Raises:
        ValueError: if the slope is neither.
    """
    with mp.workdps(320):
        heights = [_log_height(q, p, end, v) for v in (mpf(300), mpf(600))]
    if -inf in heights:
        return False
    slope = (heights[1] - heights[0]) / 300
    if CRITICAL < slope < -CRITICAL or slope > 0:
        return True
    if slope < DECAYING:
        return False
    raise ValueError(f"cannot tell whether the integral diverges: its slope is {mp.nstr(slope, 5)}")


def _log_height(q: Line, p: Line, end: Any, v: Any) -> Any:
    """Return log of q (log q - log p)⁺ dx/dv at a distance of exp(v) from 0, or of exp(-v) from a finite end."""
    distance = exp(v) if abs(end) == inf else exp(-v)
    x = mp.sign(end) * distance if abs(end) == inf else end + (distance if end == q.lower else -distance)
    log_q = q.log_density(x)
    log_ratio = log_q - p.log_density(x)
    return log_q + log(log_ratio) + log(distance) if log_ratio > 0 else -inf


def expectation(q: Line, f: Any, kinks: Sequence[Any] = ()) -> tuple[float, float]:
    """Return E_q[f(x, log q(x))] and its error."""
    fine, coarse = mpf(0), mpf(0)
    for is_coarse, x, weight, log_q in _weighted_nodes(q, tuple(kinks)):
        term = weight * f(x, log_q)
        fine += term
        coarse += 2 * term if is_coarse else 0
    return float(fine), float(abs(fine - coarse)) + 1e-16


@cache
def _weighted_nodes(q: Line, kinks: tuple[Any, ...]) -> list[tuple[bool, Any, Any, Any]]:
    """Return whether a node is of the coarse rule, the node, its weight under q, and log q, between all kinks."""
    inner = sorted({kink for kink in (*q.kinks, *kinks) if q.lower < kink < q.upper})
    if not inner and abs(q.lower) == abs(q.upper) == inf:
        inner = [mpf(0)]
    found = []
    for a, b in pairwise((q.lower, *inner, q.upper)):
        for is_coarse, x, dx in nodes_between(a, b):
            log_q = q.log_density(x)
            if log_q > -500:
                found.append((is_coarse, x, exp(log_q) * dx, log_q))
    return found


@cache
def nodes_between(a: Any, b: Any) -> list[tuple[bool, Any, Any]]:
    """Return the double-exponential rule on (a, b): whether a node is of the coarse rule, the node, its weight.

    Nodes at an end that 100 digits cannot tell from it are left out: a density there would have to be a power below
    -1/2 for their mass to count.

    References:
        *Double exponential formulas for numerical integration* (Takahasi and Mori, 1974).
    """
    found = []
    for k in range(-int(REACH / STEP), int(REACH / STEP) + 1):
        t = k * STEP
        s, ds = mp.pi / 2 * mp.sinh(t), mp.pi / 2 * mp.cosh(t) * STEP
        if b == inf:
            x, dx = a + exp(s), exp(s) * ds
        elif a == -inf:
            x, dx = b - exp(s), exp(s) * ds
        else:
            near = (b - a) / (1 + exp(2 * abs(s)))  # the distance to the nearer end
            if near < mpf("1e-80"):
                continue
            x, dx = (b - near if s > 0 else a + near), 2 * near * (1 - near / (b - a)) * ds
        found.append((k % 2 == 0, x, dx))
    return found
