"""Transports: maps from uniform numbers to points of q, and their composition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, TransformedDistribution

from torch_klloss.distributions.checks import type_name
from torch_klloss.distributions.tensors import dtype_and_device_of
from torch_klloss.samplers.draws import Noise
from torch_klloss.samplers.points import Points, evenly_weighted

D = TypeVar("D", bound=Distribution)


@dataclass(frozen=True)
class Transport:
    """The map from uniform numbers to points of a family.

    Attributes:
        num_uniforms: d, the number of uniform numbers for one event of q.
        points: (q, u) -> x, from u strictly inside (0, 1), `[n, *batch, d]`, to points `[n, *batch, *event]` with a
            gradient to q. If u is uniform, x is distributed as q.
        differentiable: whether that gradient is right; it is not for discrete points.
    """

    num_uniforms: Callable[[Any], int]
    points: Callable[[Any, Tensor], Tensor]
    differentiable: bool = True


_TRANSPORTS: dict[type[Distribution], Transport] = {}


def register_transport(
    family: type[D], num_uniforms: Callable[[D], int] | None = None, *, differentiable: bool = True
) -> Callable[[Callable[[D, Tensor], Tensor]], Callable[[D, Tensor], Tensor]]:
    """Return a decorator that registers the map from uniform numbers to points of a family.

    A family of single numbers with an `icdf` needs no transport.

    Args:
        family: its class; subclasses that keep the distribution inherit.
        num_uniforms: the number of uniform numbers for one event. None: one, and the map is from u `[n, *batch]`.
        differentiable: as in `Transport`.

    Examples:
        >>> import torch
        >>> from torch_klloss.samplers import Sobol
        >>> from torch_klloss.samplers.transport import register_transport
        >>> class Triangular(torch.distributions.Distribution):
        ...     arg_constraints, has_rsample = {}, True
        >>> @register_transport(Triangular)
        ... def triangular(q, u):
        ...     return u.sqrt()
        >>> Sobol().draw(Triangular(torch.Size([5]), validate_args=False), 8, differentiable=True).x.shape
        torch.Size([8, 5])
    """

    def register(points: Callable[[D, Tensor], Tensor]) -> Callable[[D, Tensor], Tensor]:
        if num_uniforms is None:
            one = Transport(lambda _: 1, lambda q, u: points(q, u.squeeze(-1)), differentiable)
            _TRANSPORTS[family] = one
        else:
            _TRANSPORTS[family] = Transport(num_uniforms, points, differentiable)
        return points

    return register


def num_uniforms(q: Distribution) -> int:
    """Return the number of uniform numbers for one event of q.

    Raises:
        NotImplementedError: if q has no transport.
    """
    return _transport_of(q).num_uniforms(q)


def transport(q: Distribution, u: Tensor, *, differentiable: bool) -> Tensor:
    """Return points of q, `[n, *batch, *event]`, made from numbers in (0, 1), `[n, *batch, d]`.

    Args:
        q: the distribution.
        u: strictly between 0 and 1, d = `num_uniforms(q)` of them for every event.
        differentiable: whether the points carry a gradient to q's parameters.

    Raises:
        NotImplementedError: if q has no transport, or `differentiable` and the transport has no gradient.

    Examples:
        >>> import torch
        >>> from torch.distributions import Normal
        >>> from torch_klloss.samplers.transport import transport
        >>> transport(Normal(torch.ones(2), 1.0), torch.full((1, 2, 1), 0.5), differentiable=False)
        tensor([[1., 1.]])
    """
    if differentiable and not is_differentiable(q):
        raise NotImplementedError(
            f"{type_name(q)} is discrete in part, so that its points carry no gradient; use gradient='score_function' "
            "or 'none'."
        )
    if differentiable:
        return _transport_of(q).points(q, u)
    with torch.no_grad():
        return _transport_of(q).points(q, u).detach()  # no_grad alone lets forward-mode tangents pass


def is_differentiable(q: Distribution) -> bool:
    """Return whether the points that `transport` makes can carry a gradient to q."""
    base = getattr(q, "base_dist", None)
    return _transport_of(q).differentiable and (base is None or is_differentiable(base))


def _transport_of(q: Distribution) -> Transport:
    for cls in type(q).__mro__:
        if cls in _TRANSPORTS:
            if _keeps_the_law(type(q), cls):
                return _TRANSPORTS[cls]
            break
    if isinstance(q, Independent):
        return _INDEPENDENT
    if _has_quantiles(q):
        return _QUANTILES
    if isinstance(q, TransformedDistribution) and _keeps_the_law(type(q), TransformedDistribution):
        return _TRANSFORMED
    raise NotImplementedError(
        f"{type_name(q)} has neither an icdf nor a transport from uniform numbers: draw with IID(), or add one with "
        "torch_klloss.samplers.transport.register_transport."
    )


def _keeps_the_law(subclass: type, cls: type) -> bool:
    """Return whether a subclass has its parent's sampling and density."""
    return subclass is cls or all(
        getattr(subclass, method) is getattr(cls, method) for method in ("rsample", "sample", "log_prob")
    )


