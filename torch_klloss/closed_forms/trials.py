"""The KL of one trial, from probabilities or log-odds: what the Bernoulli, Binomial and Geometric families share.

With m the smaller of q's two probabilities, and t by how much p's log-odds of that outcome exceed q's, the log-ratios
p/q of the two outcomes are t - L and -L, with L = log(1 + m (exp(t) - 1)), and the KL is L - mt.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from torch_klloss.distributions.given import Given
from torch_klloss.numerics.elementary import (
    artanh_terms,
    at_most,
    gkl_and_log,
    has_digits_to_spare,
    is_differentiated,
    may_fall_to,
    product,
    quotient,
    replaced,
    sign_of,
    spare_gkl_and_log,
    widened,
    within,
)
from torch_klloss.numerics.exponentials import expm1
from torch_klloss.numerics.tracing import needs_plain_operations

# By dtype: the argument of an exponential, and what stands for infinite log-odds.
LARGEST = {torch.float32: 87.0, torch.float64: 700.0}
LARGEST_ODDS = {torch.float32: 1e38, torch.float64: 1e300}
BOUND = 645.0  # of infinite log-odds in a derivative by a probability
_TOP = 3.0  # of exp(t), beyond which L and mt are far apart
_NEAR_SQUARE = 1 / 9  # of s in `artanh_terms`, where exp(t) is a half or two
_FAR = 3.0  # of t, beyond which the logarithms of both sums do not cancel
_VERY_NEAR_SQUARE = 1e-14  # of t in float64: L - mt has eight digits at 1e-7, and its first term seven
_NEAR = 2.0**-25  # of t: two log-odds near 0 may be nearer than that, where u has lost digits of their difference


class Trial(NamedTuple):
    """The KL of one trial, its derivatives by the parameters as given, and L and t, which tell the log-ratios.

    Attributes:
        value: the KL.
        by_q: its derivative by q's parameter, if it was asked for.
        by_p: the same by p's.
        log_failures: log((1 - p)/(1 - q)), if it was asked for; 0 where log-odds make the KL infinite.
    """

    value: Tensor
    by_q: Tensor | None
    by_p: Tensor | None
    log_failures: Tensor | None = None


def quick_trial(given: Given, by_q: bool, by_p: bool, q: Tensor, p: Tensor) -> Trial | None:
    """Return the trial in float64 of what was given in float32: not finite at the ends of the parameters.

    It is None where log-odds are so near to one another that the difference of their exponentials has lost digits.
    """
    return _quick_by_probs(by_q, by_p, q, p) if all(given) else _quick_by_log_odds(given, by_q, by_p, q, p)


def careful_trial(given: Given, by_q: bool, by_p: bool, q: Tensor, p: Tensor, *, with_failures: bool = False) -> Trial:
    """Return the trial for any parameters, in their dtype.

    No probability is clamped: the KL is finite where q is 0 or 1, and inf, with a gradient of 0, where p is and q is
    not. The derivative by a q of 0 or 1 is kept finite.
    """
    if all(given):
        return _by_probs(by_q, by_p, q, p)
    return _by_log_odds(given, by_q, by_p, q, p, with_failures)


def _quick_by_probs(by_q: bool, by_p: bool, q: Tensor, p: Tensor) -> Trial:
    """Σ q (r - 1 - log r) of r = p/q over both outcomes: the rounding of r drops out."""
    fails = 1.0 - q
    r = p / q
    s = (1.0 - p) / fails
    log_r, log_s = torch.log(r), torch.log(s)
    value = torch.addcmul(q * ((r - 1.0) - log_r), fails, (s - 1.0) - log_s)
    slope_p = (p - q) / (p - p * p) if by_p else None
    return Trial(value, log_s - log_r if by_q else None, slope_p, log_s)


def _quick_by_log_odds(given: Given, by_q: bool, by_p: bool, q: Tensor, p: Tensor) -> Trial | None:
    """M (u - 1 - log u) - (K - L) of the rounded u = exp(t), with K = m (u - 1); beyond the top L alone goes on."""
    q_odds, p_odds = _quick_log_odds(q, given.q_is_probs), _quick_log_odds(p, given.p_is_probs)
    rare = sign_of(-q_odds)  # of the log-odds of the outcome that q finds rarer
    shift = p_odds - q_odds
    if may_fall_to(shift.abs(), _NEAR):
        return None
    t, rarity = rare * shift, torch.exp(-rare * q_odds)  # inf where m would lose digits
    m, u = (1.0 + rarity).reciprocal(), torch.exp(t)
    grown, near = u - 1.0, u.clamp_max(_TOP) - 1.0
    K = m * grown
    L = torch.log1p(K)
    value = torch.addcmul(L - m * near, m, near - torch.log(u))
    value = torch.add(value, rarity, alpha=0)
    slope_q = slope_p = None
    if by_q or by_p:
        variance = m - m * m
        slope_q = (-shift if given.q_is_probs else -variance * shift) if by_q else None
        slope_p = rare * variance * grown / (1.0 + K) if by_p else None
        slope_p = slope_p / (p - p * p) if slope_p is not None and given.p_is_probs else slope_p
    return Trial(value, slope_q, slope_p, (t - shift) / 2.0 - L)


def _quick_log_odds(param: Tensor, is_probs: bool) -> Tensor:
    return torch.log(param / (1.0 - param)) if is_probs else param


def log_odds(param: Tensor, is_probs: bool) -> Tensor:
    """Return log(p/(1 - p)), ±inf at the ends, where the derivative is 0."""
    if not is_probs:
        return param
    is_end = (param == 0) | (param == 1)
    inside = torch.where(is_end, 0.5, param)
    ends = torch.where(param == 1, torch.inf, -torch.inf)
    return torch.where(is_end, ends, torch.log(inside) - torch.log1p(-inside))


def _by_probs(by_q: bool, by_p: bool, q: Tensor, p: Tensor) -> Trial:
    gap = q - p
    if has_digits_to_spare(q):
        q, p = q.double(), p.double()
        successes, log_r = spare_gkl_and_log(q, p)
        failures, log_s = spare_gkl_and_log(1.0 - q, 1.0 - p)
    else:
        successes, log_r = gkl_and_log(q, p, gap)
        failures, log_s = gkl_and_log(1.0 - q, 1.0 - p, -gap)
    slope_q, slope_p = (log_s - log_r).clamp(-BOUND, BOUND) if by_q else None, None
    if by_q or by_p:
        variance = p * (1.0 - p)
        is_end = variance == 0 if may_fall_to(variance, 0) else None
        if is_end is not None and slope_q is not None:
            slope_q = replaced(slope_q, is_end & (gap != 0), 0.0)
        if by_p:
            slope_p = quotient(gap, variance if is_end is None else replaced(variance, is_end, 1.0), times=-1)
            slope_p = slope_p if is_end is None else torch.where(is_end, _at_end(gap, p), slope_p)
    return Trial(successes + failures, slope_q, slope_p, log_s)


def _at_end(gap: Tensor, p: Tensor) -> Tensor:
    """Return the derivative by a p of 0 or 1: that of a q which is the same, and 0 where the KL is infinite."""
    return torch.where(gap == 0, 1 - 2.0 * p, 0.0)


def _by_log_odds(given: Given, by_q: bool, by_p: bool, q_param: Tensor, p_param: Tensor, with_failures: bool) -> Trial:
    """Near equality m lag(v) - lag(mv) with v = exp(t) - 1 and `lag` of x - log(1 + x), elsewhere L - mt.

    In float64 of what was given in float32 the first is m (1 - m) t²/2, and near equality is very near.
    For infinite log-odds the largest numbers stand; what these fall short of p's makes the KL infinite.
    """
    is_spare = has_digits_to_spare(q_param)
    q_odds, p_odds = log_odds(widened(q_param), given.q_is_probs), log_odds(widened(p_param), given.p_is_probs)
    q, p = (x.clamp(-LARGEST_ODDS[x.dtype], LARGEST_ODDS[x.dtype]) for x in (q_odds, p_odds))
    excess, sign, shift = p_odds - p, sign_of(q), p - q
    low, t, other = (product(sign, x, times=-1) for x in (q, shift, p))  # of the outcome that q finds rarer
    m, growth, is_low = torch.sigmoid(low), expm1(at_most(t, _FAR) if is_differentiated() else t), t < _FAR
    mean = m * growth
    L = torch.where(is_low, torch.log1p(mean), _softplus(other) - _softplus(low))
    far = torch.addcmul(torch.addcmul(L, m, t, value=-1), excess, excess)
    variance = torch.addcmul(m, m, m, value=-1)
    if is_spare:
        square = t * t
        value = torch.where(square < _VERY_NEAR_SQUARE, product(variance, square, times=0.5), far)
    else:
        value = _near_or(far, m, growth, mean)
    slope_q = slope_p = log_failures = None
    is_infinite = excess != 0
    if with_failures:
        log_failures = replaced((t - shift) / 2.0 - L, is_infinite, 0.0)
    if by_q:
        slope_q = -within(shift, -BOUND, BOUND) if given.q_is_probs else product(variance, shift, times=-1)
        slope_q = replaced(slope_q, is_infinite, 0.0)
    if by_p:
        slope_p = torch.where(is_low, variance * growth / (1.0 + mean), torch.sigmoid(other) - m)
        slope_p = replaced(product(slope_p, sign, times=-1), is_infinite, 0.0)
        slope_p = _by_probability(slope_p, p) if given.p_is_probs else slope_p
    return Trial(value, slope_q, slope_p, log_failures)


def _near_or(far: Tensor, m: Tensor, growth: Tensor, mean: Tensor) -> Tensor:
    """Return m lag(v) - lag(mv), from v and mv, where that is small; elsewhere what is given."""
    if needs_plain_operations():
        (s, square, third), (mean_s, _, mean_third) = artanh_terms(growth), artanh_terms(mean)
    else:  # at once
        terms = artanh_terms(torch.stack(torch.broadcast_tensors(growth, mean)))
        (s, mean_s), (square, _), (third, mean_third) = (t.unbind(0) for t in terms)
    product = s * mean_s
    half = torch.addcmul(product, m, product + third, value=-1) + mean_third
    return torch.where(square < _NEAR_SQUARE, 2.0 * half, far)


def _softplus(x: Tensor) -> Tensor:
    return softplus(x, threshold=40.0)


def _by_probability(slope: Tensor, odds: Tensor) -> Tensor:
    """Return the derivative by a probability, given the one by its log-odds."""
    variance = torch.sigmoid(odds) * torch.sigmoid(-odds)
    return slope / (replaced(variance, variance == 0, 1.0) if may_fall_to(variance, 0) else variance)
