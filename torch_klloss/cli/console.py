"""Input checks and tables that the commands share."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


class InputError(Exception):
    """Raised for what the user can put right; the command line prints its one line and exits with status 2."""


def _count(text: str, at_least: int = 1) -> int:
    if not text.isdecimal() or int(text) < at_least:
        raise argparse.ArgumentTypeError(f"must be an integer of at least {at_least}, got {text!r}")
    return int(text)


def _count_with_error(text: str) -> int:
    return _count(text, at_least=2)  # one sample has no standard error


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to 2**63 - 1, got {text!r}")
    return int(text)


def _strict(value: Any) -> Any:
    """Return `value` with words for the floats that JSON has no number for."""
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_strict(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _print_table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], num_words: int = 0
) -> None:
    """Print a table whose first `num_words` columns are words, and all others numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < num_words else "right", no_wrap=index < num_words)
    for row in rows:
        table.add_row(*row)
    console.print(title, soft_wrap=True)
    console.print(table)


def _console() -> Console:
    """Return a console that prints user text as it is, 100 columns wide where there is no terminal to ask."""
    try:
        from rich.console import Console
    except ImportError as error:
        raise ImportError('Tables need rich: pip install "torch_klloss[cli]".') from error
    return Console(markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else 100)
