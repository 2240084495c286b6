"""Bernoulli‖Bernoulli, from probabilities or log-odds as they were given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.distributions import Bernoulli
from torch.nn.functional import logsigmoid

from torch_klloss.closed_forms.analytic import Partials, Value, analytic
from torch_klloss.closed_forms.elementary import common_dtype, gkl, gkl_of_log_ratio, has_float64, log_ratio
from torch_klloss.closed_forms.given import GIVEN, Given, both_as_given
from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.tracing import is_traced

TrialKL = Callable[[Tensor, Tensor, bool], Tensor]


LARGEST = 700.0  # of what the exponential is taken of
BOUND = 645.0  # stands for an infinite log-odds in a derivative; log_ratio has the same bound


@register_kl(Bernoulli, Bernoulli)
def _bernoulli_bernoulli(q: Bernoulli, p: Bernoulli) -> Tensor:
    """Both of q log(q/p) - q + p and the same of 1 - q and 1 - p, each ≥ 0.

    Neither is clamped: the KL is finite where q is 0 or 1, inf where p is and q is not. There the gradient is 0; the
    derivative by a q of 0 or 1 is kept finite.
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


def may_hold_anywhere(condition: Tensor) -> bool:
    """Tell whether the condition holds somewhere, or is out of sight: whether its case has to be computed."""
    return is_traced() or not condition.is_cpu or bool(condition.any())


def shift_between(q: Tensor, p: Tensor) -> Tensor:
    """Return p - q of log-odds, and 0 where both are the same infinity."""
    return torch.where((q == p) & q.isinf(), 0.0, p - q)


def _probs_kl(q_probs: Tensor, p_probs: Tensor, series: bool) -> Tensor:
    q, p = q_probs.double(), p_probs.double()
    return gkl(q, p, q - p, series=series) + gkl(1 - q, 1 - p, p - q, series=series)


def _probs_partials(needs: Sequence[bool], q: Tensor, p: Tensor) -> Sequence[Tensor | None]:
    by_q = by_p = None
    q, p = q.double(), p.double()
    gap = q - p
    missed = ((p == 0) & (q > 0)) | ((p == 1) & (q < 1))
    if needs[0]:
        by_q = log_ratio(q, p, gap) - log_ratio(1 - q, 1 - p, -gap)
        by_q = torch.where(missed, 0.0, by_q)
    if needs[1]:
        is_end = (p == 0) | (p == 1)
        by_p = -gap / torch.where(is_end, 1.0, p * (1 - p))
        by_p = torch.where(is_end, torch.where(missed, 0.0, 1 - 2 * p), by_p)
    return by_q, by_p


def _log_odds_kl(given: Given, q_param: Tensor, p_param: Tensor, series: bool) -> Tensor:
    """Return the KL of a pair of which one at least is given by its log-odds.

    With m the smaller of q's probabilities, and t by how much p's log-odds of that outcome exceed q's, the log-ratios
    p/q are -L and t - L with L = log(1 + m (exp(t) - 1)).
    """
    q, p = log_odds(q_param, given.q_is_probs), log_odds(p_param, given.p_is_probs)
    missed = p.isinf() & (q != p)
    p = torch.where(missed, q, p)
    rare = torch.where(q >= 0, -1.0, 1.0).to(q.dtype)  # the sign of the log-odds of the outcome that q finds rarer
    q_rare, p_rare, t = rare * q, rare * p, rare * shift_between(q, p)
    m = torch.sigmoid(q_rare)
    reach = 1.0 if series else LARGEST  # of t, beyond which its rounding would show in exp(t)
    L = torch.log1p(m * torch.expm1(t.clamp(max=reach)))
    if may_hold_anywhere(t > reach):
        L = torch.where(t > reach, logsigmoid(-q_rare) - logsigmoid(-p_rare), L)
    value = gkl_of_log_ratio(torch.sigmoid(-q_rare), torch.sigmoid(-p_rare), -L, series=series)
    value = value + gkl_of_log_ratio(m, torch.sigmoid(p_rare), t - L, series=series)
    return torch.where(missed, torch.inf, value)


def _log_odds_partials(
    given: Given, needs: Sequence[bool], q_param: Tensor, p_param: Tensor
) -> Sequence[Tensor | None]:
    by_q = by_p = None
    q, p = log_odds(q_param, given.q_is_probs), log_odds(p_param, given.p_is_probs)
    shift, missed = shift_between(q, p), p.isinf() & (q != p)
    if needs[0]:
        bounded = torch.where(shift.isinf(), BOUND * shift.sign(), shift)
        by_q = -bounded if given.q_is_probs else -torch.sigmoid(q) * torch.sigmoid(-q) * bounded
        by_q = torch.where(missed, 0.0, by_q)
    if needs[1]:
        rising = shift >= 0
        weight = torch.where(rising, torch.sigmoid(p) * torch.sigmoid(-q), -torch.sigmoid(q) * torch.sigmoid(-p))
        by_p = -weight * torch.expm1(-torch.where(rising, shift, -shift))  # p - q, as it was before both were rounded
        if given.p_is_probs:
            by_p = by_p / torch.where(p.isinf(), 1.0, torch.sigmoid(p) * torch.sigmoid(-p))
        by_p = torch.where(missed, 0.0, by_p)
    return by_q, by_p


def _of_trial(given: Given) -> tuple[TrialKL, Partials]:
    if given == Given(True, True):
        return _probs_kl, _probs_partials
    return partial(_log_odds_kl, given), partial(_log_odds_partials, given)


def _analytic(kl: TrialKL, partials: Partials) -> Value:
    return analytic(partials)(lambda q, p: kl(q, p, has_float64(q, p)))


TRIAL = {given: _of_trial(given) for given in GIVEN}
"""The KL of one trial in float64, told whether the digits of float64 are asked for or those of float32; and its
derivatives."""
_KL = {given: _analytic(*formula) for given, formula in TRIAL.items()}
