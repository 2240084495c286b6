"""The command `demo`: curves, table and figure of the question that this library began with.

Over samples from q, mean(q(x) * (log q(x) - log p(x))) gives another curve than the closed form. The weight q(x) dx
belongs to points of a grid; points drawn from q have the weight 1/S, because drawing them from q is the weighting.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Normal

from torch_klloss.cli.console import new_console, parse_count, parse_seed, print_table, writing
from torch_klloss.closed_forms import kl_divergence
from torch_klloss.estimate import KLEstimate
from torch_klloss.methods import MonteCarlo
from torch_klloss.plots import BAND, BLUE, GREEN, INK, VERMILION, new_figure, tidy_axes
from torch_klloss.rng import private_rng
from torch_klloss.samplers import IID, Points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console


EXPECTED_FACTOR = 1 / (2 * math.sqrt(math.pi))
"""E_q[q(x)] for a Normal q of scale one, 0.2821: the mean of the extra weight q(x)."""


@dataclass(frozen=True)
class QuestionCurves:
    """KL(Normal(μ, 1)‖Normal(0, 1)) over μ in nats, computed in four ways, one of which is wrong.

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
    E_q[q(x)] = 0.2821 for every μ. Everything is computed in float64; the global random stream does not change.

    Args:
        num_points: how many values of μ, evenly spaced, at least two.
        num_samples: how many samples from q for every μ.
        seed: the seed of the samples.

    Raises:
        ValueError: if `num_points` is below two, or `num_samples` below one.

    Examples:
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
        sampled=MonteCarlo(num_samples, sampler=_FixedPoints(points), gradient="none").estimate(q, p),
        closed_form=closed_form,
        grid=_grid_integral(q, p),
        factor=factor,
        factor_std_error=factor_std_error,
        num_samples=num_samples,
    )


@dataclass(frozen=True)
class _FixedPoints:
    """A sampler that returns the points it was given, so that two formulas use the same samples."""

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
    """Return the least-squares slope of the means of `terms` `[S, n]` on the closed form, and its standard error."""
    per_draw = terms @ (closed_form / closed_form.square().sum())
    num_samples = len(per_draw)
    std_error = per_draw.std().item() / math.sqrt(num_samples) if num_samples > 1 else math.nan
    return per_draw.mean().item(), std_error


