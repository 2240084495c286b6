"""Multinomial‖Multinomial."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Multinomial

from torch_klloss.closed_forms.registry import kl_divergence, register_kl


@register_kl(Multinomial, Multinomial, needs_float64=False)
def _multinomial_multinomial(q: Multinomial, p: Multinomial) -> Tensor:
    """The number of trials times the KL of one, a Categorical; inf, with a gradient of 0, where the numbers differ."""
    trial = kl_divergence(q._categorical, p._categorical)
    if q.total_count == p.total_count:
        return torch.where(trial.isinf() & (q.total_count == 0), 0.0, q.total_count * trial)
    return torch.where(trial.isnan(), trial, torch.inf)
