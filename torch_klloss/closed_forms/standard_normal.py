"""The pair of every VAE: a Normal given by its log-variance, against the standard Normal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.distributions.families import LogVarNormal, StandardNormal
from torch_klloss.numerics.blocks import Derivatives
from torch_klloss.numerics.custom_gradient import formula_of
from torch_klloss.numerics.dimensions import sum_last
from torch_klloss.numerics.exponentials import growth


def kernel(needs: Sequence[bool], loc: Tensor, logvar: Tensor) -> tuple[Tensor, Derivatives]:
    """Return ½ (μ² + exp(v) - 1 - v), from the log-variance v as it was given, and its derivatives.

    Both terms are ≥ 0.

    References:
        *Auto-encoding variational Bayes* (Kingma and Welling, 2014), appendix B.
    """
    grown, lead = growth(logvar)
    value = torch.addcmul(lead, loc, loc) * 0.5
    return value, (loc if needs[0] else None, grown * 0.5 if needs[1] else None)


kl = formula_of(kernel)


def _summed(q: LogVarNormal, p: StandardNormal, num_summed: int) -> Tensor:
    if q.batch_shape == p.batch_shape:
        return kl(q.loc, q.logvar, num_summed=num_summed)
    return sum_last(kl(q.loc, q.logvar).expand(torch.broadcast_shapes(q.batch_shape, p.batch_shape)), num_summed)


@register_kl(LogVarNormal, StandardNormal, summed=_summed, needs_float64=False)
def _log_var_normal_standard_normal(q: LogVarNormal, p: StandardNormal) -> Tensor:
    return _summed(q, p, 0)