def add_command(commands: Any) -> None:
    """Add the command `demo` to the parser."""
    about = "The question that the library began with: a figure, a table, and the answer."
    parser = commands.add_parser("demo", help=about, description=about)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where question.png goes")
    samples = {"type": partial(parse_count, at_least=2), "default": 100, "metavar": "N"}
    parser.add_argument("--num-samples", **samples, help="samples for each mean of q, at least 2 (100)")
    parser.add_argument("--seed", type=parse_seed, default=0, metavar="S", help="of the samples (0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Draw the figure and print the table of the question."""
    console = new_console()
    curves = question_curves(num_samples=args.num_samples, seed=args.seed)
    path = args.out / "question.png"
    figure = question_figure(curves)
    with writing(path):
        args.out.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    _print_question(console, curves)
    console.print(f"Figure: {path}", soft_wrap=True)


def _print_question(console: Console, curves: QuestionCurves) -> None:
    title = f"KL(Normal(μ, 1)‖Normal(0, 1)) in nats, {curves.num_samples} samples for each μ, ± standard error"
    columns = ("μ", "mean q·(log q - log p)", "mean (log q - log p)", "closed form", "grid integral")
    std_error = torch.as_tensor(curves.sampled.std_error)
    series = (curves.mu, curves.questioner, curves.sampled.value, std_error, curves.closed_form, curves.grid)
    rows = [
        [f"{mu:g}", f"{questioner:.3f}", f"{sampled:.3f} ± {error:.3f}", f"{closed_form:.3f}", f"{grid:.3f}"]
        for mu, questioner, sampled, error, closed_form, grid in torch.stack(series, dim=1)[::4].tolist()
    ]
    print_table(console, title, columns, rows)
    low, high = curves.sampled.interval(0.95)
    covered = ((low <= curves.closed_form) & (curves.closed_form <= high)).sum().item()
    console.print(
        "Drawing from q is the weighting by q already: the mean of q·(log q - log p) over samples of q weights twice, "
        f"and is {curves.factor:.3f} ± {curves.factor_std_error:.3f} times the KL, where E[q(x)] = 1/(2√π) = "
        f"{EXPECTED_FACTOR:.4f} is expected. The plain mean of (log q - log p) over the same samples is the estimate, "
        f"with 95 % intervals that cover the closed form at {covered} of {len(curves.mu)} μ; the weight q(x) dx "
        "belongs to the points of a grid."
    )


def question_figure(curves: QuestionCurves) -> Figure:
    """Draw the four curves of the question, in nats over μ, and beside them their gaps to the closed form.

    Args:
        curves: the result of `question_curves`.

    Raises:
        ImportError: if matplotlib is missing.

    Examples:
        >>> from torch_klloss.cli.demo import question_curves, question_figure
        >>> figure = question_figure(question_curves())
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['KL(q‖p) in nats', 'gap to the closed form in nats']
    """
    figure = new_figure(9, 4.9)
    left, right = figure.subplots(1, 2)
    zero, exact = np.zeros(len(curves.mu)), curves.closed_form.numpy()
    _question_panel(left, curves, zero)
    _question_panel(right, curves, exact)
    expected: dict[str, Any] = {"color": INK, "linewidth": 1.1, "linestyle": ":", "label": "0.2821 · closed form"}
    left.plot(curves.mu.numpy(), EXPECTED_FACTOR * exact, **expected)
    factor = f"weighted by q twice:\n{curves.factor:.3f} ± {curves.factor_std_error:.3f} of the KL is left"
    right.text(0.5, 0.3, factor, transform=right.transAxes, color=VERMILION, ha="center")
    left.set(title="The curves", ylabel="KL(q‖p) in nats")
    right.set(title="Their gaps to the closed form", ylabel="gap to the closed form in nats")
    figure.suptitle(f"KL(q‖p) of q = Normal(μ, 1) and p = Normal(0, 1), {curves.num_samples} samples for each μ")
    twice, sampled, interval, exact_line, grid, expected_line = left.get_legend_handles_labels()[0]
    in_columns = [twice, expected_line, sampled, interval, exact_line, grid]
    figure.legend(handles=in_columns, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _question_panel(axes: Axes, curves: QuestionCurves, baseline: np.ndarray) -> None:
    """Draw the curves less the baseline; a band, a line and markers keep coinciding curves visible."""
    mu = curves.mu.numpy()
    low, high = (end.numpy() - baseline for end in curves.sampled.interval(0.95))
    questioner, sampled, exact, grid = (
        curve.numpy() - baseline for curve in (curves.questioner, curves.sampled.value, curves.closed_form, curves.grid)
    )
    every = max(1, len(mu) // 20)
    axes.plot(mu, questioner, color=VERMILION, linewidth=2, linestyle=(0, (5, 1.5)), label="mean of q·(log q − log p)")
    axes.plot(mu, sampled, color=BLUE, linewidth=1.6, label="mean of (log q − log p)")
    axes.fill_between(mu, low, high, **BAND, label="its 95 % interval")
    axes.plot(mu, exact, color=INK, linewidth=1.2, label="closed form")
    ring: dict[str, Any] = {"marker": "o", "markersize": 5.5, "markerfacecolor": "none", "markeredgewidth": 1.3}
    axes.plot(mu, grid, color=GREEN, linestyle="none", markevery=every, **ring, label="∫ q (log q − log p) dx, grid")
    axes.set_xlabel("μ, the mean of q")
    tidy_axes(axes)
