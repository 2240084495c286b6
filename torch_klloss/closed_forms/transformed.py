"""TransformedDistribution‖TransformedDistribution: a map that both share, and that can be undone, changes nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    Distribution,
    IndependentTransform,
    LogNormal,
    PowerTransform,
    Transform,
    TransformedDistribution,
)
from torch.distributions.transforms import _InverseTransform

from torch_klloss.closed_forms.registry import kl_divergence, register_kl
from torch_klloss.supports import bounds_of
from torch_klloss.tracing import is_traced


@register_kl(LogNormal, LogNormal)
def _log_normal_log_normal(q: LogNormal, p: LogNormal) -> Tensor:
    """That of the two Normals, of which both are the exponential."""
    return kl_divergence(q.base_dist, p.base_dist)


@register_kl(TransformedDistribution, TransformedDistribution)
def _transformed_transformed(q: TransformedDistribution, p: TransformedDistribution) -> Tensor:
    """The KL of what is left once the outermost transforms, equal on both sides and injective, are peeled.

    A transform that is not injective, such as the absolute value, maps different distributions to the same one:
    it is not peeled. Nor is one whose equal parameters are two tensors of which one is learned, for its gradient
    would be lost.

    Raises:
        NotImplementedError: if no transform can be peeled, or there is no closed form for what is left.
    """
    inner_q, inner_p = _inner(q), _inner(p)
    if q.transforms and p.transforms:
        t, u = q.transforms[-1], p.transforms[-1]
        if not (_is_injective(t, inner_q) and _is_injective(u, inner_p) and _are_equal(t, u)):
            raise NotImplementedError(
                f"their last transforms, {type(t).__name__} and {type(u).__name__}, must be equal, bijective and, "
                "where they learn, the same object"
            )
    return kl_divergence(inner_q, inner_p)


def _inner(d: TransformedDistribution) -> Distribution:
    """Return d without its last transform."""
    base: Distribution = d.base_dist
    return TransformedDistribution(base, d.transforms[:-1], validate_args=False) if len(d.transforms) > 1 else base


def _is_injective(t: Transform, inner: Distribution) -> bool:
    """Tell whether t maps different points of `inner` to different points; a power does on the positive line only."""
    if isinstance(t, PowerTransform):
        bounds = bounds_of(inner)
        if bounds is None:
            return False
        if not (isinstance(bounds.lower, Tensor) and is_traced()):
            return bool(bounds.lower >= 0 if isinstance(bounds.lower, float) else (bounds.lower >= 0).all())
    return bool(t.bijective)


def _are_equal(t: Any, u: Any) -> bool:
    if t is u:
        return True
    if type(t) is not type(u):
        return False
    if isinstance(t, ComposeTransform):
        return len(t.parts) == len(u.parts) and all(map(_are_equal, t.parts, u.parts))
    if isinstance(t, _InverseTransform):
        return _are_equal(t.inv, u.inv)
    if isinstance(t, IndependentTransform):
        return t.reinterpreted_batch_ndims == u.reinterpreted_batch_ndims and _are_equal(
            t.base_transform, u.base_transform
        )
    if isinstance(t, AffineTransform):
        return bool(t.event_dim == u.event_dim) and _same(t.loc, u.loc) and _same(t.scale, u.scale)
    if isinstance(t, PowerTransform):
        return _same(t.exponent, u.exponent)
    return bool(t == u)


def _same(a: Tensor | float, b: Tensor | float) -> bool:
    """Tell whether two parameters are equal for good: values that tracing cannot see, or that learn, are not."""
    if a is b:
        return True
    if not (isinstance(a, Tensor) or isinstance(b, Tensor)):
        return a == b
    learned = any(isinstance(x, Tensor) and x.requires_grad for x in (a, b))
    return not learned and not is_traced() and bool((a == b).all())  # type: ignore[union-attr]
