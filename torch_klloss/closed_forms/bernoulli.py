"""Bernoulli‖Bernoulli, from the probabilities or the log-odds, whichever were given."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor
from torch.distributions import Bernoulli

from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.closed_forms.trials import careful_trial, quick_trial
from torch_klloss.distributions.given import GIVEN, Given, both_as_given
from torch_klloss.numerics.blocks import Derivatives
from torch_klloss.numerics.custom_gradient import formula_of
from torch_klloss.numerics.quick_kernels import quick_or_careful


def _quick(given: Given, needs: Sequence[bool], q: Tensor, p: Tensor) -> tuple[Tensor, Derivatives] | None:
    one = quick_trial(given, needs[0], needs[1], q, p)
    return None if one is None else (one.value, (one.by_q, one.by_p))


def _careful(given: Given, needs: Sequence[bool], q: Tensor, p: Tensor) -> tuple[Tensor, Derivatives]:
    one = careful_trial(given, needs[0], needs[1], q, p)
    return one.value, (one.by_q, one.by_p)


KL = {given: formula_of(quick_or_careful(partial(_quick, given), partial(_careful, given))) for given in GIVEN}
"""The KL of two Bernoullis, from the parameters that they are given by."""


def _summed(q: Bernoulli, p: Bernoulli, num_summed: int) -> Tensor:
    q_param, p_param, given = both_as_given(q, p)
    return KL[given](q_param, p_param, num_summed=num_summed)


@register_kl(Bernoulli, Bernoulli, summed=_summed, needs_float64=False)
def _bernoulli_bernoulli(q: Bernoulli, p: Bernoulli) -> Tensor:
    """Σ q log(q/p) - q + p over the two outcomes: both terms are ≥ 0.

    No probability is clamped: the KL is finite where q is 0 or 1, and inf, with a gradient of 0, where p is and q is
    not. The derivative by a q of 0 or 1 is kept finite.
    """
    return _summed(q, p, 0)
