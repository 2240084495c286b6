"""The KL of one trial, from probabilities or log-odds: what the Bernoulli, Binomial and Geometric families share.

With m the smaller of q's two probabilities, and t by how much p's log-odds of that outcome exceed q's, the log-ratios
p/q of the two outcomes are t - L and -L, with L = log(1 + m (exp(t) - 1)), and the KL is L - mt.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from torch_klloss.distributions.given import Given
from torch_klloss.numerics.elementary import gkl_and_log, gkl_of_log_ratio, may_be_infinite, may_fall_to, sign_of

# By dtype: the argument of an exponential, and what stands for an infinite log-odds in a value; then in a derivative.
LARGEST = {torch.float32: 87.0, torch.float64: 700.0}
HUGE = {torch.float32: 1e30, torch.float64: 1e100}
BOUND = 645.0
_TOP = 3.0  # of exp(t), beyond which L and mt are far apart
_NEAR = 2.0**-25  # of t: two log-odds near 0 may be nearer than that, where u has lost digits of their difference


class Trial(NamedTuple):
    """The KL of one trial, its derivatives by the parameters as given, and L and t, which tell the log-ratios.

    Attributes:
        value: the KL.
        by_q: its derivative by q's parameter, if it was asked for.
        by_p: the same by p's.
        log_failures: log((1 - p)/(1 - q)); to the last digits only beside log(p/q), which it may be added to.
    """

    value: Tensor
    by_q: Tensor | None
    by_p: Tensor | None
    log_failures: Tensor


def quick_trial(given: Given, by_q: bool, by_p: bool, q: Tensor, p: Tensor) -> Trial | None:
    """Return the trial in float64 of what was given in float32: not finite at the ends of the parameters.

    It is None where log-odds are so near to one another that the difference of their exponentials has lost digits.
    """
    return _quick_by_probs(by_q, by_p, q, p) if all(given) else _quick_by_log_odds(given, by_q, by_p, q, p)


def careful_trial(given: Given, by_q: bool, by_p: bool, q: Tensor, p: Tensor) -> Trial:
    """Return the trial for any parameters, in their dtype.

    No probability is clamped: the KL is finite where q is 0 or 1, and inf, with a gradient of 0, where p is and q is
    not. The derivative by a q of 0 or 1 is kept finite.
    """
    return _by_probs(by_q, by_p, q, p) if all(given) else _by_log_odds(given, by_q, by_p, q, p)


def _quick_by_probs(by_q: bool, by_p: bool, q: Tensor, p: Tensor) -> Trial:
    """Σ q (r - 1 - log r) of r = p/q over both outcomes: the rounding of r drops out."""
    fails = 1 - q
    r = p / q
    s = (1 - p) / fails
    log_r, log_s = torch.log(r), torch.log(s)
    value = torch.addcmul(q * ((r - 1) - log_r), fails, (s - 1) - log_s)
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
    m, u = (1 + rarity).reciprocal(), torch.exp(t)
    grown, near = u - 1, u.clamp_max(_TOP) - 1
    K = m * grown
    L = torch.log1p(K)
    value = torch.addcmul(L - m * near, m, near - torch.log(u))
    value = torch.add(value, rarity, alpha=0)
    slope_q = slope_p = None
    if by_q or by_p:
        variance = m - m * m
        slope_q = (-shift if given.q_is_probs else -variance * shift) if by_q else None
        slope_p = rare * variance * grown / (1 + K) if by_p else None
        slope_p = slope_p / (p - p * p) if slope_p is not None and given.p_is_probs else slope_p
    return Trial(value, slope_q, slope_p, (t - shift) / 2 - L)


def _quick_log_odds(param: Tensor, is_probs: bool) -> Tensor:
    return torch.log(param / (1 - param)) if is_probs else param


def log_odds(param: Tensor, is_probs: bool) -> Tensor:
    """Return log(p/(1 - p)), ±inf at the ends, where the derivative is 0."""
    if not is_probs:
        return param
    is_end = (param == 0) | (param == 1)
    inside = torch.where(is_end, 0.5, param)
    ends = torch.where(param == 1, torch.inf, -torch.inf)
    return torch.where(is_end, ends, torch.log(inside) - torch.log1p(-inside))


def shift_between(q: Tensor, p: Tensor, infinity: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return p, the shift p - q of the log-odds, and where p never has an outcome that q has; None if nowhere.

    There p is replaced by q. A shift from an infinite q to a finite p is the number `infinity` or its negative.
    """
    shift = p - q
    if not may_be_infinite(shift):
        return p, shift, None
    missed = p.isinf() & (q != p)
    p = torch.where(missed, q, p)
    shift = torch.where((q == p) & q.isinf(), 0.0, p - q)
    return p, shift.nan_to_num(nan=math.nan, posinf=infinity, neginf=-infinity), missed


