"""Beta‖Beta: the Dirichlet of two components."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Beta

from torch_klloss.closed_forms.dirichlet import dirichlet_kl
from torch_klloss.closed_forms.registry import register_kl


@register_kl(Beta, Beta)
def _beta_beta(q: Beta, p: Beta) -> Tensor:
    """KL of the Dirichlets of (concentration1, concentration0)."""
    by_q, by_p = (torch.stack((d.concentration1, d.concentration0), -1) for d in (q, p))
    return dirichlet_kl(by_q, by_p).squeeze(-1)
