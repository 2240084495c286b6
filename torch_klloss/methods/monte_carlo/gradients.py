"""The terms that a sampled KL averages: log q - log p, with the gradient of each estimator."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.distributions.densities import log_density_within
from torch_klloss.distributions.located import Located
from torch_klloss.distributions.maps import fixed
from torch_klloss.distributions.reach import has_path
from torch_klloss.distributions.tensors import is_transparent
from torch_klloss.numerics.exponentials import expm1
from torch_klloss.samplers import Points
from torch_klloss.samplers.components import ComponentDraw

REPARAMETERISED = ("pathwise", "sticking_the_landing", "mixed")


@dataclass(frozen=True)
class Draw:
    """Points of q, drawn from q itself or from its components one by one.

    Attributes:
        points: the weights of the points, `[n, *batch]`, with the points that they are images of.
        x: the points, `[n, *batch, *event]`.
        by_component: their draw from the components of a mixture; None if they were drawn from q itself.
    """

    points: Points
    x: Located
    by_component: ComponentDraw | None = None

    def split(self, t: Tensor) -> Tensor:
        """Return `[n K, *batch]` as `[n, K, *batch]` for K components; t itself without components."""
        return t if self.by_component is None else t.unflatten(0, (-1, self.by_component.num_components))

    def has_path(self, q: Distribution, log_q: Tensor) -> bool:
        """Return whether the points carry a gradient to every parameter of q; of a mixture, of its components."""
        if self.by_component is None:
            return has_path(q, self.x.x, log_q)
        component, x = self.by_component.component, self.by_component.drawn
        return is_transparent(component) or has_path(component, x.x, log_density_within(component, x))

    def fixed(self) -> Draw:
        """Return the draw with points that carry no gradient."""
        return replace(self, points=replace(self.points, log_q=None), x=fixed(self.x))


def null_ratio(log_q: Tensor) -> Tensor:
    """Return q(x)/q₀(x) - 1 at fixed points x, where q₀ is q with its parameters as they are now.

    The value is 0 and the gradient is the score (0 where log q is not finite). Over draws of q₀ the mean is 0 for every
    q, so that the derivatives of every order have mean zero; those of log q have not, from the second on.
    """
    log_q = torch.where(log_q.isfinite(), log_q, 0.0)
    return expm1(log_q - log_q.detach())


def by_score(log_ratio: Tensor, log_score: Tensor, advantage: Tensor) -> Tensor:
    """Return the log-ratio at fixed points, with a mean whose derivatives of every order are those over moving points.

    Args:
        log_ratio: log q - log p, `[n, *batch]`, with its own gradient.
        log_score: the log-density that the points were drawn from.
        advantage: log q - log p less a baseline that does not depend on the point; finite, and without a gradient.
    """
    finite = torch.where(log_ratio.isfinite(), log_ratio, 0.0)
    return log_ratio + (advantage + finite - finite.detach()) * null_ratio(log_score)


def advantage(draw: Draw, log_ratio: Tensor, num_draws: int, mean: Tensor | None) -> Tensor:
    """Return log q - log p less the mean of the other draws, from two draws on; without a gradient.

    Args:
        draw: points of q or of its components.
        log_ratio: log q - log p there, `[n, *batch]`.
        num_draws: S; these draws may be a part of them.
        mean: of the log-ratio over all draws, `[*batch]`, or `[K, *batch]` for K components; None if these are all.
    """
    each = draw.split(log_ratio.detach())
    return _leave_one_out(each, each.mean(0) if mean is None else mean, num_draws).reshape(log_ratio.shape)


def _leave_one_out(log_ratio: Tensor, mean: Tensor, num_draws: int) -> Tensor:
    """Return every term minus the mean of the others: ℓᵢ - (Σℓ - ℓᵢ)/(S-1) = (ℓᵢ - mean ℓ) · S/(S-1)."""
    advantage = log_ratio
    if num_draws > 1:
        advantage = (log_ratio - mean) * (num_draws / (num_draws - 1))
    return torch.where(advantage.isfinite(), advantage, 0.0)
