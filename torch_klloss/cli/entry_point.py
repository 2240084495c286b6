"""The command line: `torch-klloss COMMAND`, which is `python -m torch_klloss COMMAND`.

Each command is one module with an entry in `COMMANDS`. Tables need rich and figures matplotlib, which
`pip install "torch_klloss[cli]"` brings; `--json` and `audit` need neither.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch_klloss import __version__
from torch_klloss.cli import audit, compare, demo, pairs
from torch_klloss.cli.console import InputError
from torch_klloss.cli.guard import guarded

COMMANDS = (demo.add_command, compare.add_command, pairs.add_command, audit.add_command)


def main(argv: Sequence[str] | None = None, *, own_process: bool = False) -> int:
    """Run a command and return its exit status: 0 for success, 1 for a missing optional package, 2 for bad input.

    The status of `audit` is its answer: 0 means that the loss is right, 1 that it is wrong, and 2 that it could not be
    judged, for whatever reason.

    Args:
        argv: the arguments, by default the process's.
        own_process: whether a command that runs a user's file does so in a process of its own.

    Raises:
        SystemExit: by argparse, with status 2, for options that do not exist or do not parse.

    Examples:
        >>> from torch_klloss.cli.entry_point import main
        >>> main(["--version"])
        Traceback (most recent call last):
        SystemExit: 0
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.run is None:
        parser.print_help()
        return 0
    if own_process and getattr(args, "target", None) is not None:
        return guarded(lambda: _status_of(args), args.timeout)
    return _status_of(args)


def _status_of(args: argparse.Namespace) -> int:
    try:
        status: int | None = args.run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"error: {error} ({error.__cause__})", file=sys.stderr)
        return 1
    return status or 0


def _program() -> str:
    """Return the name that the user has called: that of the console script, or of the module."""
    return "torch-klloss" if Path(sys.argv[0]).stem == "torch-klloss" else "python -m torch_klloss"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_program(), description="KL divergence losses for PyTorch: see how they get their numbers."
    )
    parser.add_argument("--version", action="version", version=f"torch_klloss {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for add_command in COMMANDS:
        add_command(commands)
    return parser
