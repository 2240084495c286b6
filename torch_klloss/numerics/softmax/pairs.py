"""Divergences of softmax(a/T) and softmax(b/T), row by row, in the dtype of the logits and without a branch on data.

Every divergence here is a sum of two terms, each a KL to a mixture: of q to (1 - w) q + w p, and of p to (1 - v) p +
v q. A term is Σ q (exp ζ - 1 - ζ) with ζ the logarithm of the mixture over q, which is ≥ 0 class by class. The ratio
log p/q is taken from b - a before anything rounds, and in twice the digits where the logits have as many digits as the
arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_klloss.numerics.error_free import difference_error
from torch_klloss.numerics.exponentials import expm1

_FAR = 1e30  # log p/q of a class that only one of them has
_LARGEST_EXPONENT = 80.0  # of exp in float32
# Of x coth(x/2) = 2 + x² g, in x²: 2 B_2k/(2k)! with the Bernoulli numbers; for |x| ≤ 1.
_COTH = (
    1 / 6,
    -1 / 360,
    1 / 15120,
    -1 / 604800,
    1 / 23950080,
    -691 / 653837184000,
    1 / 37362124800,
    -3617 / 5335311421440000,
    43867 / 2554547108585472000,
    -174611 / 401428831349145600000,
)
_DIGITS = {torch.float32: (4, 4), torch.float64: (10, 16)}  # terms of two series
_SMALL = 0.1  # a KL; below it the classes where q and p are far apart cannot hold all the mass


class Terms(NamedTuple):
    """A divergence: by_q · KL(q‖(1 - q_mix) q + q_mix p) + by_p · KL(p‖(1 - p_mix) p + p_mix q)."""

    by_q: float = 1.0
    q_mix: float = 1.0
    by_p: float = 0.0
    p_mix: float = 1.0

    @property
    def is_mixed(self) -> bool:
        """Whether a term is a KL to a proper mixture."""
        return (self.by_q != 0 and self.q_mix != 1) or (self.by_p != 0 and self.p_mix != 1)

    @property
    def is_single(self) -> bool:
        """Whether there is no term of p."""
        return self.by_p == 0

    @property
    def is_jensens(self) -> bool:
        """Whether the derivatives are by_q log q/m and by_p log p/m: both mixtures are one, and the rest cancels."""
        is_one = math.isclose(self.q_mix + self.p_mix, 1)
        return is_one and math.isclose(self.by_q * self.q_mix, self.by_p * self.p_mix)


KL = Terms()


class Weights(NamedTuple):
    """The unnormalised weights of the classes, and log p/q of them up to a constant a row."""

    q: Tensor
    p: Tensor
    ratio: Tensor


class Rows(NamedTuple):
    """What the derivatives need of every row, `[rows, 1]` each.

    Attributes:
        q_top, p_top: the largest logit.
        q_total, p_total: the sum of the exponentials below it.
        centre: the constant that `Weights.ratio` exceeds log p/q by.
        is_small: whether the KL was small, 1 or 0.
        by_q, by_p: the two terms of the divergence, without their factors.
        q_gap, q_score, p_gap, p_score: means that the derivatives of a term of a mixture are taken from.
    """

    q_top: Tensor
    p_top: Tensor
    q_total: Tensor
    p_total: Tensor
    centre: Tensor
    is_small: Tensor
    by_q: Tensor
    by_p: Tensor
    q_gap: Tensor
    q_score: Tensor
    p_gap: Tensor
    p_score: Tensor

    def value(self, terms: Terms) -> Tensor:
        """Return the divergence, `[rows, 1]`."""
        value = self.by_q * terms.by_q if terms.by_q else self.by_p * terms.by_p
        return value + self.by_p * terms.by_p if terms.by_q and terms.by_p else value


class Arithmetic(NamedTuple):
    """How the logits of a row become weights.

    Attributes:
        temperature: both logits are divided by it.
        is_exact: whether the logits have as many digits as the dtype that is computed in, so that differences round.
    """

    temperature: float = 1.0
    is_exact: bool = True

    def weights(self, a: Tensor, b: Tensor, q_top: Tensor, p_top: Tensor) -> Weights:
        """Return the weights, the largest of which is 1 in every row."""
        return Weights(self._weight(a, q_top), self._weight(b, p_top), self._ratio(a, b, q_top, p_top))

    def _weight(self, a: Tensor, top: Tensor) -> Tensor:
        below = a - top
        if not self.is_exact:
            return torch.exp(below / self.temperature if self.temperature != 1 else below)
        below, lost = _divided(below, _finite(difference_error(a, top)), self.temperature)
        weight = torch.exp(below)
        return torch.addcmul(weight, weight, lost)

    def _ratio(self, a: Tensor, b: Tensor, q_top: Tensor, p_top: Tensor) -> Tensor:
        gap = torch.where((a == -torch.inf) & (b == -torch.inf), 0.0, b - a)
        ratio = gap - (p_top - q_top)
        if self.is_exact:
            ratio = ratio + (_finite(difference_error(b, a)) - _finite(difference_error(p_top, q_top)))
        ratio = ratio / self.temperature if self.temperature != 1 else ratio
        return ratio.clamp(-_FAR, _FAR)


def _finite(error: Tensor) -> Tensor:
    return error.nan_to_num(0.0, 0.0, 0.0)


def _divided(high: Tensor, low: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return (high + low) / T as a number and its rounding error."""
    digits = 24 if high.dtype == torch.float32 else 53
    if _rounded(temperature, 1) == temperature:  # a power of two
        return high / temperature, low / temperature
    nearest = _rounded(temperature, digits)
    quotient = high / nearest
    product, lost = _product(quotient, nearest, digits)
    rest = _finite((high - product) - lost + low - quotient * (temperature - nearest))
    return quotient, rest / nearest


