"""The space in which a distribution is drawn: what its points are images of, and how they come about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Beta,
    Chi2,
    Dirichlet,
    Distribution,
    ExpTransform,
    FisherSnedecor,
    Gamma,
    Independent,
    InverseGamma,
    Kumaraswamy,
    LogNormal,
    Pareto,
    RelaxedBernoulli,
    RelaxedOneHotCategorical,
    SigmoidTransform,
    Transform,
    TransformedDistribution,
    Uniform,
    Weibull,
)

from torch_klloss.distributions.located import Located
from torch_klloss.distributions.maps import fixed, image
from torch_klloss.distributions.transforms import parts_of
from torch_klloss.numerics.devices import can_be_read
from torch_klloss.samplers.draws import Draws, PreparedSampler, prepare
from torch_klloss.samplers.log_space import LogDirichlet, LogGamma, LogitBeta
from torch_klloss.samplers.points import Points, Sampler

_Image = Callable[[Tensor], Located]

# Families that torch draws as images under their transforms.
_DRAWN_AS_IMAGES = {
    InverseGamma,
    LogNormal,
    Pareto,
    RelaxedBernoulli,
    RelaxedOneHotCategorical,
    TransformedDistribution,
    Weibull,
}


@dataclass(frozen=True)
class LocatedDraws:
    """Draws of points that know how far they are from the ends of the support.

    Attributes:
        draws: of the distribution that q's points are images of.
        image: turns its points into points of q.
        differentiable: whether the points carry a gradient.
    """

    draws: Draws
    image: _Image
    differentiable: bool

    def part(self, start: int, stop: int) -> tuple[Points, Located]:
        """Return draws start … stop - 1: the weights with the original points, and the points of q."""
        points = self.draws.part(start, stop)
        if self.image is not Located:
            points = replace(points, log_q=None)  # of what was drawn
        if self.differentiable:
            return points, self.image(points.x)
        with torch.no_grad():
            return points, fixed(self.image(points.x))


def prepare_located(sampler: Sampler, q: Distribution, num_samples: int, *, differentiable: bool) -> LocatedDraws:
    """Return draws from q that are computed in parts; a sampler of another kind is asked for points of q itself."""
    root, to_q = origin(q) if isinstance(sampler, PreparedSampler) else (q, Located)
    return LocatedDraws(prepare(sampler, root, num_samples, differentiable=differentiable), to_q, differentiable)


def origin(q: Distribution) -> tuple[Distribution, _Image]:
    """Return the distribution that q is drawn from, of q's batch shape, and the map from its points to q's.

    Examples:
        >>> import torch
        >>> from torch.distributions import LogNormal
        >>> from torch_klloss.samplers.origins import origin
        >>> root, to_q = origin(LogNormal(0.0, 1.0))
        >>> root, to_q(torch.tensor(-200.0)).log_from(0.0)
        (Normal(loc: 0.0, scale: 1.0), tensor(-200.))
    """
    if type(q) is Independent:
        root, to_base = origin(q.base_dist)
        return Independent(root, q.reinterpreted_batch_ndims, validate_args=False), to_base
    if isinstance(q, Kumaraswamy) and type(q) is Kumaraswamy:
        base: Any = q.base_dist
        return _followed(base, lambda x: Located(_above_the_end(base, x), 0.0, 1.0), q.transforms)
    if _is_drawn_as_image(q):
        return _followed(*origin(q.base_dist), parts_of(q.transforms))
    if isinstance(q, Uniform) and type(q) is Uniform:
        return q, lambda x: Located(_above_the_end(q, x))
    in_log_space = _IN_LOG_SPACE.get(type(q))
    if in_log_space is not None and (made := in_log_space(q)) is not None:
        root, transforms = made
        return _followed(root, Located, transforms)
    return q, Located


def _is_drawn_as_image(q: Distribution) -> TypeGuard[TransformedDistribution]:
    return type(q) in _DRAWN_AS_IMAGES and q.base_dist.batch_shape == q.batch_shape  # type: ignore[attr-defined]


def _followed(root: Distribution, to_base: _Image, transforms: list[Transform]) -> tuple[Distribution, _Image]:
    def to_q(x: Tensor) -> Located:
        points = to_base(x)
        for t in transforms:
            points = image(t, points)
        return points

    return root, to_q


def _above_the_end(q: Uniform, x: Tensor) -> Tensor:
    """Return draws with 0, which stands for all numbers up to the next one, in the middle of them."""
    return torch.where(x > q.low, x, x + (q.high - q.low) * (torch.finfo(x.dtype).eps / 4))


_Made = tuple[Distribution, list[Transform]] | None


def _has_small(least: float, *parameters: Tensor) -> bool:
    return not can_be_read(*parameters) or any(bool((t < least).any()) for t in parameters)


def _from_log_gamma(q: Gamma) -> _Made:
    if not _has_small(0.5, q.concentration):
        return None
    return LogGamma(q.concentration), [ExpTransform(), AffineTransform(0.0, q.rate.reciprocal())]


def _from_logit_beta(q: Beta) -> _Made:
    if not _has_small(1.5, q.concentration1, q.concentration0):  # 1 - x rounds sooner than x
        return None
    return LogitBeta(q.concentration1, q.concentration0), [SigmoidTransform()]


def _from_log_dirichlet(q: Dirichlet) -> _Made:
    return (LogDirichlet(q.concentration), [ExpTransform()]) if _has_small(0.5, q.concentration) else None


def _from_ratio(q: FisherSnedecor) -> _Made:
    if not _has_small(1.0, q.df1, q.df2):
        return None
    return LogitBeta(q.df1 / 2, q.df2 / 2), [ExpTransform(), AffineTransform(0.0, q.df2 / q.df1)]


_IN_LOG_SPACE: dict[type[Distribution], Callable[[Any], _Made]] = {
    Beta: _from_logit_beta,
    Chi2: _from_log_gamma,
    Dirichlet: _from_log_dirichlet,
    FisherSnedecor: _from_ratio,
    Gamma: _from_log_gamma,
}
