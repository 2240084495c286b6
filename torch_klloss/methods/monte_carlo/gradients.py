"""The terms that a sampled KL averages: log q - log p, with the gradient of each estimator."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_klloss.distributions.located import Located
from torch_klloss.distributions.maps import fixed
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

    def fixed(self) -> Draw:
        """Return the draw with points that carry no gradient."""
        return replace(self, points=replace(self.points, log_q=None), x=fixed(self.x))


def without_score(log_q: Tensor, at_fixed_points: Tensor) -> Tensor:
    """Return log q with a gradient through the points alone.

    Args:
        log_q: at the points.
        at_fixed_points: the same at points without a gradient; its value cancels, its gradient is the score.
    """
    score = torch.where(at_fixed_points.isfinite(), at_fixed_points, 0.0)
    return log_q - (score - score.detach())


def score_function(draw: Draw, log_ratio: Tensor, log_score: Tensor, num_draws: int, mean: Tensor | None) -> Tensor:
    """Return the terms with the score-function gradient; from two draws on, the other draws are the baseline.

    Args:
        draw: points of q or of its components, without a gradient.
        log_ratio: log q - log p there, `[n, *batch]`, with every gradient but the score's.
        log_score: the log-density that they were drawn from.
        num_draws: S; these draws may be a part of them.
        mean: of the log-ratio over all draws, `[*batch]`, or `[K, *batch]` for K components; None if these are all.
    """
    each = draw.split(log_ratio.detach())
    advantage = _leave_one_out(each, each.mean(0) if mean is None else mean, num_draws).reshape(log_score.shape)
    finite = torch.where(log_score.isfinite(), log_score, 0.0)
    return log_ratio + advantage * (finite - finite.detach())


def _leave_one_out(log_ratio: Tensor, mean: Tensor, num_draws: int) -> Tensor:
    """Return every term minus the mean of the others: ℓᵢ - (Σℓ - ℓᵢ)/(S-1) = (ℓᵢ - mean ℓ) · S/(S-1)."""
    advantage = log_ratio
    if num_draws > 1:
        advantage = (log_ratio - mean) * (num_draws / (num_draws - 1))
    return torch.where(advantage.isfinite(), advantage, 0.0)
