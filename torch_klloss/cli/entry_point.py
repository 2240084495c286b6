"""The command line: `python -m torch_klloss COMMAND`. A command is one function in `_COMMANDS`.

Tables need rich and figures matplotlib, `pip install "torch_klloss[cli]"`; `--json` and `audit` need neither.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch.distributions import Distribution

from torch_klloss import __version__
from torch_klloss.auditing import AuditReport, audit
from torch_klloss.auditing.experiment.signatures import SignatureName
from torch_klloss.cli.compare import Row, compare_methods
from torch_klloss.cli.demo import EXPECTED_FACTOR, QuestionCurves, question_curves
from torch_klloss.cli.expressions import parse_distribution
from torch_klloss.cli.loading import LoadError, loaded
from torch_klloss.distributions.simplify import check_common_measure, check_pair
from torch_klloss.losses import AutoKL

if TYPE_CHECKING:
    from rich.console import Console

    from torch_klloss.cli.pairs import Pair


class InputError(Exception):
    """Raised for what the user can put right; the command line prints its one line and exits with status 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0 where it did what was asked, 2 for bad input.

    1 means an optional package that is missing. Of `audit`, which is made for scripts, 0 means that the loss is right,
    1 that it is wrong, and 2 that no answer was found, for whatever reason.

    Args:
        argv: the arguments, by default those of the process.

    Raises:
        SystemExit: by argparse, with status 2, for options that do not exist or do not parse.

    Example:
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
    try:
        status: int | None = args.run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"error: {error} ({error.__cause__})", file=sys.stderr)
        return 1
    return status or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torch_klloss", description="KL divergence losses for PyTorch: see how they get their numbers."
    )
    parser.add_argument("--version", action="version", version=f"torch_klloss {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for add in _COMMANDS:
        add(commands)
    return parser


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


# --- demo -------------------------------------------------------------------------------------------------------------


def _add_demo(commands: Any) -> None:
    about = "The question that the library began with: a figure, a table, and the answer."
    parser = commands.add_parser("demo", help=about, description=about)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where question.png goes")
    samples = {"type": _count_with_error, "default": 100, "metavar": "N"}
    parser.add_argument("--num-samples", **samples, help="samples for each mean of q, at least 2 (100)")
    parser.add_argument("--seed", type=_seed, default=0, metavar="S", help="of the samples (0)")
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    from torch_klloss.plots import question_figure

    console = _console()
    curves = question_curves(num_samples=args.num_samples, seed=args.seed)
    path = args.out / "question.png"
    figure = question_figure(curves)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
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
    _print_table(console, title, columns, rows)
    low, high = curves.sampled.interval(0.95)
    covered = ((low <= curves.closed_form) & (curves.closed_form <= high)).sum().item()
    console.print(
        "Drawing from q is the weighting by q already: the mean of q·(log q - log p) over samples of q weights twice, "
        f"and comes to {curves.factor:.3f} ± {curves.factor_std_error:.3f} of the KL, where E[q(x)] = 1/(2√π) = "
        f"{EXPECTED_FACTOR:.4f} is expected. The plain mean of (log q - log p) over the same samples is the estimate, "
        f"with 95 % intervals that cover the closed form at {covered} of {len(curves.mu)} μ; the weight q(x) dx "
        "belongs to the points of a grid."
    )


# --- compare ----------------------------------------------------------------------------------------------------------


def _add_compare(commands: Any) -> None:
    about = "Every method on one pair of distributions: value, standard error, gap to the exact value, time."
    parser = commands.add_parser("compare", help=about, description=about)
    parser.add_argument("q", help='the distribution that is sampled, such as "Normal(1, 0.5)"')
    parser.add_argument("p", help='the other one, such as "StudentT(4)"')
    parser.add_argument("--num-samples", type=_count, default=1000, metavar="N", help="samples of monte_carlo (1000)")
    parser.add_argument("--seed", type=_seed, default=0, metavar="S", help="of the samples (0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(run=_compare)


def _compare(args: argparse.Namespace) -> None:
    q, p = _read("q", args.q), _read("p", args.p)
    try:
        batch_shape = check_pair(q, p)
        check_common_measure(q, p)
    except ValueError as error:
        raise InputError(str(error)) from error
    if batch_shape.numel() == 0:
        raise InputError(f"q and p must have at least one batch element, got batch shape {tuple(batch_shape)}.")
    console = None if args.json else _console()
    rows = compare_methods(q, p, args.num_samples, args.seed)
    report = {
        "q": args.q,
        "p": args.p,
        "batch_shape": list(batch_shape),
        "num_samples": args.num_samples,
        "seed": args.seed,
        "unit": "nats",
        "reduction": "mean over batch elements",
        "auto_route": AutoKL().route(q, p),
        "rows": [asdict(row) for row in rows],
    }
    if console is None:
        print(json.dumps(_strict(report), indent=2, allow_nan=False))
    else:
        _print_comparison(console, report, rows)


def _read(which: str, text: str) -> Distribution:
    try:
        return parse_distribution(text)
    except ValueError as error:
        raise InputError(f"{which}: {error}") from error


def _strict(value: Any) -> Any:
    """Return `value` with words for the floats that JSON has no number for."""
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_strict(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _print_comparison(console: Console, report: dict[str, Any], rows: Sequence[Row]) -> None:
    over = f", mean over the batch shape {tuple(report['batch_shape'])}" if report["batch_shape"] else ""
    title = f"KL(q‖p) in nats{over}\n  q = {report['q']}\n  p = {report['p']}"
    columns = ("method", "gradient", "value", "std error", "gap", "z", "µs")
    _print_table(console, title, columns, [_cells(row) for row in rows], num_words=2)
    console.print(
        f"AutoKL takes {report['auto_route']}. Each monte_carlo row draws {report['num_samples']} samples from seed "
        f"{report['seed']}; its option changes the gradient, not the value.\n"
        "gap: to the exact value; z: the gap in standard errors; µs: median time of a call in microseconds, one thread."
    )
    refusals = [row.reason for row in rows if row.reason is not None]
    if refusals:
        console.print("Rows with - do not take this pair:")
    for reason in refusals:
        console.print(f"  {re.split(r'[.;] ', reason)[0].rstrip('.')}.", soft_wrap=True)


def _cells(row: Row) -> list[str]:
    words = [row.method, row.gradient or ""]
    if row.reason is not None:
        return [*words, "-", "-", "-", "-", "-"]
    numbers = (row.value, row.std_error, row.gap, row.z, row.microseconds)
    formats = ("#.6g", "#.3g", "#.3g", ".2f", ".0f")
    return words + ["" if n is None else format(n, spec) for n, spec in zip(numbers, formats, strict=True)]


# --- pairs ------------------------------------------------------------------------------------------------------------


def _add_pairs(commands: Any) -> None:
    about = "Every ordered pair of torch's distributions, and the route that its KL takes."
    parser = commands.add_parser("pairs", help=about, description=about)
    parser.add_argument("--type", metavar="NAME", help="only the pairs in which q or p is a NAME, such as Gamma")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--write-docs", type=Path, metavar="FILE", help="write the table into FILE, as Markdown")
    parser.set_defaults(run=_pairs)


def _pairs(args: argparse.Namespace) -> None:
    from torch_klloss.cli.pairs import ROUTES, routes, write_docs

    if args.type is not None and args.write_docs is not None:
        raise InputError("--write-docs writes the whole table: leave out --type")
    console = None if args.json else _console()
    try:
        pairs = routes(type_name=args.type)
    except ValueError as error:
        raise InputError(str(error)) from error
    if args.write_docs is not None:
        try:
            write_docs(pairs, args.write_docs)
        except OSError as error:
            raise InputError(f"cannot write {args.write_docs}: {error.strerror}") from error
    if console is None:
        report = {
            "fallback": "quadrature, else monte_carlo",
            "routes": ROUTES,
            "rows": [asdict(pair) for pair in pairs],
        }
        print(json.dumps(report, indent=2))
    else:
        _print_pairs(console, pairs, args.type)


def _print_pairs(console: Console, pairs: Sequence[Pair], type_name: str | None) -> None:
    from rich import box
    from rich.table import Table

    from torch_klloss.cli.pairs import ROUTES, grouped

    console.print("KL(q‖p) by AutoKL(fallback=[Quadrature(), MonteCarlo()]): the route of every pair of examples")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("q", max_width=36, overflow="fold")
    table.add_column("route", no_wrap=True)
    table.add_column("p", overflow="fold")
    for q, found in grouped(pairs).items():
        shown = {route: names for route, names in found.items() if type_name is None or route != "undefined"}
        for first, (route, names) in enumerate(shown.items()):
            table.add_row("" if first else q, route, ", ".join(names))
    console.print(table)
    for route, how in ROUTES.items():
        console.print(f"{sum(pair.route == route for pair in pairs):5} {route}: {how}")


# --- audit ------------------------------------------------------------------------------------------------------------


def _add_audit(commands: Any) -> None:
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
        help=f"what the loss takes: {', '.join(get_args(SignatureName))}; auto tells it from the parameters' names",
    )
    parser.add_argument("--seed", type=_seed, default=0, metavar="S", help="of the probes and of the loss's draws (0)")
    budget = inspect.signature(audit).parameters["budget"].default
    calls = f"of a loss that draws its own samples, in all ({budget})"
    parser.add_argument("--budget", type=_count, default=budget, metavar="N", help=f"calls {calls}")
    parser.add_argument("--no-gradient", action="store_true", help="judge the value alone")
    parser.add_argument("--num-dims", type=_count, metavar="N", help="dimensions of the arguments (2, or what runs)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw what it returned against the KL into FILE")
    parser.add_argument("--write-docs", type=Path, metavar="FILE", help="write the catalogue of mistakes, as Markdown")
    parser.set_defaults(run=_audit)


def _audit(args: argparse.Namespace) -> int:
    if (args.target is None) == (args.write_docs is None):
        raise InputError("audit takes a loss, FILE.py:FUNCTION, or --write-docs FILE, and not both")
    if args.write_docs is not None:
        return _write_mistakes(args.write_docs)
    print(f"imports and runs {args.target.rpartition(':')[0] or args.target}", file=sys.stderr)
    try:
        with loaded(args.target) as fn:
            report = audit(
                fn,
                signature=args.signature,
                seed=args.seed,
                budget=args.budget,
                gradient=not args.no_gradient,
                num_dims=args.num_dims,
            )
    except LoadError as error:
        raise InputError(str(error)) from error
    except Exception:  # a fault of the audit must not leave with the status of a wrong loss
        traceback.print_exc()
        return 2
    if args.json:
        print(json.dumps(_strict(report.to_dict()), indent=2, allow_nan=False))
    if report.verdict == "not judged":
        raise InputError(str(report))
    if not args.json:
        print(report)
    if args.figure is not None:
        _save_points(report, args.figure)
    return 0 if report.ok else 1


def _save_points(report: AuditReport, path: Path) -> None:
    if not report.points:
        print("no figure: no value could be compared with the KL", file=sys.stderr)
        return
    try:
        report.figure().savefig(path)
    except (ImportError, ValueError) as error:  # no matplotlib, or no format of that suffix
        raise InputError(f"cannot draw {path}: {error}") from error
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def _write_mistakes(path: Path) -> int:
    from torch_klloss.cli.mistakes_page import write_docs

    try:
        write_docs(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    return 0


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


_COMMANDS = (_add_demo, _add_compare, _add_pairs, _add_audit)
