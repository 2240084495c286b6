"""Shared code of the benchmarks: arguments, interleaved timing, tables, and JSON with the environment."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import torch_klloss

Row = dict[str, Any]


def argument_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark, described by the docstring of the script."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows to FILE")
    parser.add_argument("--quick", action="store_true", help="a few seconds: fewer cases, measured roughly")
    return parser


def environment() -> dict[str, Any]:
    """Return the versions, threads and processor that the results depend on."""
    return {
        "torch_klloss": torch_klloss.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def interleaved(functions: Mapping[str, Callable[[], object]], rounds: int, calls: int = 1) -> dict[str, list[float]]:
    """Time the functions in turn, one block each a round, so that a drift of the machine affects all alike.

    Args:
        functions: the functions to time, by name.
        rounds: how many blocks each function gets. The order changes from round to round, so that no function always
            runs after the same other one.
        calls: how many calls make a block.

    Returns:
        By name, the seconds that one call took, in every round.
    """
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    collecting = gc.isenabled()
    gc.collect()
    gc.freeze()  # the next collection then passes over what torch has imported
    gc.disable()
    try:
        for _ in range(rounds):
            for name in order.sample(names, len(names)):
                function = functions[name]
                begin = time.perf_counter()
                for _ in range(calls):
                    function()
                seconds[name].append((time.perf_counter() - begin) / calls)
    finally:
        if collecting:
            gc.enable()
    return seconds


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return quartiles(values)[1]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    return low.item(), middle.item(), high.item()


def ratios(seconds: Sequence[float], peer: Sequence[float]) -> list[float]:
    """Return the ratio within every round, in which a slow phase of the machine affects both terms."""
    return [ours / theirs for ours, theirs in zip(seconds, peer, strict=True)]


def show(title: str, rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Print the rows as a table.

    Args:
        title: the title of the table.
        rows: the cells by key; None is left blank.
        columns: for every key shown, "heading|format", with a format of `format`.
    """
    table = Table(title=title, title_justify="left")
    for key, column in columns.items():
        numeric = not isinstance(rows[0][key], str)
        table.add_column(column.partition("|")[0], justify="right" if numeric else "left")
    for row in rows:
        cells = ((row[key], column.partition("|")[2]) for key, column in columns.items())
        table.add_row(*("" if cell is None else format(cell, spec) for cell, spec in cells))
    # Redirected to a file, a terminal's width of 80 would fold the cells.
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def finish(path: Path | None, rows: Sequence[Row], disagreements: Sequence[str]) -> int:
    """Write the rows, print the environment and the disagreements, and return the exit status."""
    if path is not None:
        path.write_text(json.dumps({"environment": environment(), "rows": list(rows)}, indent=1) + "\n")
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    for disagreement in disagreements:
        print(f"DISAGREES: {disagreement}", file=sys.stderr)
    return 1 if disagreements else 0
