"""Binomial‖Binomial of equal numbers of trials, and of unequal ones where the KL is infinite."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Binomial

from torch_klloss.closed_forms.bernoulli import trial_kl
from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.distributions.given import both_as_given
from torch_klloss.numerics.elementary import common_dtype
from torch_klloss.numerics.tracing import is_traced


@register_kl(Binomial, Binomial)
def _binomial_binomial(q: Binomial, p: Binomial) -> Tensor:
    """The KL of one trial times their number; inf where q has more trials than p.

    The number does not matter for a q that never succeeds. Where q has fewer trials than p there is no closed form;
    under `torch.compile` and `torch.func`, where values cannot be read, such an element is NaN.

    Raises:
        NotImplementedError: if q has fewer trials than p somewhere.
    """
    q_param, p_param, given = both_as_given(q, p)
    succeeds = q_param > (0 if given.q_is_probs else -torch.inf)
    fewer = succeeds & (q.total_count < p.total_count)
    if not (is_traced() or fewer.is_meta) and bool(fewer.any()):
        raise NotImplementedError("q has fewer trials than p; a sum over q's support is exact: Enumeration()")
    value = p.total_count.double() * trial_kl(q_param, p_param, given)
    value = torch.where(p.total_count == 0, 0.0, value)
    value = torch.where(succeeds & (q.total_count > p.total_count), torch.inf, value)
    return torch.where(fewer, torch.nan, value).to(common_dtype(q_param, p_param))