def _product(x: Tensor, y: float, digits: int) -> tuple[Tensor, Tensor]:
    """Return x y and its rounding error (Dekker, 1971)."""
    scaled = (2.0 ** math.ceil(digits / 2) + 1) * x
    x_high = scaled - (scaled - x)
    x_low, y_high = x - x_high, _rounded(y, digits // 2)
    y_low, product = y - y_high, x * y
    return product, ((x_high * y_high - product) + x_high * y_low + x_low * y_high) + x_low * y_low


def _rounded(y: float, digits: int) -> float:
    mantissa, exponent = math.frexp(y)
    return math.ldexp(round(math.ldexp(mantissa, digits)), exponent - digits)


def sums_of_weights(w: Weights) -> tuple[Tensor, ...]:
    """Return the sums of q and p, and of the ratio under q, over the last dimension."""
    return tuple(t.sum(-1, keepdim=True) for t in (w.q, w.p, w.q * w.ratio))


def sums_of_terms(w: Weights, a: Tensor, b: Tensor, rows: Rows, terms: Terms) -> tuple[Tensor, ...]:
    """Return the sums over the last dimension that `rows_of_sums` makes the terms of."""
    q, p, z = w.q / rows.q_total, w.p / rows.p_total, w.ratio - rows.centre
    parts = [torch.zeros_like(rows.centre)] * 8
    if terms.by_q:
        parts[:4] = _sums_of_term(q, p, z, terms.q_mix, (b == -torch.inf) & (a > -torch.inf))
    if terms.by_p:
        parts[4:] = _sums_of_term(p, q, -z, terms.p_mix, (a == -torch.inf) & (b > -torch.inf))
    return tuple(parts)


def _sums_of_term(q: Tensor, p: Tensor, z: Tensor, mix: float, missed: Tensor) -> tuple[Tensor, ...]:
    """Return the sums of q (exp ζ - 1 - ζ), q (exp ζ - 1), p far from q and the missed classes; a mixture's means."""
    mixture, log_ratio, gap, score = _mixed(q, p, z, mix) if mix != 1 else (p, z, z, z)
    is_near = log_ratio.abs() < 1
    near = q * _e2(log_ratio.clamp(-1, 1))
    terms = torch.where(is_near, near, (mixture - q) - q * log_ratio)
    if mix == 1:
        parts = terms, torch.where(is_near, near + q * z, p - q), torch.where(is_near, 0.0, p), missed.to(q.dtype)
    else:
        parts = terms, torch.zeros_like(q), p * gap, q * score
    return tuple(t.sum(-1, keepdim=True) for t in parts)


def _mixed(q: Tensor, p: Tensor, z: Tensor, mix: float) -> tuple[Tensor, ...]:
    """Return the mixture m, log m/q, q/m - 1 and the derivative of q log q/m by q, up to a constant."""
    log_ratio = torch.log1p(mix * expm1(z.clamp(max=_LARGEST_EXPONENT)))
    gap = expm1(-log_ratio)
    return (1 - mix) * q + mix * p, log_ratio, gap, -log_ratio - (1 - mix) * gap


def rows_of_sums(sums: tuple[Tensor, ...], rows: Rows, terms: Terms) -> Rows:
    """Return the rows with their two terms; after a KL also with the centre that it leads to."""
    by_q, q_excess, q_gap, q_score, by_p, p_excess, p_gap, p_score = sums
    centre = rows.centre
    if terms.by_p and terms.p_mix == 1:
        by_p, error = _kl(by_p, p_excess, p_gap, rows.is_small)
        centre = rows.centre - error
        by_p = _infinite_where(p_score > 0, by_p)
    if terms.by_q and terms.q_mix == 1:
        by_q, error = _kl(by_q, q_excess, q_gap, rows.is_small)
        centre = rows.centre + error
        by_q = _infinite_where(q_score > 0, by_q)
    return rows._replace(
        centre=centre, by_q=by_q, by_p=by_p, q_gap=q_gap, q_score=q_score, p_gap=p_gap, p_score=p_score
    )


def _kl(terms: Tensor, excess: Tensor, far: Tensor, is_small: Tensor) -> tuple[Tensor, Tensor]:
    """Return the KL from S = Σ q (exp z - 1 - z) and X = Σ q (exp z - 1), and the constant c that z is off by.

    With p itself in place of q exp z in the far classes, whose mass is P, exp(c)(1 - P) = 1 + X - P. The KL is
    S - X + c.
    """
    far = torch.where(is_small > 0, far, 0.0)
    near = excess - far
    return terms - _x_minus_log1p(near) + _x_minus_log1p(-far), torch.log1p(near) - torch.log1p(-far)


def _infinite_where(missed: Tensor, value: Tensor) -> Tensor:
    return torch.where(missed, torch.inf, value)


def rows_of(a: Tensor, b: Tensor, arithmetic: Arithmetic, terms: Terms) -> Rows:
    """Return the rows of logits a of q and b of p, `[rows, classes]`."""
    q_top, p_top = a.amax(-1, keepdim=True), b.amax(-1, keepdim=True)
    w = arithmetic.weights(a, b, q_top, p_top)
    rows = first_rows(q_top, p_top, sums_of_weights(w))
    for some in passes(terms):
        rows = rows_of_sums(sums_of_terms(w, a, b, rows, some), rows, some)
    return rows


def passes(terms: Terms) -> tuple[Terms, ...]:
    """Return what is computed one after the other: a mixture needs the centre that the KL leads to."""
    return (KL, terms) if terms.is_mixed else (terms,)


def first_rows(q_top: Tensor, p_top: Tensor, sums: tuple[Tensor, ...]) -> Rows:
    """Return the rows before their terms are known.

    The centre is the log-normaliser, which rounds to its own size, or where the KL is small the mean under q, which
    rounds to the size of the deviations.
    """
    q_total, p_total, first = sums
    log_norm, mean, zero = torch.log(p_total / q_total), first / q_total, torch.zeros_like(q_top)
    is_small = log_norm - mean < _SMALL
    return Rows(q_top, p_top, q_total, p_total, torch.where(is_small, mean, log_norm), is_small.to(mean), *(zero,) * 6)


def derivatives(
    a: Tensor, b: Tensor, rows: Rows, grad: Tensor, arithmetic: Arithmetic, terms: Terms
) -> tuple[Tensor, Tensor]:
    """Return grad times the derivatives of the divergence by a and by b; 0 where it is infinite."""
    w = arithmetic.weights(a, b, rows.q_top, rows.p_top)
    q, p, z = w.q / rows.q_total, w.p / rows.p_total, w.ratio - rows.centre
    by_a, by_b = torch.zeros_like(q), torch.zeros_like(q)
    if terms.by_q:
        first, second = _derivatives(q, p, z, terms.q_mix, rows.by_q, rows.q_gap, rows.q_score)
        by_a, by_b = by_a + terms.by_q * first, by_b + terms.by_q * second
    if terms.by_p:
        second, first = _derivatives(p, q, -z, terms.p_mix, rows.by_p, rows.p_gap, rows.p_score)
        by_a, by_b = by_a + terms.by_p * first, by_b + terms.by_p * second
    infinite = rows.value(terms) == torch.inf
    scale = torch.where(infinite, 0.0, grad / arithmetic.temperature)
    return tuple(torch.where(infinite, 0.0, scale * t) for t in (by_a, by_b))  # type: ignore[return-value]


def _derivatives(
    q: Tensor, p: Tensor, z: Tensor, mix: float, value: Tensor, mean_gap: Tensor, mean_score: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the derivatives of one term by the logits of q and of p."""
    if mix == 1:
        value = torch.where(value == torch.inf, 0.0, value)
        return -q * (z + value), torch.where(z < 1, q * expm1(z.clamp(max=1)), p - q)
    _, _, gap, score = _mixed(q, p, z, mix)
    return q * (score - mean_score), mix * p * (mean_gap - gap)


def _e2(x: Tensor) -> Tensor:
    """Return exp(x) - 1 - x ≥ 0 of |x| ≤ 1: x² (1 - x g)/(2 - x + x² g)."""
    square = x * x
    g = _horner(square, _COTH[: _DIGITS[x.dtype][0]])
    return square * (1 - x * g) / (2 - x + square * g)


def _x_minus_log1p(x: Tensor) -> Tensor:
    """Return x - log(1 + x) ≥ 0: with s = x/(2 + x), x s - 2 s³ (1/3 + s²/5 + s⁴/7 + …)."""
    s = x / (2 + x)
    square = s * s
    near = s * (x - 2 * square * _horner(square, [1 / k for k in range(3, 3 + 2 * _DIGITS[x.dtype][1], 2)]))
    return torch.where(s.abs() < 0.2, near, x - torch.log1p(x))


def _horner(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = value * x + c
    return value
