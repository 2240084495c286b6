"""How many digits of a KL are right, torch's and this library's?

Every pair of `tests/references` is drawn in its regimes, in float32 and in float64, and compared with mpmath at 60
digits, at the rounded parameters: the value in units in the last place (ULP), the gradient in units of its largest
entry. "moderate" and "wide" draw q and p independently, "near" a relative 1e-2 to 1e-8 apart, which is where training
ends. A target that is missed gives exit status 1.

`--search SECONDS` instead maximises the error from random starts, and keeps the worst inputs in `worst_cases.json`,
which the tests check again. `--write-docs` puts the tables into docs/accuracy.md and draws its figure.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Row, argument_parser, finish, show
from lib.accuracy_report import MANY_ULP, both, draw_figure, write_tables
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions import kl_divergence as torch_kl

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.references.harness import Accuracy, combinations, draw, measure  # noqa: E402
from tests.references.reference import Exact, Reference, differentiate  # noqa: E402
from tests.references.targets import GRADIENT, MATRIX, is_given_by_covariance, is_same_family, references, target  # noqa: E402
from tests.references.worst_cases import DTYPES, Of, WorstCase, load, save, search  # noqa: E402
from torch_klloss import kl_divergence  # noqa: E402

QUANTITIES = ("ulp", "share", "negative", "not_zero", "not_finite", "gradient")
YES = {True: "yes", False: "NO"}
SHARES = ("torch_share", "ours_share", "torch_negative_share", "ours_negative_share")
OF: tuple[Of, ...] = ("value", "gradient")
DOCS = ROOT / "docs" / "accuracy.md"
FIGURE = ROOT / "docs" / "figures" / "accuracy.png"
COLUMNS = {
    "pair": "pair",
    "regime": "regime",
    "ulp": "worst ULP",
    "target": "target",
    "share": "> 8 ULP",
    "negative": "< 0",
    "not_zero": "≠ 0 at q=p",
    "not_finite": "NaN, inf",
    "gradient": "gradient",
    "met": "met",
}
WORST_COLUMNS = {
    "pair": "pair",
    "dtype": "dtype",
    "of": "of",
    "used": "÷ allowed|.2g",
    "ulp": "value (ULP)|.2g",
    "gradient": "gradient|.1g",
}


def remembering(reference: Reference) -> Reference:
    """Return the reference with a cache, so that it is computed once for torch and this library."""
    known: dict[Any, Any] = {}

    def remember(f: Callable[[Exact, Exact], Any]) -> Callable[[Exact, Exact], Any]:
        def remembered(q: Exact, p: Exact) -> Any:
            at = f, *((key, *np.ravel(entries)) for side in (q, p) for key, entries in side.items())
            if at not in known:
                known[at] = f(q, p)
            return known[at]

        return remembered

    def gradient(q: Exact, p: Exact) -> tuple[Exact, ...]:
        derivatives = iter(differentiate(reference.kl, q, p, reference.constants))
        return tuple({key: next(derivatives) for key in side if key not in reference.constants} for side in (q, p))

    return replace(reference, kl=remember(reference.kl), gradient=remember(reference.gradient or gradient))


def by_torch(q: Distribution, p: Distribution) -> Tensor:
    """Return torch's KL; a constant infinity is connected to the graph, with zero gradient."""
    kl = torch_kl(q, p)
    return kl if kl.requires_grad else kl.clone().requires_grad_()


def without_upper_triangle(reference: Reference) -> Reference:
    """Return the pair with its triangular factors cut to their triangle.

    torch's formula has a gradient to the zeros above the triangle. These are no parameters, and do not count as errors.
    """
    if not (issubclass(reference.type_q, MATRIX) and issubclass(reference.type_p, MATRIX)):
        return reference

    def lower(make: Callable[..., Distribution]) -> Callable[..., Distribution]:
        return lambda **given: make(**{key: t.tril() if key == "scale_tril" else t for key, t in given.items()})

    makes = reference.build_q or reference.type_q, reference.build_p or reference.type_p
    return replace(reference, build_q=lower(makes[0]), build_p=lower(makes[1]))


def measured(reference: Reference, regime: str, dtype: torch.dtype, num_draws: int) -> tuple[Row, list[Row]]:
    """Return the row of a pair, a regime and a dtype, and the points that it adds to the figure."""
    reference = remembering(reference)
    ours = measure(reference, regime, dtype, num_draws, kl=kl_divergence)
    try:
        theirs = measure(without_upper_triangle(reference), regime, dtype, num_draws, kl=by_torch)
    except NotImplementedError:
        theirs = None  # torch has no such pair
    q, p = draw(reference, regime, dtype, num_draws)
    goal = target(reference, dtype)
    used = max(goal.used(ours.errors, reference, q, p))
    row: Row = {
        "pair": reference.name,
        "same_family": is_same_family(reference),
        "as_given": not is_given_by_covariance(reference),
        "dtype": str(dtype).removeprefix("torch."),
        "regime": regime,
        "target": str(goal),
        "used": used,
        **_side("ours", ours),
        **_side("torch", theirs),
    }
    row["met"] = used <= 1 and ours.worst_gradient <= GRADIENT[dtype]
    row["met"] &= not (ours.negatives or ours.not_zero or ours.not_finite)
    points: list[Row] = []
    if theirs is not None and q.keys() == p.keys():
        distances = [max(_distance(q[key][i], p[key][i]) for key in q) for i in range(num_draws)]
        keys = ("distance", "ours", "torch")
        draws = zip(distances, ours.errors.ulp, theirs.errors.ulp, strict=True)
        points = [{"pair": reference.name, **dict(zip(keys, numbers, strict=True))} for numbers in draws]
    return row, points


