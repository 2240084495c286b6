"""Geometric‖Geometric."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.distributions import Geometric
from torch.nn.functional import logsigmoid

from torch_klloss.closed_forms.bernoulli import BOUND, HUGE, LARGEST, TRIAL, log_odds, shift_between
from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.distributions.given import GIVEN, Given, both_as_given
from torch_klloss.numerics.custom_gradient import custom_gradient
from torch_klloss.numerics.elementary import (
    above_minus_one,
    common_dtype,
    has_float64,
    log_ratio,
    may_be_infinite,
    may_fall_to,
)

_RARE = -40.0  # log-odds


@register_kl(Geometric, Geometric)
def _geometric_geometric(q: Geometric, p: Geometric) -> Tensor:
    """The KL of one trial times the mean number of trials, which is 1 over q's probability of success.

    It is inf, with a gradient of 0, where p always succeeds and q does not.
    """
    q_param, p_param, given = both_as_given(q, p)
    return _KL[given](q_param, p_param)


def _kl(given: Given, q: Tensor, p: Tensor) -> Tensor:
    dtype, series = common_dtype(q, p), has_float64(q, p)
    q, p, may_overflow = _raised(given, q, p)
    value = TRIAL[given][0](q, p, series)
    trials, _ = _num_trials(given, q)
    if not (may_overflow or may_be_infinite(value)):
        return (value * trials).to(dtype)
    is_infinite = value.isinf() | ((q < -LARGEST) & (value > 0)) if may_overflow else value.isinf()
    return torch.where(is_infinite, torch.inf, torch.where(is_infinite, 0.0, value) * trials).to(dtype)


def _partials(given: Given, needs: Sequence[bool], q: Tensor, p: Tensor) -> Sequence[Tensor | None]:
    q, p, _ = _raised(given, q, p)
    trials, by_param = _num_trials(given, q)
    by_q = _log_failures(given, q, p) * by_param if needs[0] else None
    by_trial = TRIAL[given][1]((False, needs[1]), q, p)[1]
    return by_q, None if by_trial is None else by_trial * trials


def _raised(given: Given, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Return both parameters, raised where the exponential of two very rare successes would underflow.

    Only their ratio matters. The third result is whether q, by its log-odds, may be so rare.
    """
    may_overflow = not given.q_is_probs and may_fall_to(q, -LARGEST)
    if given.p_is_probs or not may_overflow:
        return q, p, may_overflow
    q, p = q.double(), p.double()
    likelier = torch.maximum(q, p)
    raised_by = torch.where((q < -LARGEST) & (likelier < _RARE), _RARE - likelier, 0.0)
    return q + raised_by, p + raised_by, True


def _num_trials(given: Given, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean number of trials, and minus its derivative by q's parameter."""
    if given.q_is_probs:
        trials = 1 / q.double()
        return trials, trials * trials
    failures = torch.exp((-q.double()).clamp(max=LARGEST))
    return 1 + failures, failures


def _log_failures(given: Given, q: Tensor, p: Tensor) -> Tensor:
    """Return log((1 - p)/(1 - q)), the other factor of the derivative by q; 0 where the KL is infinite."""
    if given.q_is_probs and given.p_is_probs:
        q, p = q.double(), p.double()
        fails, ratio = 1 - p, log_ratio(1 - p, 1 - q, q - p)
        return torch.where((p == 1) & (q < 1), 0.0, ratio) if may_fall_to(fails, 0) else ratio
    q, p = log_odds(q, given.q_is_probs), log_odds(p, given.p_is_probs)
    p, shift, _ = shift_between(q, p, infinity=HUGE)
    # The clamp acts where 1 - p is far below 1 - q, and what it changes is multiplied by nearly 0.
    growth = (torch.sigmoid(q) * torch.expm1(shift.clamp(max=LARGEST))).clamp_min(above_minus_one(shift))
    ratio = -torch.log1p(growth)
    if may_fall_to(-shift, -LARGEST):
        far = (logsigmoid(-p) - logsigmoid(-q)).clamp(-BOUND, BOUND)
        ratio = torch.where(shift > LARGEST, far, ratio)
    return ratio


_KL = {given: custom_gradient(partial(_partials, given))(partial(_kl, given)) for given in GIVEN}
