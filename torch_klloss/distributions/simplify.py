"""The simplest pair with the same KL, from the structure of a pair."""

from __future__ import annotations

from typing import TypeGuard

from torch.distributions import (
    Distribution,
    Independent,
    MultivariateNormal,
    Normal,
    Transform,
    TransformedDistribution,
)

from torch_klloss.distributions.pushforward import image, is_a, split
from torch_klloss.distributions.transforms import are_equal, elementwise, is_injective, parts_of


def peel(q: Distribution, p: Distribution) -> tuple[Distribution, Distribution, int]:
    """Return q and p without the `Independent` that both have, and the number of dimensions stripped.

    `Independent` is recognised by `isinstance`; nests of any depth are flattened first, so that
    Independent(Independent(d, 1), 1) and Independent(d, 2) meet. The KL of the stripped pair, summed over
    its last dimensions, is the KL of the pair.
    """
    if not (isinstance(q, Independent) and isinstance(p, Independent)):
        return q, p, 0
    q, q_dims = flatten_independent(q)
    p, p_dims = flatten_independent(p)
    shared = min(q_dims, p_dims)
    return wrap(q, q_dims - shared), wrap(p, p_dims - shared), shared


def simplify(q: Distribution, p: Distribution) -> tuple[Distribution, Distribution, int]:
    """Return a pair of the same KL that is as simple as structure alone can make it.

    Until nothing changes:

    - `Independent`, also one inside of an elementwise transform, is peeled where both have it;
    - an injective transform that both end with is taken off;
    - the image of a family that is a family again becomes that: an affine map of a Normal is a Normal, the exponential
      of one a LogNormal, a positive multiple of a Gamma a Gamma;
    - a transform that only one has is undone on the other, if that gives a family: KL(T#a‖p) = KL(a‖T⁻¹#p).

    Each step is exact, but for the rounding of the parameters of an image. Transforms that are not injective stay.
    A transform with a learned parameter is taken off only if both have the same object, or its gradient would be lost;
    an image carries the gradient to both. Under tracing, where values are not known, fewer steps are taken.

    Args:
        q: the distribution that the expectation is under.
        p: the other one, of the same event shape.

    Returns:
        The pair, with an event shape of () where possible, and how many dimensions were peeled: the KL of the pair,
        summed over its last dimensions, is KL(q‖p). If nothing could be done, q and p themselves.

    Examples:
        >>> import torch
        >>> from torch.distributions import AffineTransform, Gamma, Normal, TransformedDistribution
        >>> from torch_klloss.distributions.simplify import simplify
        >>> q = TransformedDistribution(Gamma(2.0, 1.0), [AffineTransform(3.0, 1.0)])
        >>> simplify(q, Normal(5.0, 1.0))
        (Gamma(concentration: 2.0, rate: 1.0), Normal(loc: 2.0, scale: 1.0), 0)
    """
    peeled = 0
    while True:
        q, p, dims = peel(_lift(q), _lift(p))
        peeled += dims
        simpler = _share(q, p) or _recognise(q, p) or _move(q, p)
        if simpler is None:
            return q, p, peeled
        q, p = simpler


_Pair = tuple[Distribution, Distribution]


def _share(q: Distribution, p: Distribution) -> _Pair | None:
    """Return the pair without the last transform, if both have it; without all or none, for families with a class."""
    if not (isinstance(q, TransformedDistribution) and isinstance(p, TransformedDistribution)):
        return None
    of_q, of_p = (parts_of(d.transforms) if _is_open(d) else [] for d in (q, p))
    num_shared = min(len(of_q), len(of_p), 1)
    if not (_is_plain(q) or _is_plain(p)):
        num_shared = len(of_q) if len(of_q) == len(of_p) else 0
    pair = None
    for _ in range(num_shared):
        t, u = of_q.pop(), of_p.pop()
        pair = _transformed(q.base_dist, of_q), _transformed(p.base_dist, of_p)
        if not (are_equal(t, u) and is_injective(t, pair[0]) and is_injective(u, pair[1])):
            return None
    return pair