def _side(name: str, accuracy: Accuracy | None) -> Row:
    if accuracy is None:
        return {f"{name}_{key}": None for key in QUANTITIES}
    errors = accuracy.errors
    ulp = [error for error, truth in zip(errors.ulp, errors.reference, strict=True) if truth]  # q and p may round alike
    numbers = (
        accuracy.worst_ulp,
        sum(error > MANY_ULP for error in ulp) / max(1, len(ulp)),
        accuracy.negatives,
        accuracy.not_zero,
        accuracy.not_finite,
        accuracy.worst_gradient,
    )
    by_key = {f"{name}_{key}": number for key, number in zip(QUANTITIES, numbers, strict=True)}
    return by_key | {f"{name}_negative_share": accuracy.negatives / max(1, len(ulp))}


def shown(row: Row) -> Row:
    """Return the row for the table, with torch's and this library's number in one cell."""
    cells = {key: both(row, key) for key in QUANTITIES}
    return {**{key: row[key] for key in ("pair", "regime", "target")}, **cells, "met": YES[row["met"]]}


def _distance(a: Tensor, b: Tensor) -> float:
    """Return the largest relative distance between entries of two parameters, in units of the larger entry."""
    a, b = a.detach().double(), b.detach().double()
    size = torch.maximum(a.abs(), b.abs())
    return torch.where(size > 0, (a - b).abs() / size, 0.0).max().item()


def is_compared(row: Row) -> bool:
    """Return whether a row counts in the comparison: a same-family pair that both have, with all its digits."""
    return row["same_family"] and row["as_given"] and row["torch_ulp"] is not None


def summary(rows: Sequence[Row]) -> list[str]:
    """Return the results of the draws near q = p in words, for either dtype, over the pairs that torch has."""
    lines = []
    for dtype in DTYPES:
        near = [r for r in rows if is_compared(r) and r["regime"] == "near" and r["dtype"] == dtype]
        if near:
            torch_share, our_share, torch_negative, our_negative = (
                sum(row[key] for row in near) / len(near) for key in SHARES
            )
            lines.append(
                f"{dtype}, q near p: {torch_share:.1%} of torch's values and {our_share:.1%} of ours are off by more "
                f"than {MANY_ULP} ULP; {torch_negative:.1%} and {our_negative:.1%} are negative"
            )
    return lines


def search_all(pairs: Sequence[Reference], seconds: float, seed: int) -> list[Row]:
    """Search every pair, dtype, value and gradient for an equal share of the time; keep and return the worst."""
    names = {reference.name for reference in references()}
    known = {(case.pair, case.dtype, case.of): case for case in load() if case.pair in names}
    jobs = [(pair, dtype, of) for pair in pairs for dtype in DTYPES for of in OF]
    for pair, dtype, of in track(jobs, "climbing", console=Console(stderr=True), disable=not sys.stderr.isatty()):
        key = pair.name, dtype, of
        known[key] = search(pair, DTYPES[dtype], of, seconds / len(jobs), seed, known.get(key))
        save(list(known.values()))
    return [_worst_row(known[pair.name, dtype, of]) for pair, dtype, of in jobs]


def _worst_row(case: WorstCase) -> Row:
    return {"pair": case.pair, "dtype": case.dtype, "of": case.of, "used": case.used, "met": case.used <= 1} | {
        "ulp": case.ulp,
        "gradient": case.gradient,
    }


def main() -> int:
    """Measure or search, print and write the results, and return the exit status."""
    parser = argument_parser(__doc__)
    parser.add_argument("--draws", type=int, default=100, metavar="N", help="draws of each pair, regime and dtype")
    parser.add_argument("--pairs", default="", metavar="TEXT", help="only the pairs whose name contains TEXT")
    parser.add_argument(
        "--search", type=float, metavar="SECONDS", help="climb the error for so long, all pairs together"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the search")
    parser.add_argument("--write-docs", action="store_true", help="write the tables and the figure of docs/accuracy.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pairs = [reference for reference in references() if arguments.pairs in reference.name]
    if not pairs:
        parser.error(f"no pair's name contains {arguments.pairs!r}.")
    if arguments.search is not None:
        rows = search_all(pairs, arguments.search, arguments.seed)
        show("worst inputs found: error as a fraction of its limit", rows, WORST_COLUMNS)
        return finish(arguments.json, rows, [])
    num_draws = arguments.draws
    if arguments.quick:
        pairs, num_draws = pairs[::4], 2
    rows, points = [], []
    for combination in track(
        list(combinations(pairs)), "measuring", console=Console(stderr=True), disable=not sys.stderr.isatty()
    ):
        row, own = measured(*combination, num_draws)
        rows.append(row)
        if is_compared(row) and row["dtype"] == "float32" and row["regime"] != "wide":
            points += own
    for dtype in DTYPES:
        own = [shown(row) for row in rows if row["dtype"] == dtype]
        show(f"{dtype}: largest error over the draws, torch / ours", own, COLUMNS)
    lines = summary(rows)
    print(*lines, sep="\n")
    if arguments.write_docs:
        write_tables(rows, lines, DOCS)
        draw_figure(points, FIGURE)
    missed = [f"{row['pair']}, {row['dtype']}, {row['regime']}: a target is missed" for row in rows if not row["met"]]
    return finish(arguments.json, rows, missed)


if __name__ == "__main__":
    raise SystemExit(main())
