"""Bernoulli‖Bernoulli, from the probabilities or the log-odds, whichever were given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.distributions import Bernoulli
from torch.nn.functional import logsigmoid

from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.distributions.given import GIVEN, Given, both_as_given
from torch_klloss.numerics.custom_gradient import Partials, Value, custom_gradient
from torch_klloss.numerics.elementary import (
    common_dtype,
    gkl,
    gkl_of_log_ratio,
    has_float64,
    log_ratio,
    may_be_infinite,
    may_fall_to,
    sign_of,
)

TrialKL = Callable[[Tensor, Tensor, bool], Tensor]


LARGEST = 700.0  # argument of the exponential
_LARGEST_SHIFT = 600.0  # beyond it a probability that is multiplied by its exponential may have lost its digits
_NEAR = 2.0**-16  # of the shift, where the first two cumulants and the difference are both good to ten digits
HUGE = 1e100  # stands for an infinite log-odds in a value
BOUND = 645.0  # stands for an infinite log-odds in a derivative; log_ratio has the same bound


@register_kl(Bernoulli, Bernoulli)
def _bernoulli_bernoulli(q: Bernoulli, p: Bernoulli) -> Tensor:
    """Σ q log(q/p) - q + p over the two outcomes: both terms are ≥ 0.

    No probability is clamped: the KL is finite where q is 0 or 1, and inf, with a gradient of 0, where p is and q is
    not. The derivative by a q of 0 or 1 is kept finite.
    """
    q_param, p_param, given = both_as_given(q, p)
    return trial_kl(q_param, p_param, given).to(common_dtype(q_param, p_param))


def trial_kl(q_param: Tensor, p_param: Tensor, given: Given) -> Tensor:
    """Return the KL of one trial in float64, from probabilities of success or their log-odds."""
    return _KL[given](q_param, p_param)


def log_odds(param: Tensor, is_probs: bool) -> Tensor:
    """Return log(p/(1 - p)) in float64, ±inf at the ends, where the derivative is 0."""
    param = param.double()
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


def _probs_kl(q_probs: Tensor, p_probs: Tensor, series: bool) -> Tensor:
    q, p = q_probs.double(), p_probs.double()
    return gkl(q, p, q - p) + gkl(1 - q, 1 - p, p - q)


def _probs_partials(needs: Sequence[bool], q: Tensor, p: Tensor) -> Sequence[Tensor | None]:
    by_q = by_p = None
    q, p = q.double(), p.double()
    gap = q - p
    variance = p * (1 - p)
    has_ends = may_fall_to(variance, 0)
    is_end = variance == 0
    if needs[0]:
        by_q = log_ratio(q, p, gap) - log_ratio(1 - q, 1 - p, -gap)
        by_q = torch.where(is_end & (gap != 0), 0.0, by_q) if has_ends else by_q
    if needs[1]:
        by_p = -gap / (torch.where(is_end, 1.0, variance) if has_ends else variance)
        by_p = torch.where(is_end, torch.where(gap == 0, 1 - 2 * p, 0.0), by_p) if has_ends else by_p
    return by_q, by_p


def _log_odds_kl(given: Given, q_param: Tensor, p_param: Tensor, series: bool) -> Tensor:
    """Return the KL of a pair in which q or p is given by its log-odds.

    With m the smaller of q's probabilities, and t by how much p's log-odds of that outcome exceed q's, the log-ratios
    p/q are -L and t - L with L = log(1 + m (exp(t) - 1)).
    """
    q, p = log_odds(q_param, given.q_is_probs), log_odds(p_param, given.p_is_probs)
    p, shift, missed = shift_between(q, p, infinity=HUGE)
    rare = sign_of(-q)  # of the log-odds of the outcome that q finds rarer
    m, t = torch.sigmoid(rare * q), rare * shift
    reach = 1.0 if series else _LARGEST_SHIFT  # of t, beyond which its rounding would show in exp(t)
    L = torch.log1p(m * torch.expm1(t.clamp(max=reach)))
    if may_fall_to(-t, -reach):
        L = torch.where(t < reach, L, torch.log1p(-m) - logsigmoid(-rare * p))
    if series:
        value = gkl_of_log_ratio(1 - m, torch.sigmoid(-rare * p), -L)
        value = value + gkl_of_log_ratio(m, torch.sigmoid(rare * p), t - L)
    else:
        value = torch.addcmul(L, m, t, value=-1)
        if may_fall_to(t.abs(), _NEAR):
            value = torch.where(t.abs() < _NEAR, _trial_kl_near_zero(m, t), value)
    return value if missed is None else torch.where(missed, torch.inf, value)


def _trial_kl_near_zero(m: Tensor, t: Tensor) -> Tensor:
    """log(1 + m (exp(t) - 1)) - mt = m (1 - m) (t²/2 + (1 - 2m) t³/6 + …), of the cumulants of one trial."""
    rest = 1 - m
    return m * rest * t * t * (0.5 + (rest - m) * t / 6)


def _log_odds_partials(
    given: Given, needs: Sequence[bool], q_param: Tensor, p_param: Tensor
) -> Sequence[Tensor | None]:
    by_q = by_p = None
    q, p = log_odds(q_param, given.q_is_probs), log_odds(p_param, given.p_is_probs)
    p, shift, _ = shift_between(q, p, infinity=BOUND)
    if needs[0]:
        by_q = -shift if given.q_is_probs else -torch.sigmoid(q) * torch.sigmoid(-q) * shift
    if needs[1]:
        sign = sign_of(shift)  # p - q of the probabilities, as it was before both were rounded
        by_p = -sign * torch.sigmoid(sign * p) * torch.sigmoid(-sign * q) * torch.expm1(-sign * shift)
        if given.p_is_probs:
            variance = torch.sigmoid(p) * torch.sigmoid(-p)
            by_p = by_p / (torch.where(variance == 0, 1.0, variance) if may_fall_to(variance, 0) else variance)
    return by_q, by_p


def _of_trial(given: Given) -> tuple[TrialKL, Partials]:
    if given == Given(True, True):
        return _probs_kl, _probs_partials
    return partial(_log_odds_kl, given), partial(_log_odds_partials, given)


def _differentiable(kl: TrialKL, partials: Partials) -> Value:
    return custom_gradient(partials)(lambda q, p: kl(q, p, has_float64(q, p)))


TRIAL = {given: _of_trial(given) for given in GIVEN}
"""The KL of one trial in float64, of (q, p, whether all digits of float64 are needed), and its derivatives."""
_KL = {given: _differentiable(*formula) for given, formula in TRIAL.items()}
