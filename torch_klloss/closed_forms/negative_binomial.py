"""NegativeBinomial‖NegativeBinomial with the same number of failures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import NegativeBinomial
from torch.nn.functional import logsigmoid

from torch_klloss.closed_forms import geometric
from torch_klloss.closed_forms.alike import where_alike
from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.closed_forms.trials import careful_trial, log_odds
from torch_klloss.distributions.given import Given, both_as_given
from torch_klloss.numerics.blocks import Derivatives
from torch_klloss.numerics.custom_gradient import formula_of
from torch_klloss.numerics.elementary import common_dtype, log_ratio, widened

_BY_PROBS, _BY_LOG_ODDS = Given(q_is_probs=True, p_is_probs=True), Given(q_is_probs=False, p_is_probs=False)


@register_kl(NegativeBinomial, NegativeBinomial, needs_float64=False)
def _negative_binomial_negative_binomial(q: NegativeBinomial, p: NegativeBinomial) -> Tensor:
    """The number of failures times the KL of a Geometric, the count of successes before one failure.

    It is inf, with a gradient of 0, where p never succeeds and q does. Both numbers of failures receive a gradient too.
    For unequal numbers there is no closed form, hence no second derivative by them; under `torch.compile` and
    `torch.func`, where values cannot be read, such an element is NaN.

    Raises:
        NotImplementedError: if the numbers of failures differ somewhere.
    """
    given_q, given_p, given = both_as_given(q, p)
    dtype = common_dtype(given_q, given_p, q.total_count, p.total_count)
    q_param, p_param, r_q, r_p = (widened(t.to(dtype)) for t in (given_q, given_p, q.total_count, p.total_count))
    if all(given):
        one, log_failures = _kl(q_param, p_param), _log_failures(q_param, p_param)
    else:
        odds_q, odds_p = log_odds(q_param, given.q_is_probs), log_odds(p_param, given.p_is_probs)
        one = geometric.KL[_BY_LOG_ODDS](-odds_q, -odds_p)  # of failures
        log_failures = logsigmoid(-odds_q) - logsigmoid(-odds_p)
    one = torch.where(r_q == 0, 0.0, one)
    value = r_q * one + (r_p - r_q) * torch.where(one.isinf(), 0.0, log_failures)
    return where_alike(r_q, r_p, value, "numbers of failures (total_count)").to(dtype)


def _kernel(needs: Sequence[bool], q: Tensor, p: Tensor) -> tuple[Tensor, Derivatives]:
    one, by_q = careful_trial(_BY_PROBS, False, needs[1], q, p), None
    if needs[0]:
        missed = (p == 0) & (q > 0)
        by_q = torch.where(missed, 0.0, log_ratio(q, p, q - p)) / (1 - q).square()
    return one.value / (1 - q), (by_q, None if one.by_p is None else one.by_p / (1 - q))


_kl = formula_of(_kernel)
"""The KL of one failure, from probabilities of success."""


def _log_failures(q: Tensor, p: Tensor) -> Tensor:
    """Return log((1 - q)/(1 - p))."""
    return log_ratio(1 - q, 1 - p, p - q)
