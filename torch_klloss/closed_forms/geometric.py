"""Geometric‖Geometric."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Geometric

from torch_klloss.closed_forms.bernoulli import as_given, trial_kl
from torch_klloss.closed_forms.elementary import common_dtype
from torch_klloss.closed_forms.registry import register_kl

_RARE, _UNDERFLOWS, _LARGEST = -40.0, -700.0, 709.0  # log-odds


@register_kl(Geometric, Geometric)
def _geometric_geometric(q: Geometric, p: Geometric) -> Tensor:
    """The KL of one trial times the mean number of trials, which is 1 over q's probability of success."""
    (q_param, q_is_probs), (p_param, p_is_probs) = as_given(q), as_given(p)
    dtype = common_dtype(q_param, p_param)
    if not (q_is_probs or p_is_probs):
        # Of two very rare successes only the ratio matters.
        q_param, p_param = q_param.double(), p_param.double()
        likelier = torch.maximum(q_param, p_param)
        underflows = (torch.minimum(q_param, p_param) < _UNDERFLOWS) & (likelier < _RARE)
        raised = torch.where(underflows, _RARE - likelier, 0.0)
        q_param, p_param = q_param + raised, p_param + raised
    value = trial_kl(q_param, q_is_probs, p_param, p_is_probs)
    q_param = q_param.double()
    is_infinite = value.isinf() if q_is_probs else value.isinf() | ((q_param < -_LARGEST) & (value > 0))
    trials = 1 / q_param if q_is_probs else 1 + torch.exp((-q_param).clamp(max=_LARGEST))
    return torch.where(is_infinite, torch.inf, torch.where(is_infinite, 0.0, value) * trials).to(dtype)
