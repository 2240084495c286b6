"""`python -m torch_klloss audit`: the audit of a loss from a file."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

from torch_klloss.auditing import AuditReport, audit
from torch_klloss.auditing.experiment.calling import described
from torch_klloss.auditing.experiment.containment import OutOfTimeError, limited, preserved_state
from torch_klloss.auditing.experiment.signatures import SignatureName
from torch_klloss.cli.console import InputError, json_safe, parse_count, parse_seconds, parse_seed, writing
from torch_klloss.cli.loading import LoadError, loaded


def add_command(commands: Any) -> None:
    """Add the command `audit` to the parser."""
    about = "What is wrong with a hand-written KL? Imports and runs its file, calls the loss, explains what it returns."
    statuses = (
        "Exit status: 0 the loss is right, 1 it is wrong, 2 it could not be run or judged (the reason on stderr)."
    )
    parser = commands.add_parser("audit", help=about, description=about, epilog=statuses)
    parser.add_argument(
        "target",
        nargs="?",
        metavar="FILE.py:FUNCTION",
        help="the loss, or package.module:FUNCTION; for FUNCTION also Class or Class.method, constructed without "
        "arguments. The file is imported and run, as Python would run it: audit only files that you trust",
    )
    parser.add_argument(
        "--signature",
        choices=get_args(SignatureName),
        default="auto",
        metavar="NAME",
        help=f"arguments of the loss: {', '.join(get_args(SignatureName))}; auto goes by the names of its parameters",
    )
    parser.add_argument(
        "--adapter",
        metavar="[FILE.py:]FUNCTION",
        help="a function adapter(fn, q, p) that calls the loss with what it takes of two torch Normals q and p, as "
        "`return fn(q.loc, q.scale, p.loc, p.scale)`; in place of --signature",
    )
    parser.add_argument(
        "--timeout",
        type=parse_seconds,
        default=60.0,
        metavar="SECONDS",
        help="after which it ends with status 2 (60)",
    )
    parser.add_argument(
        "--seed", type=parse_seed, default=0, metavar="S", help="of the probes and of the loss's draws (0)"
    )
    budget = inspect.signature(audit).parameters["budget"].default
    calls = f"of a loss that draws its own samples, in all ({budget})"
    parser.add_argument("--budget", type=parse_count, default=budget, metavar="N", help=f"calls {calls}")
    parser.add_argument("--no-gradient", action="store_true", help="judge the value alone")
    parser.add_argument(
        "--num-dims", type=parse_count, metavar="N", help="dimensions of the arguments (2, or what runs)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw what it returned against the KL into FILE")
    parser.add_argument("--write-docs", type=Path, metavar="FILE", help="write the catalogue of mistakes, as Markdown")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Audit the loss, print the report, and return the exit status."""
    if (args.target is None) == (args.write_docs is None):
        raise InputError("audit takes a loss, FILE.py:FUNCTION, or --write-docs FILE, and not both")
    if args.write_docs is not None:
        from torch_klloss.cli.mistakes_page import markdown

        with writing(args.write_docs):
            args.write_docs.write_text(markdown(), encoding="utf-8")
        return 0
    print(f"imports and runs {args.target.rpartition(':')[0] or args.target}", file=sys.stderr)
    report = _report(args)
    if args.json:
        print(json.dumps(json_safe(report.to_dict()), indent=2, allow_nan=False))
    if report.verdict == "not judged":
        raise InputError(str(report))
    if not args.json:
        print(report)
    if args.figure is not None:
        _save_points(report, args.figure)
    return 0 if report.ok else 1


def _report(args: argparse.Namespace) -> AuditReport:
    """Load the loss, and the adapter if there is one, and audit it within the limit of time.

    Raises:
        InputError: if it cannot be loaded, or the time ends before.
    """
    try:
        with preserved_state(), limited(args.timeout), loaded(args.target) as fn, _adapter(args) as adapter:
            return audit(
                fn,
                signature=adapter or args.signature,
                seed=args.seed,
                budget=args.budget,
                gradient=not args.no_gradient,
                num_dims=args.num_dims,
            )
    except LoadError as error:
        raise InputError(str(error)) from error
    except OutOfTimeError as error:
        raise InputError(f"{args.target} was not judged within {args.timeout:g} s: --timeout gives it more") from error
    except Exception as error:  # a fault of the audit must not leave with the status of a wrong loss
        raise InputError(f"the audit itself raises {described(error)}") from error


@contextlib.contextmanager
def _adapter(args: argparse.Namespace) -> Iterator[Callable[..., Any] | None]:
    """Give the function adapter(fn, q, p) that `--adapter` names, of the loss's own file where it names no other."""
    if args.adapter is None:
        yield None
        return
    source = args.target.rpartition(":")[0]
    with loaded(args.adapter if ":" in args.adapter else f"{source}:{args.adapter}") as adapter:
        yield adapter


def _save_points(report: AuditReport, path: Path) -> None:
    if not report.points:
        print("no figure: no value could be compared with the KL", file=sys.stderr)
        return
    try:
        with writing(path):
            report.figure().savefig(path)
    except ImportError as error:  # no matplotlib, which changes no verdict
        print(f"no figure: {error}", file=sys.stderr)
    except ValueError as error:  # no format of that suffix
        raise InputError(f"cannot draw {path}: {error}") from error
