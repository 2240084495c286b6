"""Geometric‖Geometric."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Geometric
from torch.nn.functional import logsigmoid

from torch_klloss.closed_forms.analytic import Value, analytic
from torch_klloss.closed_forms.bernoulli import (
    BOUND,
    LARGEST,
    TRIAL,
    as_given,
    log_odds,
    may_hold_anywhere,
    shift_between,
)
from torch_klloss.closed_forms.elementary import common_dtype, has_float64, log_ratio
from torch_klloss.closed_forms.registry import register_kl

_RARE, _UNDERFLOWS = -40.0, -700.0  # log-odds


@register_kl(Geometric, Geometric)
def _geometric_geometric(q: Geometric, p: Geometric) -> Tensor:
    """The KL of one trial times the mean number of trials, which is 1 over q's probability of success.

    It is inf, with a gradient of 0, where p always succeeds and q does not.
    """
    (q_param, q_is_probs), (p_param, p_is_probs) = as_given(q), as_given(p)
    return _KL[q_is_probs, p_is_probs](q_param, p_param)


def _formula(q_is_probs: bool, p_is_probs: bool) -> Value:
    trial_kl, trial_partials = TRIAL[q_is_probs, p_is_probs]

    def raised(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Spare the exponential an underflow: of two very rare successes only the ratio matters."""
        if q_is_probs or p_is_probs or not may_hold_anywhere(q < _UNDERFLOWS):
            return q, p
        q, p = q.double(), p.double()
        likelier = torch.maximum(q, p)
        underflows = (q < _UNDERFLOWS) & (likelier < _RARE)
        raised_by = torch.where(underflows, _RARE - likelier, 0.0)
        return q + raised_by, p + raised_by

    def num_trials(q: Tensor) -> tuple[Tensor, Tensor]:
        """Return their mean, and minus its derivative by q's parameter."""
        if q_is_probs:
            trials = 1 / q.double()
            return trials, trials * trials
        failures = torch.exp((-q.double()).clamp(max=LARGEST))
        return 1 + failures, failures

    def log_failures(q: Tensor, p: Tensor) -> Tensor:
        """Return log((1 - p)/(1 - q)), the rest of the derivative by q; 0 where the KL is infinite."""
        if q_is_probs and p_is_probs:
            q, p = q.double(), p.double()
            ratio, missed = log_ratio(1 - p, 1 - q, q - p), (p == 1) & (q < 1)
        else:
            q, p = log_odds(q, q_is_probs), log_odds(p, p_is_probs)
            shift, missed = shift_between(q, p), p.isinf() & (q != p)
            # Where log(1 - p) is far below log(1 - q), and the clamp is felt, it is multiplied by nearly nothing.
            growth = (torch.sigmoid(q) * torch.expm1(shift.clamp(max=LARGEST))).clamp_min(-1 + 2.0**-53)
            ratio = -torch.log1p(growth)
            if may_hold_anywhere(shift > LARGEST):
                far = (logsigmoid(-p) - logsigmoid(-q)).clamp(-BOUND, BOUND)
                ratio = torch.where(shift > LARGEST, far, ratio)
        return torch.where(missed, 0.0, ratio)

    def partials(needs: Sequence[bool], q: Tensor, p: Tensor) -> Sequence[Tensor | None]:
        q, p = raised(q, p)
        trials, by_param = num_trials(q)
        by_q = log_failures(q, p) * by_param if needs[0] else None
        by_trial = trial_partials((False, needs[1]), q, p)[1]
        return by_q, None if by_trial is None else by_trial * trials

    @analytic(partials)
    def kl(q: Tensor, p: Tensor) -> Tensor:
        dtype, series = common_dtype(q, p), has_float64(q, p)
        q, p = raised(q, p)
        value = trial_kl(q, p, series)
        is_infinite = value.isinf() if q_is_probs else value.isinf() | ((q < -LARGEST) & (value > 0))
        return torch.where(is_infinite, torch.inf, torch.where(is_infinite, 0.0, value) * num_trials(q)[0]).to(dtype)

    return kl


_KL = {given: _formula(*given) for given in TRIAL}
