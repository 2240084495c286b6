"""Pairs that structure makes simpler: transforms, and independence that only one of them declares."""

from __future__ import annotations

from torch import Tensor
from torch.distributions import Distribution, Independent, InverseGamma, LogNormal, TransformedDistribution

from torch_klloss.closed_forms.registry import has_closed_form, kl_divergence, register_kl
from torch_klloss.distributions.simplify import simplify


@register_kl(InverseGamma, InverseGamma)
@register_kl(LogNormal, LogNormal)
def _of_the_bases(q: LogNormal | InverseGamma, p: LogNormal | InverseGamma) -> Tensor:
    """That of the two Normals, of which both are the exponential; of the two Gammas, of which both are the inverse."""
    return kl_divergence(q.base_dist, p.base_dist)


def structural_supports(q: Distribution, p: Distribution) -> bool:
    """Return whether the pair simplifies to one with a closed form."""
    simple_q, simple_p, _ = simplify(q, p)
    return not (simple_q is q and simple_p is p) and has_closed_form(simple_q, simple_p)


@register_kl(Independent, Distribution, supports=structural_supports)
@register_kl(Distribution, Independent, supports=structural_supports)
@register_kl(TransformedDistribution, Distribution, supports=structural_supports)
@register_kl(Distribution, TransformedDistribution, supports=structural_supports)
@register_kl(TransformedDistribution, TransformedDistribution, supports=structural_supports)
def structural(q: Distribution, p: Distribution) -> Tensor:
    """That of the pair which `simplify` finds behind them.

    A transform that is not injective, such as the absolute value, maps different distributions to the same one: it is
    not taken off.

    Raises:
        NotImplementedError: if nothing can be simplified, or there is no closed form for what is left.
    """
    simple_q, simple_p, peeled = simplify(q, p)
    if simple_q is q and simple_p is p:
        raise NotImplementedError(
            "a transform is taken off where both end with it, or the other one is a family that it maps to a family; "
            "it must be injective and, where it learns, the same object"
        )
    value = kl_divergence(simple_q, simple_p)
    return value.sum(tuple(range(-peeled, 0))) if peeled else value
