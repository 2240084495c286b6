"""The numbers behind the question that this library began with: why do two curves of KL(q‖p) disagree?

Over samples from q, someone computed mean(q(x) * (log q(x) - log p(x))) and found another curve than the closed form's.
Weights q(x) dx belong to points of a grid; points drawn from q carry 1/S, because the drawing is the weighting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal

from torch_klloss.closed_forms import kl_divergence
from torch_klloss.estimate import KLEstimate
from torch_klloss.methods import MonteCarlo
from torch_klloss.rng import private_rng
from torch_klloss.samplers import IID, Points

EXPECTED_FACTOR = 1 / (2 * math.sqrt(math.pi))
"""E_q[q(x)] for a Normal q of scale one, 0.2821: what an extra weight q(x) averages to."""


@dataclass(frozen=True)
class QuestionCurves:
    """Hold KL(Normal(μ, 1)‖Normal(0, 1)) over μ in nats, computed in four ways, one of which is wrong.

    Attributes:
        mu: the means of q, `[num_points]`; every curve below has this shape.
        questioner: mean(q(x) (log q(x) - log p(x))) over samples from q, which are weighted by q already.
        sampled: mean(log q(x) - log p(x)) over the same samples, with its standard error.
        closed_form: the exact KL, μ²/2.
        grid: Σ q(x) (log q(x) - log p(x)) dx over a grid, where the weight q(x) belongs.
        factor: the least-squares slope of `questioner` on `closed_form`. Its expectation is `EXPECTED_FACTOR`.
        factor_std_error: the standard error of `factor`; NaN with a single sample.
        num_samples: how many samples there are for every μ.
    """

    mu: Tensor
    questioner: Tensor
    sampled: KLEstimate
    closed_form: Tensor
    grid: Tensor
    factor: float
    factor_std_error: float
    num_samples: int


def question_curves(num_points: int = 41, num_samples: int = 100, seed: int = 0) -> QuestionCurves:
    """Compute the curves of KL(Normal(μ, 1)‖Normal(0, 1)), in nats, for μ from -5 to 5.

    The questioner's formula has the expectation ∫ q² (log q - log p) dx. Here q² is 1/(2√π) times the density of
    Normal(μ, ½), and log q - log p = μx - μ²/2 is linear in x, so that it is KL(q‖p) / (2√π) exactly: too small by
    E_q[q(x)] = 0.2821 for every μ. Everything is computed in float64, and the global random stream is left alone.

    Args:
        num_points: how many values of μ, evenly spaced, at least two.
        num_samples: how many samples from q for every μ.
        seed: of the samples.

    Raises:
        ValueError: if `num_points` is below two, or `num_samples` below one.

    Example:
        >>> from torch_klloss.cli.demo import question_curves
        >>> curves = question_curves(num_points=5)
        >>> curves.closed_form
        tensor([12.5000,  3.1250,  0.0000,  3.1250, 12.5000], dtype=torch.float64)
        >>> curves.grid
        tensor([12.5000,  3.1250,  0.0000,  3.1250, 12.5000], dtype=torch.float64)
        >>> abs(curves.factor - 0.2821) < 4 * curves.factor_std_error
        True
    """
    if num_points < 2:
        raise ValueError(f"num_points must be at least 2, got {num_points}.")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    mu = torch.linspace(-5, 5, num_points, dtype=torch.float64)
    q, p = Normal(mu, torch.ones_like(mu)), Normal(torch.zeros_like(mu), torch.ones_like(mu))
    with private_rng(seed, mu.device):
        points = IID().draw(q, num_samples, differentiable=False)
    log_q, log_p = q.log_prob(points.x), p.log_prob(points.x)
    weighted_twice = log_q.exp() * (log_q - log_p)
    closed_form = kl_divergence(q, p)
    factor, factor_std_error = _slope(weighted_twice, closed_form)
    return QuestionCurves(
        mu=mu,
        questioner=points.expectation(weighted_twice),
        sampled=MonteCarlo(num_samples, sampler=_Drawn(points), gradient="none").estimate(q, p),
        closed_form=closed_form,
        grid=_grid_integral(q, p),
        factor=factor,
        factor_std_error=factor_std_error,
        num_samples=num_samples,
    )


@dataclass(frozen=True)
class _Drawn:
    """Hand out points that were drawn before, so that two formulas see the same ones."""

    points: Points

    def draw(self, q: Distribution, num_samples: int, *, differentiable: bool) -> Points:
        return self.points


def _grid_integral(q: Normal, p: Normal) -> Tensor:
    """Return ∫ q (log q - log p) dx by the rectangle rule, out to ten scales, where q is below 1e-22."""
    offsets = torch.linspace(-10, 10, 401, dtype=q.loc.dtype)
    x = q.loc + q.scale * offsets.unsqueeze(-1)
    dx = x[1] - x[0]
    points = Points(x, q.log_prob(x).exp() * dx, num_replicates=None)
    return points.expectation(q.log_prob(x) - p.log_prob(x))


def _slope(terms: Tensor, closed_form: Tensor) -> tuple[float, float]:
    """Return the least-squares slope on the closed form of the means of `terms` `[S, n]`, and its standard error."""
    per_draw = terms @ (closed_form / closed_form.square().sum())
    num_samples = len(per_draw)
    std_error = per_draw.std().item() / math.sqrt(num_samples) if num_samples > 1 else math.nan
    return per_draw.mean().item(), std_error