def _by_probs(by_q: bool, by_p: bool, q: Tensor, p: Tensor) -> Trial:
    gap = q - p
    successes, log_r = gkl_and_log(q, p, gap)
    failures, log_s = gkl_and_log(1 - q, 1 - p, -gap)
    slope_q, slope_p = (log_s - log_r).clamp(-BOUND, BOUND) if by_q else None, None
    if by_q or by_p:
        variance = p * (1 - p)
        is_end = variance == 0 if may_fall_to(variance, 0) else None
        if is_end is not None and slope_q is not None:
            slope_q = torch.where(is_end & (gap != 0), 0.0, slope_q)
        if by_p:
            slope_p = -gap / (variance if is_end is None else torch.where(is_end, 1.0, variance))
            slope_p = slope_p if is_end is None else torch.where(is_end, _at_end(gap, p), slope_p)
    return Trial(successes + failures, slope_q, slope_p, log_s)


def _at_end(gap: Tensor, p: Tensor) -> Tensor:
    """Return the derivative by a p of 0 or 1: that of a q which is the same, and 0 where the KL is infinite."""
    return torch.where(gap == 0, 1 - 2 * p, 0.0)


def _by_log_odds(given: Given, by_q: bool, by_p: bool, q_param: Tensor, p_param: Tensor) -> Trial:
    q, p_given = log_odds(q_param, given.q_is_probs), log_odds(p_param, given.p_is_probs)
    p, shift, missed = shift_between(q, p_given, infinity=HUGE[q.dtype])
    rare = sign_of(-q)
    m, t = torch.sigmoid(rare * q), rare * shift
    L = torch.log1p(m * torch.expm1(t.clamp(max=1.0)))
    if may_fall_to(-t, -1.0):
        L = torch.where(t < 1.0, L, torch.log1p(-m) - logsigmoid(-rare * p))
    value = gkl_of_log_ratio(1 - m, torch.sigmoid(-rare * p), -L)
    value = value + gkl_of_log_ratio(m, torch.sigmoid(rare * p), t - L)
    value = value if missed is None else torch.where(missed, torch.inf, value)
    slopes = _slopes_by_log_odds(given, by_q, by_p, q, p_given)
    return Trial(value, *slopes, (t - shift) / 2 - L)


def _slopes_by_log_odds(
    given: Given, by_q: bool, by_p: bool, q: Tensor, p: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    slope_q = slope_p = None
    p, shift, _ = shift_between(q, p, infinity=BOUND)
    if by_q:
        slope_q = -shift if given.q_is_probs else -torch.sigmoid(q) * torch.sigmoid(-q) * shift
    if by_p:
        sign = sign_of(shift)  # p - q of the probabilities, as it was before both were rounded
        slope_p = -sign * torch.sigmoid(sign * p) * torch.sigmoid(-sign * q) * torch.expm1(-sign * shift)
        if given.p_is_probs:
            variance = torch.sigmoid(p) * torch.sigmoid(-p)
            slope_p = slope_p / (torch.where(variance == 0, 1.0, variance) if may_fall_to(variance, 0) else variance)
    return slope_q, slope_p
