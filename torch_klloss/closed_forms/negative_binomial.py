"""NegativeBinomial‖NegativeBinomial with the same number of failures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Geometric, NegativeBinomial
from torch.nn.functional import logsigmoid

from torch_klloss.closed_forms.alike import where_alike
from torch_klloss.closed_forms.bernoulli import TRIAL, log_odds
from torch_klloss.closed_forms.registry import kl_divergence, register_kl
from torch_klloss.distributions.given import Given, both_as_given
from torch_klloss.numerics.custom_gradient import custom_gradient
from torch_klloss.numerics.elementary import common_dtype, has_float64, log_ratio

_BY_PROBS = Given(q_is_probs=True, p_is_probs=True)


@register_kl(NegativeBinomial, NegativeBinomial)
def _negative_binomial_negative_binomial(q: NegativeBinomial, p: NegativeBinomial) -> Tensor:
    """The number of failures times the KL of a Geometric, the count of successes before one failure.

    It is inf, with a gradient of 0, where p never succeeds and q does. Both numbers of failures receive a gradient too.
    For unequal numbers there is no closed form, hence no second derivative by them; under `torch.compile` and
    `torch.func`, where values cannot be read, such an element is NaN.

    Raises:
        NotImplementedError: if the numbers of failures differ somewhere.
    """
    q_param, p_param, given = both_as_given(q, p)
    r_q, r_p = q.total_count.double(), p.total_count.double()
    if given == _BY_PROBS:
        one, log_failures = _kl(q_param, p_param), _log_failures(q_param, p_param)
    else:
        odds_q, odds_p = log_odds(q_param, given.q_is_probs), log_odds(p_param, given.p_is_probs)
        failures = (Geometric(logits=-odds, validate_args=False) for odds in (odds_q, odds_p))
        one, log_failures = kl_divergence(*failures), logsigmoid(-odds_q) - logsigmoid(-odds_p)
    one = torch.where(r_q == 0, 0.0, one)
    value = r_q * one + (r_p - r_q) * torch.where(one.isinf(), 0.0, log_failures)
    value = where_alike(r_q, r_p, value, "numbers of failures (total_count)")
    return value.to(common_dtype(q_param, p_param, q.total_count, p.total_count))


def _partials(needs: Sequence[bool], q: Tensor, p: Tensor) -> Sequence[Tensor | None]:
    by_trial = TRIAL[_BY_PROBS][1]((False, needs[1]), q, p)[1]
    q, p = q.double(), p.double()
    missed = (p == 0) & (q > 0)
    by_q = torch.where(missed, 0.0, log_ratio(q, p, q - p)) / (1 - q).square() if needs[0] else None
    return by_q, None if by_trial is None else by_trial / (1 - q)


@custom_gradient(_partials)
def _kl(q: Tensor, p: Tensor) -> Tensor:
    """Return the KL of one failure in float64, from probabilities of success."""
    return TRIAL[_BY_PROBS][0](q, p, has_float64(q, p)) / (1 - q.double())


def _log_failures(q: Tensor, p: Tensor) -> Tensor:
    """Return log((1 - q)/(1 - p))."""
    q, p = q.double(), p.double()
    return log_ratio(1 - q, 1 - p, p - q)
