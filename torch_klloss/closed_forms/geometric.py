"""Geometric‖Geometric."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.distributions import Geometric
from torch.nn.functional import logsigmoid

from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.closed_forms.trials import BOUND, HUGE, LARGEST, careful_trial, log_odds, quick_trial, shift_between
from torch_klloss.distributions.given import GIVEN, Given, both_as_given
from torch_klloss.numerics.blocks import Derivatives
from torch_klloss.numerics.custom_gradient import formula_of, quick_or_careful
from torch_klloss.numerics.elementary import above_minus_one, log_ratio, may_be_infinite, may_fall_to, sign_of

_RARE = -40.0  # log-odds


def _summed(q: Geometric, p: Geometric, num_summed: int) -> Tensor:
    q_param, p_param, given = both_as_given(q, p)
    return KL[given](q_param, p_param, num_summed=num_summed)


@register_kl(Geometric, Geometric, summed=_summed, needs_float64=False)
def _geometric_geometric(q: Geometric, p: Geometric) -> Tensor:
    """The KL of one trial times the mean number of trials, which is 1 over q's probability of success.

    It is inf, with a gradient of 0, where p always succeeds and q does not.
    """
    return _summed(q, p, 0)


def _quick(given: Given, needs: Sequence[bool], q: Tensor, p: Tensor) -> tuple[Tensor, Derivatives] | None:
    one = quick_trial(given, False, needs[1], q, p)
    if one is None:
        return None
    failures = (1 - q) / q if given.q_is_probs else torch.exp(-q)
    trials, by_q = 1 + failures, None
    if needs[0]:
        by_q = _quick_log_failures(given, q, p) * (trials * trials if given.q_is_probs else failures)
    return one.value * trials, (by_q, None if one.by_p is None else one.by_p * trials)


def _quick_log_failures(given: Given, q: Tensor, p: Tensor) -> Tensor:
    """Return log((1 - p)/(1 - q)) from the odds, to the last digits however rare success is."""
    successes = (
        param / (1 - param) if is_probs else torch.exp(param.clamp_max(LARGEST[param.dtype]))
        for param, is_probs in zip((q, p), given, strict=True)
    )
    of_q, of_p = successes
    gap = of_q - of_p
    return sign_of(gap) * torch.log1p(gap.abs() / (torch.minimum(of_q, of_p) + 1))


def _careful(given: Given, needs: Sequence[bool], q: Tensor, p: Tensor) -> tuple[Tensor, Derivatives]:
    q, p, may_overflow = _raised(given, q, p)
    one = careful_trial(given, False, needs[1], q, p)
    trials, by_param = _num_trials(given, q)
    value = _times(one.value, trials, (q < -LARGEST[q.dtype]) if may_overflow else None)
    by_q = _log_failures(given, q, p) * by_param if needs[0] else None
    return value, (by_q, None if one.by_p is None else one.by_p * trials)


KL = {given: formula_of(quick_or_careful(partial(_quick, given), partial(_careful, given))) for given in GIVEN}
"""The KL of two Geometrics, from the parameters that they are given by."""


def _times(one: Tensor, trials: Tensor, is_rare: Tensor | None) -> Tensor:
    """Return the KL of so many trials, inf where that of one is, or where q is too rare for trials to be counted."""
    if is_rare is None and not may_be_infinite(one):
        return one * trials
    is_infinite = one.isinf() if is_rare is None else one.isinf() | (is_rare & (one > 0))
    return torch.where(is_infinite, torch.inf, torch.where(is_infinite, 0.0, one) * trials)


def _raised(given: Given, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Return both parameters, raised where the exponential of two very rare successes would underflow.

    Only their ratio matters. The third result is whether q, by its log-odds, may be so rare.
    """
    largest = LARGEST[q.dtype]
    may_overflow = not given.q_is_probs and may_fall_to(q, -largest)
    if given.p_is_probs or not may_overflow:
        return q, p, may_overflow
    likelier = torch.maximum(q, p)
    raised_by = torch.where((q < -largest) & (likelier < _RARE), _RARE - likelier, 0.0)
    return q + raised_by, p + raised_by, True


def _num_trials(given: Given, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean number of trials, and minus its derivative by q's parameter."""
    if given.q_is_probs:
        trials = 1 / q
        return trials, trials * trials
    failures = torch.exp((-q).clamp(max=LARGEST[q.dtype]))
    return 1 + failures, failures


def _log_failures(given: Given, q: Tensor, p: Tensor) -> Tensor:
    """Return log((1 - p)/(1 - q)), the other factor of the derivative by q; 0 where the KL is infinite."""
    if given.q_is_probs and given.p_is_probs:
        fails, ratio = 1 - p, log_ratio(1 - p, 1 - q, q - p)
        return torch.where((p == 1) & (q < 1), 0.0, ratio) if may_fall_to(fails, 0) else ratio
    q, p = log_odds(q, given.q_is_probs), log_odds(p, given.p_is_probs)
    largest, bound = LARGEST[q.dtype], BOUND[q.dtype]
    p, shift, _ = shift_between(q, p, infinity=HUGE[q.dtype])
    # The clamp acts where 1 - p is far below 1 - q, and what it changes is multiplied by nearly 0.
    growth = (torch.sigmoid(q) * torch.expm1(shift.clamp(max=largest))).clamp_min(above_minus_one(shift))
    ratio = -torch.log1p(growth)
    if may_fall_to(-shift, -largest):
        far = (logsigmoid(-p) - logsigmoid(-q)).clamp(-bound, bound)
        ratio = torch.where(shift > largest, far, ratio)
    return ratio
