"""Points of a mixture, drawn from each of its components."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution, MixtureSameFamily, TransformedDistribution

from torch_klloss.distributions.densities import log_density_within
from torch_klloss.distributions.located import Located
from torch_klloss.distributions.maps import fixed, image
from torch_klloss.distributions.transforms import parts_of
from torch_klloss.samplers.origins import LocatedDraws, prepare_located
from torch_klloss.samplers.points import Points, Sampler


@dataclass(frozen=True)
class ComponentDraw:
    """Points of a mixture, as many from each of its K components.

    Attributes:
        points: the first draw from every component, then the second, …, `[n K, *batch, *event]`. The weight of each is
            its share of the draws times the probability of its component, through which a gradient flows.
        component: the distribution of the components, `[*batch, K, *event]`.
        x: the same points, as `Located`.
        drawn: the points of the components themselves, `[n, *batch, K, *event]`.
    """

    points: Points
    component: Distribution
    x: Located
    drawn: Located

    @property
    def num_components(self) -> int:
        """The number K of components."""
        return self.component.batch_shape[-1]

    def log_component(self) -> Tensor:
        """Return the log-density of every point under the component that it was drawn from, `[n K, *batch]`."""
        return log_density_within(self.component, fixed(self.drawn)).movedim(-1, 1).flatten(0, 1)


def mixture_of(q: Distribution) -> MixtureSameFamily | None:
    """Return the mixture that q is, or is transformed from with the same event shape; None if there is none."""
    base = q
    while isinstance(base, TransformedDistribution):
        base = base.base_dist
    return base if isinstance(base, MixtureSameFamily) and len(base.event_shape) == len(q.event_shape) else None


def prepare_by_component(
    sampler: Sampler, q: Distribution, num_samples: int, *, differentiable: bool
) -> DrawsByComponent:
    """Return `num_samples` draws from every component of a mixture q; E_q[f] = Σ_k π_k E_k[f] is exact in π.

    Args:
        sampler: draws from the components.
        q: a `MixtureSameFamily`, or transformed from one: `mixture_of(q)` finds it.
        num_samples: of every component.
        differentiable: whether the points carry a gradient to the components (`rsample`); the weights always do.

    Raises:
        ValueError: if q is not a mixture.

    Examples:
        >>> import torch
        >>> from torch.distributions import Categorical, MixtureSameFamily, Normal
        >>> from torch_klloss.samplers import IID
        >>> from torch_klloss.samplers.components import prepare_by_component
        >>> q = MixtureSameFamily(Categorical(torch.tensor([0.25, 0.75])), Normal(torch.zeros(2), 1.0))
        >>> points = prepare_by_component(IID(), q, 2, differentiable=True).part(0, 2).points
        >>> points.x.shape, points.weights
        (torch.Size([4]), tensor([0.1250, 0.3750, 0.1250, 0.3750]))
    """
    mixture = mixture_of(q)
    if mixture is None:
        raise ValueError(f"prepare_by_component needs a MixtureSameFamily, got {type(q).__name__}.")
    component = mixture.component_distribution
    return DrawsByComponent(q, mixture, prepare_located(sampler, component, num_samples, differentiable=differentiable))


@dataclass(frozen=True)
class DrawsByComponent:
    """Draws from every component of a mixture, with their randomness fixed.

    Attributes:
        q: the mixture, or transformed from it.
        mixture: the mixture itself.
        draws: the draws from the components.
    """

    q: Distribution
    mixture: MixtureSameFamily
    draws: LocatedDraws

    def part(self, start: int, stop: int) -> ComponentDraw:
        """Return draws start … stop - 1 of every component, the same at every call."""
        points, drawn = self.draws.part(start, stop)
        component, dim = self.mixture.component_distribution, len(self.mixture.batch_shape) + 1
        probs = self.mixture.mixture_distribution.probs.expand(component.batch_shape)
        x = drawn.map(lambda t: _possible(t, probs, dim).movedim(dim, 1).flatten(0, 1))
        with nullcontext() if self.draws.differentiable else torch.no_grad():
            x = _transformed(self.q, x)
        x = x if self.draws.differentiable else fixed(x)
        weights = (points.weights * probs).movedim(-1, 1).flatten(0, 1)
        return ComponentDraw(Points(x.x, weights, points.num_replicates), component, x, drawn)


def _possible(x: Tensor, probs: Tensor, dim: int) -> Tensor:
    """Return x with the points of components of probability zero replaced by points of the likeliest one."""
    best, never = (
        t.reshape(t.shape + (1,) * (x.dim() - dim - 1)) for t in (probs.argmax(-1, keepdim=True), probs == 0)
    )
    return torch.where(never, torch.take_along_dim(x, best.unsqueeze(0), dim), x)


def _transformed(q: Distribution, x: Located) -> Located:
    """Return points of the mixture as points of q."""
    if not isinstance(q, TransformedDistribution):
        return x
    x = _transformed(q.base_dist, x)
    for t in parts_of(q.transforms):
        x = image(t, x)
    return x