def _recognise(q: Distribution, p: Distribution) -> _Pair | None:
    """Return the pair with images of families replaced by the families that they are."""
    new_q, new_p = _as_family(q), _as_family(p)
    return None if new_q is q and new_p is p else (new_q, new_p)


def _as_family(d: Distribution) -> Distribution:
    if isinstance(d, Independent):
        base, dims = flatten_independent(d)
        family = _as_family(base)
        return d if family is base else wrap(family, dims)
    t = _last_elementwise(d)
    if t is None or not _is_plain(d):
        return d
    inner = _inner(d)
    family = _as_family(inner)
    return image(t, family) or split(t, family) or (d if family is inner else _transformed(family, [t]))


def _move(q: Distribution, p: Distribution) -> _Pair | None:
    """Return the pair with the last transform of one undone on the other, if that gives a family."""
    of_q, of_p = _undone(q, p), _undone(p, q)
    if of_q is not None:
        return of_q
    return None if of_p is None else (of_p[1], of_p[0])


def _undone(d: Distribution, other: Distribution) -> _Pair | None:
    """Return d without its last transform, and the family that `other` becomes under its inverse."""
    t = _last_elementwise(d)
    if t is None or not _is_plain(d):
        return None
    inner = _inner(d)
    moved = image(t.inv, other) if is_injective(t, inner) else None
    return None if moved is None else (inner, moved)


def _last_elementwise(d: Distribution) -> Transform | None:
    return elementwise(parts_of(d.transforms)[-1]) if _is_plain(d) else None


def _is_plain(d: Distribution) -> TypeGuard[TransformedDistribution]:
    """Return whether d is a TransformedDistribution, and not a subclass."""
    return type(d) is TransformedDistribution


def _is_open(d: TransformedDistribution) -> bool:
    """Return whether d has the density of its base and transforms: no user's class overrides it."""
    own = type(d).log_prob is not TransformedDistribution.log_prob
    return not own or type(d).__module__.startswith("torch.distributions.")


def _lift(d: Distribution) -> Distribution:
    """Return d with `Independent` outermost, and transforms of transforms in one list."""
    if isinstance(d, Independent):
        base, dims = flatten_independent(d)
        lifted = _lift(base)
        return d if lifted is d.base_dist and dims else _lift(wrap(lifted, dims))
    if is_a(d, MultivariateNormal) and d.event_shape == (1,):
        return Independent(Normal(d.loc, d.scale_tril.squeeze(-1), validate_args=False), 1, validate_args=False)
    if not _is_plain(d):
        return d
    base, parts = d.base_dist, parts_of(d.transforms)
    if _is_plain(base):
        return _lift(_transformed(base.base_dist, parts_of(base.transforms) + parts))
    base, dims = flatten_independent(base)
    single = [elementwise(t) for t in parts] if dims else []
    if not dims or None in single:
        return d if parts else base
    return _lift(Independent(_transformed(base, [t for t in single if t is not None]), dims, validate_args=False))


def _inner(d: TransformedDistribution) -> Distribution:
    """Return d without its last transform."""
    return _transformed(d.base_dist, parts_of(d.transforms)[:-1])


def _transformed(base: Distribution, transforms: list[Transform]) -> Distribution:
    return TransformedDistribution(base, transforms, validate_args=False) if transforms else base


def flatten_independent(d: Distribution) -> tuple[Distribution, int]:
    """Return d without any `Independent` around it, and how many dimensions of its batch these made part of the event.

    The distribution itself and 0 come back where it is no `Independent`.
    """
    dims = 0
    while isinstance(d, Independent):
        dims += d.reinterpreted_batch_ndims
        d = d.base_dist
    return d, dims


def diagonal_normal_of(d: Distribution) -> Normal | None:
    """Return the Normal that d is, under any `Independent`; None where d is something else."""
    base, _ = flatten_independent(d)
    return base if is_a(base, Normal) else None


def wrap(d: Distribution, dims: int) -> Distribution:
    """Return d with its last batch dimensions as a part of the event."""
    return Independent(d, dims, validate_args=False) if dims else d
