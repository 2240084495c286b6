"""The figure of an audit: what a loss returned against the true KL, one point a probe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from torch_klloss.plots import BLUE, INK, VERMILION, new_figure, tidy_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ProbePoint:
    """One point of the figure: the KL of a probe and the value of the loss, in nats for each example."""

    shape: tuple[int, ...]
    kl: float
    got: float
    fitted: float | None
    std_error: float


def audit_figure(points: Sequence[ProbePoint], *, title: str, found: str = "") -> Figure:
    """Draw what an audited loss returned against the true KL, one point a probe, and its explanation.

    The KL is the line y = x. The explanation is a straight line where it is the KL times a constant, and else an open
    marker a probe. A value that is not finite has no point; the legend counts them.

    Args:
        points: one for each probe; at least one.
        title: of the figure.
        found: the label of the explanation: the mistakes, or the reduction.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if there is no point.

    Examples:
        >>> from torch_klloss.auditing.figure import ProbePoint, audit_figure
        >>> points = [ProbePoint((16, 8), kl, 2 * kl, 2 * kl, 0.0) for kl in (1.0, 2.0, 4.0)]
        >>> figure = audit_figure(points, title="my_kl(mu, logvar): wrong value", found="half-missing")
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['the KL: y = x', 'half-missing: 2 times the KL', 'returned by the loss']
    """
    if not points:
        raise ValueError("audit_figure needs at least one point; a loss that was not judged has none.")
    points = sorted(points, key=lambda point: point.kl)
    kl, got, error = (np.array([getattr(point, name) for point in points]) for name in ("kl", "got", "std_error"))
    fitted = np.array([math.nan if point.fitted is None else point.fitted for point in points])
    figure = new_figure(9, 5.6)
    axes = figure.subplots()
    finite = np.isfinite(got)
    missed = "" if finite.all() else f" ({(~finite).sum()} of {len(got)} values are not finite)"
    axes.errorbar(
        kl,
        np.where(finite, got, math.nan),
        yerr=np.where(finite, 1.96 * error, math.nan) if error.any() else None,
        color=BLUE,
        fmt="o",
        markersize=4,
        elinewidth=1.2,
        capsize=2,
        label=f"returned by the loss{', 95 % interval' if error.any() else ''}{missed}",
        zorder=3,
    )
    _scale_by(axes, kl, got[finite])
    _along(axes, kl, 1.0, color=INK, linewidth=1.2, label="the KL: y = x")
    _draw_found(axes, kl, fitted, found)
    axes.set(xlabel="KL(q‖p) in nats, the mean over the examples of a probe", ylabel="returned by the loss, in nats")
    tidy_axes(axes)
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draw_found(axes: Axes, kl: np.ndarray, fitted: np.ndarray, label: str) -> None:
    """Draw the explanation, unless there is none or it is the KL itself."""
    known = np.isfinite(fitted)
    if not known.any() or np.allclose(fitted, kl, rtol=_SAME):
        return
    factor = float(np.median(fitted[known] / kl[known]))
    if np.allclose(fitted, factor * kl, rtol=_SAME):
        _along(axes, kl, factor, color=VERMILION, linestyle=(0, (5, 1.5)), label=f"{label}: {factor:.4g} times the KL")
        return
    axes.plot(kl[known], fitted[known], color=VERMILION, linewidth=0.6, alpha=0.4)
    ring: dict[str, Any] = {"marker": "o", "markersize": 7.5, "markerfacecolor": "none", "markeredgewidth": 1.2}
    axes.plot(kl, fitted, color=VERMILION, linestyle="none", **ring, label=label)


def _along(axes: Axes, kl: np.ndarray, factor: float, **style: Any) -> None:
    """Draw the line y = factor · x, which is straight on linear axes and on logarithmic ones."""
    x = np.geomspace(kl.min(), kl.max(), 200)
    axes.plot(x, factor * x, **style)


def _scale_by(axes: Axes, kl: np.ndarray, got: np.ndarray) -> None:
    """Make the axes logarithmic where the values span decades, symmetrically so if not all are > 0."""
    sizes = np.abs(np.concatenate([kl, got]))
    sizes = sizes[sizes > 0]
    span = sizes.max() / sizes.min()
    if (got > 0).all() and span > _WIDE:
        axes.set(xscale="log", yscale="log")
    elif span > _WIDE**2:
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=float(np.quantile(sizes, 0.1)))


_WIDE = 30.0  # from the smallest to the largest value: more than a linear axis shows
_SAME = 1e-6  # relative: rounding, and far below what a figure shows
