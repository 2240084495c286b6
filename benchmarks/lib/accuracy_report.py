"""The figure of docs/accuracy.md, and its tables."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]

MANY_ULP = 8
REGIMES = ("moderate", "wide", "near")
LOWEST, HIGHEST = 1e-2, 1e17  # errors beyond, 0 and inf among them, are drawn at the edges
# Colours of Okabe and Ito, which colour-blind readers tell apart.
COLORS = {"torch": "#D55E00", "ours": "#0072B2"}
NAMES = {"torch": "torch.distributions", "ours": "torch_klloss"}


def draw_figure(points: Sequence[Row], path: Path) -> None:
    """Draw the error against the distance between q and p: every draw, and the share of them that is far off.

    Args:
        points: one row a draw, with the keys "pair", "distance", and the errors "torch" and "ours" in ULP.
        path: where the picture goes.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import PercentFormatter

    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7, 6.5), height_ratios=(3, 1.3), sharex=True, layout="constrained"
    )
    _draw_errors(above, points)
    _draw_shares(below, points)
    pairs = len({point["pair"] for point in points})
    above.set_title(f"float32: {len(points)} draws of {pairs} same-family pairs, compared with 60 digits", fontsize=10)
    below.yaxis.set_major_formatter(PercentFormatter(1))
    for axis in (above, below):
        axis.grid(color="0.92", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_errors(axis: Any, points: Sequence[Row]) -> None:
    distance = [point["distance"] for point in points]
    for name, color in COLORS.items():
        ulp = np.clip([point[name] for point in points], LOWEST, HIGHEST)
        axis.plot(distance, ulp, ".", color=color, markersize=3, alpha=0.35, markeredgewidth=0, rasterized=True)
    for level, name in ((MANY_ULP, f"{MANY_ULP} ULP"), (2**24, "as large as the KL itself")):
        axis.axhline(level, color="0.3", linewidth=0.8, linestyle="--")
        axis.text(0.012, level * 1.6, name, color="0.3", fontsize=8)
    axis.text(2e-4, 3e12, NAMES["torch"], color=COLORS["torch"], fontsize=13, weight="bold")
    axis.text(2e-4, LOWEST * 0.1, NAMES["ours"], color=COLORS["ours"], fontsize=13, weight="bold")
    axis.set(xscale="log", yscale="log", xlim=(5e-8, 2.2), ylim=(LOWEST * 0.03, HIGHEST * 3))
    axis.set_ylabel("error of KL(q ‖ p) in ULP")


def _draw_shares(axis: Any, points: Sequence[Row]) -> None:
    edges = np.geomspace(5e-8, 2.2, 17)
    bins = np.digitize([point["distance"] for point in points], edges)
    filled = np.intersect1d(bins, np.arange(1, len(edges)))
    centres = np.sqrt(edges[1:] * edges[:-1])
    for name, color in COLORS.items():
        is_off = np.array([point[name] for point in points]) > MANY_ULP
        shares = [is_off[bins == k].mean() for k in filled]
        axis.plot(centres[filled - 1], shares, "o-", color=color, markersize=3.5)
    axis.set(ylim=(-0.05, 1.05), xlabel="relative distance between the parameters of q and of p")
    axis.set_ylabel(f"share off by\nmore than {MANY_ULP} ULP")


def write_tables(rows: Sequence[Row], lines: Sequence[str], path: Path) -> None:
    """Put the summary and the tables between their markers in the page, `<!-- name -->` and `<!-- end of name -->`."""
    text = path.read_text()
    parts = {"summary": "\n".join(f"- {line}" for line in lines)}
    for dtype in ("float32", "float64"):
        for title, is_same in (("one family", True), ("two families", False)):
            own = [row for row in rows if row["dtype"] == dtype and row["same_family"] == is_same]
            parts[f"{dtype}, {title}"] = "\n".join(_table(own))
    for name, part in parts.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{path} must have the markers {begin} and {end}.")
        replacement = f"{begin}\n{part}\n{end}"
        text = pattern.sub(lambda _, replacement=replacement: replacement, text)
    path.write_text(text)


def _table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of a table, one a pair: the worst value of each regime, and the worst gradient of all."""
    yield "| pair | moderate | wide | near | negative | gradient | target |"
    yield "|---|---|---|---|---|---|---|"
    for pair in dict.fromkeys(row["pair"] for row in rows):
        own = {row["regime"]: row for row in rows if row["pair"] == pair}
        cells = [both(own[regime], "ulp") if regime in own else "" for regime in REGIMES]
        worst = {
            f"{who}_{what}": _pooled(combine, [row[f"{who}_{what}"] for row in own.values()])
            for who in NAMES
            for what, combine in (("negative", sum), ("gradient", max))
        }
        cells += [both(worst, "negative"), both(worst, "gradient"), next(iter(own.values()))["target"]]
        yield f"| {pair} | " + " | ".join(cells) + " |"


def _pooled(combine: Any, numbers: Sequence[float | None]) -> float | None:
    return None if None in numbers else combine(numbers)


def both(row: Row, key: str) -> str:
    """Return what was measured of torch and of this library."""
    numbers = [_number(row[f"{who}_{key}"]) for who in NAMES]
    return " / ".join(numbers)


def _number(x: float | None) -> str:
    """Return two digits of a number, or one and its power of ten; a dash where torch has no such pair."""
    if x is None:
        return "–"
    if math.isinf(x):
        return "∞"
    if x == round(x) < 1000:
        return f"{x:.0f}"
    if 0.01 <= x < 1000:
        return f"{x:.2g}" if x < 100 else f"{x:.0f}"
    mantissa, exponent = f"{x:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"
