"""The terms that a sampled KL averages: their value is log q - log p, and their gradient one that is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_klloss.samplers import Points
from torch_klloss.samplers.components import ComponentDraw

REPARAMETERISED = ("pathwise", "sticking_the_landing", "mixed")


@dataclass(frozen=True)
class Draw:
    """Hold points of q that were drawn from q itself, or from its components one by one.

    Attributes:
        points: the points, `[n, *batch, *event]`.
        by_component: how they were drawn from the components of a mixture; None where q was drawn from.
    """

    points: Points
    by_component: ComponentDraw | None = None

    def split(self, t: Tensor) -> Tensor:
        """Return `[n K, *batch]` as `[n, K, *batch]`, where there are K components."""
        return t if self.by_component is None else t.unflatten(0, (-1, self.by_component.num_components))


def pathwise(log_q: Callable[[Tensor], Tensor], draw: Draw, log_p: Tensor) -> Tensor:
    """Return the terms whose gradient runs through the points and through log q."""
    return log_q(draw.points.x) - log_p


def sticking_the_landing(log_q: Callable[[Tensor], Tensor], draw: Draw, log_p: Tensor) -> Tensor:
    """Return the terms whose gradient runs through the points alone."""
    x = draw.points.x
    score = log_q(x.detach())  # its value cancels; its gradient is the score, which is taken away
    return log_q(x) - log_p - (score - score.detach())


def without(log_q: Callable[[Tensor], Tensor], draw: Draw, log_p: Tensor) -> Tensor:
    """Return the terms without a gradient to q."""
    return log_q(draw.points.x).detach() - log_p


def score_function(draw: Draw, log_ratio: Tensor, log_score: Tensor, num_draws: int, mean: Tensor | None) -> Tensor:
    """Return the terms with the score-function gradient, the other draws being the baseline from two on.

    Args:
        draw: points of q that carry no gradient, or those of its components.
        log_ratio: log q - log p there, `[n, *batch]`, with the gradient of what is no score.
        log_score: the logarithm of the density that they were drawn from.
        num_draws: S, of which these may be a part.
        mean: of the log-ratio over all draws, `[*batch]`, or `[K, *batch]` for K components; None if these are all.
    """
    each = draw.split(log_ratio.detach())
    advantage = _leave_one_out(each, each.mean(0) if mean is None else mean, num_draws).reshape(log_score.shape)
    return log_ratio + advantage * (log_score - log_score.detach())


def _leave_one_out(log_ratio: Tensor, mean: Tensor, num_draws: int) -> Tensor:
    """Return every term minus the mean of the others: ℓᵢ - (Σℓ - ℓᵢ)/(S-1) = (ℓᵢ - mean ℓ) · S/(S-1)."""
    advantage = log_ratio
    if num_draws > 1:
        advantage = (log_ratio - mean) * (num_draws / (num_draws - 1))
    return torch.where(advantage.isfinite(), advantage, 0.0)
