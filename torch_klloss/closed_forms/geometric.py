"""Geometric‖Geometric."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.distributions import Geometric

from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.closed_forms.trials import LARGEST, LARGEST_ODDS, careful_trial, quick_trial
from torch_klloss.distributions.given import GIVEN, Given, both_as_given
from torch_klloss.numerics.blocks import Derivatives
from torch_klloss.numerics.custom_gradient import formula_of
from torch_klloss.numerics.elementary import at_least, log_ratio, may_fall_to, sign_of
from torch_klloss.numerics.quick_kernels import quick_or_careful

_FAR = 40.0  # of log-odds: below it the exponential is the odds and the probability


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
    failures = (1.0 - q) / q if given.q_is_probs else torch.exp(-q)
    trials, by_q = 1.0 + failures, None
    if needs[0]:
        by_q = _quick_log_failures(given, q, p) * (trials * trials if given.q_is_probs else failures)
    return one.value * trials, (by_q, None if one.by_p is None else one.by_p * trials)


def _quick_log_failures(given: Given, q: Tensor, p: Tensor) -> Tensor:
    """Return log((1 - p)/(1 - q)) from the odds, to the last digits however rare success is."""
    successes = (
        param / (1.0 - param) if is_probs else torch.exp(param.clamp_max(LARGEST[param.dtype]))
        for param, is_probs in zip((q, p), given, strict=True)
    )
    of_q, of_p = successes
    gap = of_q - of_p
    return sign_of(gap) * torch.log1p(gap.abs() / (torch.minimum(of_q, of_p) + 1.0))


def _careful(given: Given, needs: Sequence[bool], q: Tensor, p: Tensor) -> tuple[Tensor, Derivatives]:
    q, p = _raised(given, q, p)
    one = careful_trial(given, False, needs[1], q, p, with_failures=needs[0])
    log_failures = _log_failures(q, p) if all(given) and needs[0] else one.log_failures
    if given.q_is_probs:
        trials = 1.0 / q
        by_q = None if log_failures is None else log_failures * trials * trials
        return one.value * trials, (by_q, None if one.by_p is None else one.by_p * trials)
    root = torch.exp((q / -2).clamp(max=LARGEST[q.dtype]))  # of the mean number of failures, which may overflow
    by_q = None if log_failures is None else log_failures * root * root
    by_p = None if one.by_p is None else torch.addcmul(one.by_p, one.by_p * root, root)
    return torch.addcmul(one.value, one.value * root, root), (by_q, by_p)


KL = {given: formula_of(quick_or_careful(partial(_quick, given), partial(_careful, given))) for given in GIVEN}
"""The KL of two Geometrics, from the parameters that they are given by."""


def _raised(given: Given, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Return both parameters, raised where the exponential of two very rare successes would underflow.

    Only their ratio matters. They are raised by a whole number, which rounds neither.
    """
    rare = 27.0 - LARGEST[q.dtype]  # where the exponential still has all of its digits
    if any(given) or not may_fall_to(q, rare):
        return q, p
    raised_by = torch.trunc(at_least(-_FAR - torch.maximum(q, p), 0.0).clamp_max(LARGEST_ODDS[q.dtype]))
    return q + raised_by, p + raised_by


def _log_failures(q: Tensor, p: Tensor) -> Tensor:
    """Return log((1 - p)/(1 - q)), the other factor of the derivative by q; 0 where the KL is infinite."""
    fails, ratio = 1.0 - p, log_ratio(1.0 - p, 1.0 - q, q - p)
    return torch.where((p == 1) & (q < 1), 0.0, ratio) if may_fall_to(fails, 0) else ratio
