"""Input checks and tables that the commands share."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


class InputError(Exception):
    """A mistake in what the user typed; the command line prints its one line and exits with status 2."""


def parse_count(text: str, at_least: int = 1) -> int:
    """Return the count that an option gives."""
    if not text.isdecimal() or int(text) < at_least:
        raise argparse.ArgumentTypeError(f"must be an integer of at least {at_least}, got {text!r}")
    return int(text)


def parse_seed(text: str) -> int:
    """Return the seed that an option gives."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to 2**63 - 1, got {text!r}")
    return int(text)


def parse_seconds(text: str) -> float:
    """Return the positive number of seconds that an option gives."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0 and below a million, got {text!r}")
    return seconds


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise an InputError if the block cannot write to the path."""
    if "\0" in str(path):
        raise InputError(f"cannot write {str(path)!r}: a path has no null character")
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def json_safe(value: Any) -> Any:
    """Return `value` with infinities and NaN, which JSON lacks, as strings."""
    if isinstance(value, dict):
        return {key: json_safe(part) for key, part in value.items()}
    if isinstance(value, list):
        return [json_safe(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def print_table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], num_words: int = 0
) -> None:
    """Print a table whose first `num_words` columns are words and the others numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < num_words else "right", no_wrap=index < num_words)
    for row in rows:
        table.add_row(*row)
    console.print(title, soft_wrap=True)
    console.print(table)


def new_console() -> Console:
    """Return a console that prints text without markup, 100 columns wide if the output is not a terminal."""
    try:
        from rich.console import Console
    except ImportError as error:
        raise ImportError('Tables need rich: pip install "torch_klloss[cli]".') from error
    return Console(markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else 100)
