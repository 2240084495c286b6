"""Figures of training. Each function returns a `matplotlib.figure.Figure` and does not use pyplot or its global state.

matplotlib is imported when a figure is made: `pip install "torch_klloss[plot]"`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BAND",
    "BLUE",
    "GREEN",
    "INK",
    "VERMILION",
    "annealing_figure",
    "collapse_figure",
    "gap_figure",
    "new_figure",
    "reconstruction_figure",
    "schedule_figure",
    "tidy_axes",
]


def __dir__() -> list[str]:
    return sorted(__all__)


# The palette of Okabe and Ito, which colour-blind readers can tell apart.
BLUE, VERMILION, GREEN, INK = "#0072B2", "#D55E00", "#007A5A", "#222222"
DASHED = (0, (4, 2))
BAND: dict[str, Any] = {"color": BLUE, "alpha": 0.22, "linewidth": 0}

SampledCurve = Literal["value", "reference"]


class Schedule(Protocol):
    """A weight as a function of the step, with the step at which its warm-up ends."""

    @property
    def total_steps(self) -> float:
        """The step at which the warm-up ends."""

    def __call__(self, step: float) -> float:
        """Return the weight."""


def gap_figure(
    steps: Sequence[float],
    value: Sequence[float],
    reference: Sequence[float],
    std_error: Sequence[float],
    *,
    value_label: str = "closed form",
    reference_label: str = "sampled",
    sampled: SampledCurve = "reference",
    title: str = "KL(q‖p) in training",
) -> Figure:
    """Draw the KL that training used with a second estimate of it over the steps, and below them their difference.

    The bands are ±1.96 standard errors, 95 % of a Normal: around the sampled curve above, around the gap below. If the
    gap is only noise, its band covers zero; where the standard error is NaN there is no band.

    Args:
        steps: the training steps, `[n]`.
        value: the KL used by training, in nats, `[n]`.
        reference: the KL estimated once more at the same steps, in nats, `[n]`.
        std_error: the standard error of value - reference, `[n]`.
        value_label: how `value` was computed.
        reference_label: how `reference` was computed.
        sampled: which of the two the standard error belongs to, "value" or "reference".
        title: the title of the figure.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if the lengths differ or are zero, or `sampled` is unknown.

    Examples:
        >>> from torch_klloss.plots import gap_figure
        >>> figure = gap_figure([1, 2, 3], [2.0, 3.0, 4.0], [2.1, 2.9, 4.0], [0.1, 0.1, 0.1])
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['KL(q‖p) in nats', 'gap in nats']
    """
    lengths = [len(series) for series in (steps, value, reference, std_error)]
    if len(set(lengths)) > 1 or lengths[0] == 0:
        raise ValueError(f"steps, value, reference and std_error must have the same length, at least 1, got {lengths}.")
    if sampled not in get_args(SampledCurve):
        raise ValueError(f"sampled must be 'value' or 'reference', got {sampled!r}.")
    used, again, half_width = np.asarray(value), np.asarray(reference), 1.96 * np.asarray(std_error)
    figure = new_figure(9, 5.6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    figure.suptitle(title)
    line: dict[str, Any] = {"linewidth": 1.4, "marker": "o" if len(steps) <= 50 else None, "markersize": 3}
    top.plot(steps, used, color=VERMILION, linestyle=DASHED, label=f"in training: {value_label}", zorder=3, **line)
    top.plot(steps, again, color=BLUE, label=f"estimated again: {reference_label}", **line)
    bottom.plot(steps, used - again, color=BLUE, label="gap: in training − estimated again", **line)
    bottom.axhline(0, color=INK, linewidth=1)
    for axes, centre in ((top, used if sampled == "value" else again), (bottom, used - again)):
        axes.fill_between(steps, centre - half_width, centre + half_width, **BAND, label="95 % interval")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0)
        tidy_axes(axes)
    top.set_ylabel("KL(q‖p) in nats")
    bottom.set(xlabel="training step", ylabel="gap in nats")
    return figure


def collapse_figure(
    steps: Sequence[float],
    kl: Sequence[Sequence[float]],
    active: Sequence[int] | None = None,
    *,
    title: str = "KL by latent unit",
) -> Figure:
    """Draw the KL of every latent unit over training as a heat map, the unit that ends highest on top.

    The colour is linear in nats, from 0 to the largest KL, but at least to 0.1, so that a fully collapsed latent stays
    dark. The number of active units is drawn below.

    Args:
        steps: the training steps, `[n]`, rising.
        kl: the KL of every unit at these steps, in nats, `[n, units]`.
        active: how many units were active at these steps, `[n]`.
        title: the title of the figure.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if the lengths differ or are zero.

    Examples:
        >>> from torch_klloss.plots import collapse_figure
        >>> figure = collapse_figure([0, 50], [[0.1, 0.2], [1.5, 0.0]], [2, 1])
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['latent unit', 'active units', 'KL in nats']
    """
    lengths = [len(series) for series in (steps, kl, *([] if active is None else [active]))]
    if len(set(lengths)) > 1 or lengths[0] == 0 or len({len(row) for row in kl}) > 1 or len(kl[0]) == 0:
        raise ValueError(
            f"steps, kl and active must have the same length, at least 1, and kl the same units at every step, got "
            f"{lengths} and {sorted({len(row) for row in kl})} units."
        )
    values = np.asarray(kl, dtype=float)
    order = np.argsort(-values[-1], kind="stable")
    figure = new_figure(9, 4.2 if active is None else 5.4)
    heights = [1] if active is None else [5, 2]
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    top = panels[0, 0]
    edges = _edges(np.asarray(steps, dtype=float))
    rows, brightest = np.arange(values.shape[1] + 1) - 0.5, max(0.1, np.nanmax(values, initial=0))
    mesh = top.pcolormesh(edges, rows, values[:, order].T, cmap="inferno", vmin=0, vmax=brightest)
    units = np.unique(np.linspace(0, values.shape[1] - 1, min(values.shape[1], 16)).round().astype(int))
    top.set(ylabel="latent unit", yticks=units, yticklabels=[str(order[j]) for j in units])
    top.invert_yaxis()
    figure.suptitle(title)
    if active is not None:
        marker = "o" if len(steps) <= 50 else None
        panels[1, 0].plot(steps, active, color=BLUE, linewidth=1.6, marker=marker, markersize=3)
        most = max(values.shape[1], *active)
        ticks = np.unique(np.linspace(0, most, 5).round())
        panels[1, 0].set(ylabel="active units", ylim=(-0.05 * most, 1.05 * most), yticks=ticks)
        tidy_axes(panels[1, 0])
    panels[-1, 0].set_xlabel("training step")
    figure.colorbar(mesh, ax=top, label="KL in nats", pad=0.01)
    return figure


def _edges(centres: np.ndarray) -> np.ndarray:
    """Return the midpoints between the steps, and one edge beyond either end."""
    between = (centres[1:] + centres[:-1]) / 2
    first = centres[0] - (between[0] - centres[0] if len(between) else 0.5)
    last = centres[-1] + (centres[-1] - between[-1] if len(between) else 0.5)
    return np.concatenate([[first], between, [last]])


def annealing_figure(
    steps: Sequence[float],
    weights: Sequence[float],
    kl: Sequence[float],
    reconstruction: Sequence[float],
    *,
    title: str = "The weight of the KL in training",
) -> Figure:
    """Draw the weight of the KL over training, and below it the KL and the reconstruction.

    Args:
        steps: the training steps, `[n]`.
        weights: the weight β at these steps, `[n]`.
        kl: the unweighted KL, in nats per example, `[n]`.
        reconstruction: the negative log-likelihood, in nats per example, `[n]`.
        title: the title of the figure.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if the lengths differ or are zero.

    Examples:
        >>> from torch_klloss.plots import annealing_figure
        >>> figure = annealing_figure([0, 50], [0.0, 1.0], [9.0, 5.0], [30.0, 25.0])
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['weight β', 'nats per example']
    """
    lengths = [len(series) for series in (steps, weights, kl, reconstruction)]
    if len(set(lengths)) > 1 or lengths[0] == 0:
        raise ValueError(f"steps, weights, kl and reconstruction must have the same length, at least 1, got {lengths}.")
    figure = new_figure(9, 5.2)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 3])
    figure.suptitle(title)
    top.plot(steps, weights, color=INK, linewidth=1.6)
    top.set(ylabel="weight β", ylim=(0, 1.08 * max(*weights, 1e-12)))
    bottom.plot(steps, kl, color=BLUE, linewidth=1.6, label="KL(q‖p)")
    label = "reconstruction, −log p(x|z)"
    bottom.plot(steps, reconstruction, color=VERMILION, linewidth=1.6, linestyle=DASHED, label=label)
    bottom.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0)
    bottom.set(xlabel="training step", ylabel="nats per example")
    bottom.set_ylim(bottom=0)
    for axes in (top, bottom):
        tidy_axes(axes)
    return figure


def schedule_figure(
    schedules: Schedule | Sequence[Schedule] | Mapping[str, Schedule],
    num_steps: float | None = None,
    *,
    title: str = "The weight of the KL",
) -> Figure:
    """Draw schedules over the steps, with a dot where each warm-up ends.

    Args:
        schedules: one schedule, or several, which are labelled by their keys or else by their `repr`.
        num_steps: the last step drawn; by default a tenth beyond the end of the last warm-up.
        title: the title of the figure.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if there is no schedule, or `num_steps` is not above 0.

    Examples:
        >>> from torch_klloss.plots import schedule_figure
        >>> from torch_klloss.schedules import Cyclical, Linear
        >>> figure = schedule_figure({"linear": Linear(steps=500), "cyclical": Cyclical(steps=1000)})
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['linear', 'cyclical']
    """
    if not isinstance(schedules, Mapping):
        listed = schedules if isinstance(schedules, Sequence) else [schedules]
        schedules = {repr(schedule): schedule for schedule in listed}
    if not schedules:
        raise ValueError("schedule_figure needs at least one schedule, got none.")
    last = max(1.1 * schedule.total_steps for schedule in schedules.values()) or 1.0 if num_steps is None else num_steps
    if not last > 0:
        raise ValueError(f"num_steps must be above 0, got {num_steps!r}.")
    figure = new_figure(9, 3.2 + 0.25 * len(schedules))
    axes = figure.subplots()
    steps = np.linspace(0, last, 1801)  # one a pixel, so that a cycle ends in a vertical line
    styles = itertools.product(("-", (0, (5, 1.5)), (0, (1, 1.2))), (BLUE, VERMILION, GREEN, INK))
    for (label, schedule), (style, colour) in zip(schedules.items(), itertools.cycle(styles)):
        axes.plot(steps, [schedule(step) for step in steps.tolist()], color=colour, linestyle=style, label=label)
        if 0 < schedule.total_steps <= last:
            axes.plot(schedule.total_steps, schedule(schedule.total_steps), color=colour, marker="o", markersize=4)
    axes.set(xlabel="step", ylabel="weight β", xlim=(0, last))
    tidy_axes(axes)
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=1 if max(map(len, schedules)) > 40 else 4, frameon=False)
    return figure


def reconstruction_figure(originals: Tensor, reconstructions: Tensor, samples: Tensor) -> Figure:
    """Draw three rows of grey images: data, their reconstructions, and decoded draws from the prior.

    Args:
        originals: `[n, height, width]`, with 0 for black and 1 for white; other values are clipped.
        reconstructions: the reconstructions of the originals, in the same order.
        samples: decoded draws from the prior.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if a tensor does not have the three dimensions, or has no image.

    Examples:
        >>> import torch
        >>> from torch_klloss.plots import reconstruction_figure
        >>> images = torch.rand(10, 8, 8)
        >>> figure = reconstruction_figure(images, images, images)
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['originals', 'reconstructions', 'samples from the prior']
    """
    rows = {"originals": originals, "reconstructions": reconstructions, "samples from the prior": samples}
    for label, images in rows.items():
        if images.dim() != 3 or len(images) == 0:
            raise ValueError(f"{label} must be images of shape [n, height, width], got {tuple(images.shape)}.")
    count, height, width = originals.shape
    figure = new_figure(9, 0.6 + 3 * min(1.5, 7.2 / count * height / width))
    for axes, (label, images) in zip(figure.subplots(3, 1), rows.items(), strict=True):
        # One picture a row: the images side by side, separated by columns of NaN, which are not drawn.
        spaced = torch.nn.functional.pad(images.detach().cpu().float(), (0, 1), value=math.nan)
        axes.imshow(torch.cat(list(spaced), dim=1)[:, :-1].numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set_ylabel(label, rotation=0, ha="right", va="center")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return figure


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure at 200 dots an inch: a width of 9 is 1800 pixels, twice the width of a README."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('The figures need matplotlib: pip install "torch_klloss[plot]".') from error
    return Figure(figsize=(width, height), dpi=200, layout="constrained")


def tidy_axes(axes: Axes) -> None:
    """Draw a light grid behind the curves, and no frame at the top and on the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
