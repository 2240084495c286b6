"""The command `compare`: every method on one pair of distributions."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch.distributions import Distribution
from torch.utils.benchmark import Timer

from torch_klloss.cli.console import InputError, json_safe, new_console, parse_count, parse_seed, print_table
from torch_klloss.cli.expressions import first_line, parse_distribution
from torch_klloss.distributions.checks import check_common_measure, check_pair
from torch_klloss.distributions.tensors import device_of
from torch_klloss.estimate import KLEstimate
from torch_klloss.losses import AutoKL, KLLoss
from torch_klloss.methods import ClosedForm, Enumeration, Method, MonteCarlo, NotCertifiedError, Quadrature
from torch_klloss.methods.base import as_method
from torch_klloss.methods.monte_carlo.method import Gradient
from torch_klloss.methods.monte_carlo.options import HELD_OUT
from torch_klloss.rng import private_rng

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Row:
    """The result of one method on the pair; None where an entry does not apply.

    Attributes:
        method: the name of the method.
        gradient: the gradient option of a sampling method.
        value: the KL in nats, the mean over batch elements.
        std_error: the standard error of `value`.
        gap: `value` less the exact value.
        z: `gap` in standard errors.
        microseconds: the median time of a call.
        reason: why the method does not take the pair.
    """

    method: str
    gradient: str | None = None
    value: float | None = None
    std_error: float | None = None
    gap: float | None = None
    z: float | None = None
    microseconds: float | None = None
    reason: str | None = None


def compare_methods(q: Distribution, p: Distribution, num_samples: int = 1000, seed: int = 0) -> list[Row]:
    """Compute KL(q‖p) by every method, in nats: the mean over batch elements, with its error and its time.

    Every sampling method starts from the same seed; the global random stream does not change.

    Args:
        q: the distribution that the expectation is under.
        p: the other distribution; all dimensions of the broadcast batch shape count as examples.
        num_samples: how many samples the sampling methods draw.
        seed: the seed of the samples.

    Raises:
        ValueError: if the shapes do not fit, or q is discrete and p continuous, or the reverse.
        TypeError: if q or p is not a distribution.

    Examples:
        >>> from torch.distributions import Normal
        >>> from torch_klloss.cli.compare import compare_methods
        >>> rows = compare_methods(Normal(1.0, 1.0), Normal(0.0, 1.0))
        >>> rows[0].method, rows[0].value, rows[0].gap
        ('closed_form', 0.5, 0.0)
        >>> sampled = [row for row in rows if row.method == "monte_carlo"]
        >>> all(abs(row.z) < 6 for row in sampled)
        True
    """
    batch_dims = len(check_pair(q, p))
    rows: list[Row] = []
    exact: float | None = None
    for method, gradient in _methods(num_samples):
        loss = KLLoss(method, reduction="mean", batch_dims=batch_dims)
        name = as_method(method).name
        try:
            estimate = loss.reduce(loss.estimate(q, p, generator=torch.Generator().manual_seed(seed)))
        except (NotImplementedError, NotCertifiedError) as refusal:
            rows.append(Row(name, gradient, reason=str(refusal)))
            continue
        if exact is None and estimate.std_error is None:
            exact = estimate.value.item()
        rows.append(_row(name, gradient, estimate, exact, _microseconds(loss, q, p, seed)))
    return rows


def _methods(num_samples: int) -> Iterator[tuple[Method, str | None]]:
    """Yield every method, with its gradient option where it has one."""
    yield ClosedForm(), None
    yield Enumeration(), None
    yield Quadrature(), None
    for gradient in get_args(Gradient):
        if gradient != "mixed" or num_samples >= HELD_OUT:
            yield MonteCarlo(num_samples, gradient=gradient), gradient


def _row(name: str, gradient: str | None, estimate: KLEstimate, exact: float | None, microseconds: float) -> Row:
    value, gap, z = estimate.value.item(), None, None
    std_error = None if estimate.std_error is None else estimate.std_error.item()
    if exact is not None:
        gap = 0.0 if value == exact else value - exact  # inf - inf would be NaN
    if gap is not None and std_error is not None:
        # Samples that all agree have no standard error, but still a rounding error.
        noise = max(std_error, torch.finfo(estimate.value.dtype).eps * abs(value))
        z = gap / noise if noise else 0.0
    return Row(name, gradient, value, std_error, gap, z, microseconds)


def _microseconds(loss: KLLoss, q: Distribution, p: Distribution, seed: int) -> float:
    timer = Timer("loss.estimate(q, p)", globals={"loss": loss, "q": q, "p": p}, num_threads=1)
    with private_rng(seed, device_of(q)):
        return timer.blocked_autorange(min_run_time=0.1).median * 1e6


def add_command(commands: Any) -> None:
    """Add the command `compare` to the parser."""
    about = "Every method on one pair of distributions: value, standard error, gap to the exact value, time."
    parser = commands.add_parser("compare", help=about, description=about)
    parser.add_argument("q", help='the distribution that is sampled, such as "Normal(1, 0.5)"')
    parser.add_argument("p", help='the other distribution, such as "StudentT(4)"')
    parser.add_argument(
        "--num-samples", type=parse_count, default=1000, metavar="N", help="samples of monte_carlo (1000)"
    )
    parser.add_argument("--seed", type=parse_seed, default=0, metavar="S", help="of the samples (0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print every method on the pair."""
    q, p = _read("q", args.q), _read("p", args.p)
    try:
        batch_shape = check_pair(q, p)
        check_common_measure(q, p)
    except ValueError as error:
        raise InputError(str(error)) from error
    if batch_shape.numel() == 0:
        raise InputError(f"q and p must have at least one batch element, got batch shape {tuple(batch_shape)}.")
    console = None if args.json else new_console()
    rows = _compared(q, p, args)
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
        print(json.dumps(json_safe(report), indent=2, allow_nan=False))
    else:
        _print_comparison(console, report, rows)


def _compared(q: Distribution, p: Distribution, args: argparse.Namespace) -> list[Row]:
    try:
        return compare_methods(q, p, args.num_samples, args.seed)
    except Exception as error:  # parameters that a constructor lets through, and a density or a draw does not
        raise InputError(f"KL(q‖p) cannot be computed: {type(error).__name__}: {first_line(error)}") from error


def _read(which: str, text: str) -> Distribution:
    try:
        return parse_distribution(text)
    except ValueError as error:
        raise InputError(f"{which}: {error}") from error


def _print_comparison(console: Console, report: dict[str, Any], rows: Sequence[Row]) -> None:
    over = f", mean over the batch shape {tuple(report['batch_shape'])}" if report["batch_shape"] else ""
    title = f"KL(q‖p) in nats{over}\n  q = {report['q']}\n  p = {report['p']}"
    columns = ("method", "gradient", "value", "std error", "gap", "z", "µs")
    print_table(console, title, columns, [_cells(row) for row in rows], num_words=2)
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
