"""Pairs that structure makes simpler: transforms, and independence that only one of them declares."""

from __future__ import annotations

from torch import Tensor
from torch.distributions import Distribution, Independent, InverseGamma, LogNormal, TransformedDistribution

from torch_klloss.closed_forms.registry import has_closed_form, kl_divergence, register_kl, structural
from torch_klloss.distributions.simplify import simplify


@register_kl(InverseGamma, InverseGamma)
def _inverse_gamma_inverse_gamma(q: InverseGamma, p: InverseGamma) -> Tensor:
    """The KL of the two Gammas, whose inverse both are."""
    return kl_divergence(q.base_dist, p.base_dist)


@register_kl(LogNormal, LogNormal, needs_float64=False)
def _log_normal_log_normal(q: LogNormal, p: LogNormal) -> Tensor:
    """The KL of the two Normals, whose exponential both are."""
    return kl_divergence(q.base_dist, p.base_dist)


register_kl(Independent, Distribution)(structural)
register_kl(Distribution, Independent)(structural)
register_kl(TransformedDistribution, Distribution)(structural)
register_kl(Distribution, TransformedDistribution)(structural)
register_kl(TransformedDistribution, TransformedDistribution)(structural)


def simplified(q: Distribution, p: Distribution) -> tuple[Distribution, Distribution, int] | None:
    """Return what `simplify` makes of the pair; None where it finds nothing, or nothing with a closed form."""
    simple_q, simple_p, peeled = simplify(q, p)
    if (simple_q is q and simple_p is p) or not has_closed_form(simple_q, simple_p):
        return None
    return simple_q, simple_p, peeled
