"""Beta‖Beta: the Dirichlet of two components."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Beta

from torch_klloss.closed_forms.dirichlet import kl
from torch_klloss.closed_forms.registry import register_kl


def _summed(q: Beta, p: Beta, num_summed: int) -> Tensor:
    by_q, by_p = (torch.stack((d.concentration1, d.concentration0), -1) for d in (q, p))
    return kl(by_q, by_p, num_summed=num_summed)


@register_kl(Beta, Beta, summed=_summed)
def _beta_beta(q: Beta, p: Beta) -> Tensor:
    """KL of the Dirichlets of (concentration1, concentration0)."""
    return _summed(q, p, 0)