def _has_quantiles(q: Distribution) -> bool:
    """Return whether q is a distribution of single numbers whose class defines an icdf."""
    own = type(q).icdf not in (Distribution.icdf, TransformedDistribution.icdf)
    return own and not q.event_shape


_QUANTILES = Transport(lambda q: 1, lambda q, u: q.icdf(u.squeeze(-1)))


def _independent_num_uniforms(q: Independent) -> int:
    base = q.base_dist
    return num_uniforms(base) * base.batch_shape[len(q.batch_shape) :].numel()


def _independent_points(q: Independent, u: Tensor) -> Tensor:
    base = q.base_dist
    u = u.reshape(*u.shape[:-1], *base.batch_shape[len(q.batch_shape) :], num_uniforms(base))
    return _transport_of(base).points(base, u)


def _transformed_points(q: TransformedDistribution, u: Tensor) -> Tensor:
    x = _transport_of(q.base_dist).points(q.base_dist, u)
    for t in q.transforms:
        x = t(x)
    return x


_INDEPENDENT = Transport(_independent_num_uniforms, _independent_points)
_TRANSFORMED = Transport(lambda q: num_uniforms(q.base_dist), _transformed_points)


@dataclass(frozen=True)
class Cells:
    """The cells of the unit interval from which points of q are made, as integers.

    Attributes:
        bits: b; the midpoints of 2^b cells are represented exactly, and so are their distances to 1.
        dtype: the dtype of the integers.
        shape: `[*batch, d]`, d uniforms for one event.
        device: the device of q.
    """

    bits: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    device: torch.device

    def random(self, n: int) -> Tensor:
        """Return independent uniform integers below 2^b, `[n, *batch, d]`, from the global stream."""
        return torch.randint(2**self.bits, (n, *self.shape), dtype=self.dtype, device=self.device)


def cells_of(q: Distribution) -> Cells:
    """Return the cells for points of q.

    Raises:
        NotImplementedError: if q has no transport.
    """
    dtype, device = dtype_and_device_of(q)
    wide = dtype == torch.float64
    shape = (*q.batch_shape, num_uniforms(q))
    return Cells(52 if wide else 23, torch.int64 if wide else torch.int32, shape, device)


def midpoints(k: Tensor, bits: int) -> Tensor:
    """Return the midpoints of cells of the unit interval, (k + ½) / 2^b: strictly inside, and exact."""
    return (k.to(torch.float64 if bits > 23 else torch.float32) + 0.5) * 2.0**-bits


@dataclass(frozen=True)
class TransportedDraws:
    """Draws that are quantiles of integer noise.

    Attributes:
        q: the distribution.
        cells: the cells of its noise.
        noise: the integers of draws start … stop - 1, `[stop - start, *batch, d]`.
        num_samples: S.
        num_replicates: the number of independent randomisations.
        differentiable: whether the points carry a gradient to q.
    """

    q: Distribution
    cells: Cells
    noise: Noise
    num_samples: int
    num_replicates: int
    differentiable: bool

    def part(self, start: int, stop: int) -> Points:
        """Return the points of draws start … stop - 1."""
        u = midpoints(self.noise(start, stop), self.cells.bits)
        x = transport(self.q, u, differentiable=self.differentiable)
        return evenly_weighted(self.q, x, self.num_samples, self.num_replicates)
