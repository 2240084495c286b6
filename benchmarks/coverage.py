"""For how many of all ordered pairs of torch's distributions is the KL right?

The examples of `torch_klloss.cli.example_pairs` (every concrete class of `torch.distributions`, some with several
contents and event shapes) are paired in every order if they share an event shape, with batch shapes that broadcast.
Right is

- a finite KL within 1e-6 relative or, where it was sampled, within 5 of its own standard errors, which must be at most
  5 % of the value or 0.02 nats;
- `inf` where p lacks q's support or a moment diverges;
- a ValueError that gives the reason, if one distribution is discrete and the other continuous.

The truth is in `coverage_truth.json`; `--write-truth` computes it again, by sums and integrals that do not use this
library. Peers are torch's and, if it is installed, Pyro's `kl_divergence`. Pairs that this library gets wrong are
listed with the reason, and give exit status 1.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec

import torch
from common import Row, argument_parser, finish, median, show
from lib.coverage_table import load_truth, write_truth
from lib.coverage_truth import Truth
from rich.console import Console
from rich.progress import track
from torch.distributions import Distribution
from torch.distributions import kl_divergence as torch_kl

from torch_klloss import AutoKL, KLEstimate
from torch_klloss.cli.example_pairs import Example, all_examples, same_shape
from torch_klloss.methods import MonteCarlo, Quadrature

BATCH_OF_Q, BATCH_OF_P = (3,), (2, 3)
OURS = AutoKL(fallback=[Quadrature(), MonteCarlo(4096)])
RIGHT, REFUSED, WRONG = "right", "not implemented", "wrong"
PEERS = ("torch", "Pyro", "ours")
KINDS = ("finite", "infinite", "undefined")
COLUMNS = {"kind": "truth", "pairs": "pairs", "torch": "torch", "Pyro": "Pyro", "ours": "ours"}
LEFT = {"q": "q", "p": "p", "kind": "truth", "truth": "nats|.6g", "ours_method": "by", "ours_reason": "what came"}
Answer = tuple[str, str, KLEstimate | None]  # right, refused or wrong; the reason; the estimate


def by_ours(q: Distribution, p: Distribution) -> KLEstimate:
    """Return this library's KL."""
    return OURS.estimate(q, p, generator=torch.Generator().manual_seed(0))


def by_torch(q: Distribution, p: Distribution) -> KLEstimate:
    """Return torch's KL, with all rules registered so far: Pyro's too, once it is imported."""
    return KLEstimate(torch_kl(q, p), exact=True, method="torch")


def judged(kl: Callable[[Distribution, Distribution], KLEstimate], q: Example, p: Example, truth: Truth) -> Answer:
    """Return the outcome of a pair, and the reason if it is not right."""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            estimate = kl(q.q.expand(BATCH_OF_Q), p.p.expand(BATCH_OF_P))
    except NotImplementedError as error:
        return REFUSED, _one_line(error), None
    except Exception as error:  # any exception is the library's answer
        says_why = isinstance(error, ValueError) and "discrete" in str(error)
        is_right = truth.kind == "undefined" and says_why
        return (RIGHT, "", None) if is_right else (WRONG, f"{type(error).__name__}: {_one_line(error)}", None)
    complaint = _complaint(estimate, truth)
    return WRONG if complaint else RIGHT, complaint, estimate


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _complaint(estimate: KLEstimate, truth: Truth) -> str:
    """Return what is wrong with an estimate, empty if it is right."""
    value = estimate.value
    if truth.kind == "undefined":
        return f"a number, {value.flatten()[0].item():.4g}"
    if value.shape != BATCH_OF_P:
        return f"shape {tuple(value.shape)}"
    if value.isnan().any():
        return "NaN"
    if truth.kind == "infinite":
        return "" if (value == torch.inf).all() else f"{_worst(value, truth):.6g}"
    gap = (value - truth.value).abs()
    is_close = gap <= 1e-6 * abs(truth.value) + truth.error
    if estimate.std_error is None:
        return "" if is_close.all() else f"{_worst(value, truth):.9g}, off by {gap.max():.1e}"
    noise = estimate.std_error
    if (noise > max(0.05 * abs(truth.value), 0.02)).any():
        return f"{_worst(value, truth):.6g}, standard error {noise.max():.2g}"
    is_right = is_close | (gap <= 5 * noise)
    return "" if is_right.all() else f"{_worst(value, truth):.6g}, {(gap / noise).max():.1f} standard errors off"


def _worst(value: torch.Tensor, truth: Truth) -> float:
    """Return the element that is the farthest from the truth."""
    target = truth.value if truth.kind == "finite" else 0.0
    return value.flatten()[(value - target).abs().argmax()].item()


def row_of(q: Example, p: Example, truth: Truth) -> Row:
    """Return the row of a pair: the truth, torch's answer, and ours with its route and its time."""
    begin = time.perf_counter()
    ours, reason, estimate = judged(by_ours, q, p, truth)
    seconds = time.perf_counter() - begin
    status, torch_reason, _ = judged(by_torch, q, p, truth)
    sampled = estimate is not None and estimate.std_error is not None
    return {
        "q": q.name,
        "p": p.name,
        "event_shape": list(q.q.event_shape),
        "kind": truth.kind,
        "truth": truth.value if truth.kind == "finite" else None,
        "reason": truth.reason,
        "ours": ours,
        "ours_reason": reason,
        "ours_method": "" if estimate is None else estimate.method,
        "ours_sampled": sampled,
        "ours_seconds": seconds,
        "torch": status,
        "torch_reason": torch_reason,
    }


def counts(rows: Sequence[Row], kind: str) -> Row:
    """Return how many pairs of a kind are right / not implemented / wrong, by whom."""
    own = [row for row in rows if row["kind"] == kind]
    found: Row = {"kind": kind, "pairs": len(own)}
    for who in PEERS:
        counted = Counter(row.get(who) for row in own)
        found[who] = " / ".join(str(counted[what]) for what in (RIGHT, REFUSED, WRONG))
    return found


def by_route(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield, for each route of ours, how many pairs it took, how many of them are right, and the median time."""
    answered = [row for row in rows if row["ours_method"]]
    for method in sorted({row["ours_method"] for row in answered}):
        own = [row for row in answered if row["ours_method"] == method]
        right = [row for row in own if row["ours"] == RIGHT]
        yield (
            {"route": method, "pairs": len(own), "right": len(right)}
            | {kind: sum(row["kind"] == kind for row in right) for kind in KINDS[:2]}
            | {"milliseconds": 1e3 * median([row["ours_seconds"] for row in own])}
        )


def main() -> int:
    """Measure every pair, print, and return the exit status."""
    parser = argument_parser(__doc__)
    parser.add_argument("--write-truth", action="store_true", help="compute coverage_truth.json again")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    examples = all_examples()
    if arguments.write_truth:
        write_truth(examples)
        return 0
    truths = load_truth(examples)
    pairs = list(same_shape(examples))[:: 7 if arguments.quick else 1]
    progress = {"console": Console(stderr=True), "disable": not sys.stderr.isatty()}
    rows = [row_of(q, p, truths[q.name, p.name]) for q, p in track(pairs, "ours and torch's", **progress)]
    if find_spec("pyro") is not None:
        import pyro.distributions  # noqa: F401  registers Pyro's rules

        for row, (q, p) in zip(rows, track(pairs, "Pyro's", **progress), strict=True):
            row["Pyro"], row["Pyro_reason"], _ = judged(by_torch, q, p, truths[q.name, p.name])
    show(f"{len(rows)} ordered pairs: right / not implemented / wrong", [counts(rows, k) for k in KINDS], COLUMNS)
    routes = {key: key for key in ("route", "pairs", "right", "finite", "infinite")} | {
        "milliseconds": "ms (median)|.2f"
    }
    show("ours, by route", list(by_route(rows)), routes)
    left = [row for row in rows if row["ours"] != RIGHT]
    if left:
        show("pairs that are not right", left, LEFT)
    exact = sum(row["ours"] == RIGHT and row["kind"] == "finite" and not row["ours_sampled"] for row in rows)
    print(f"{exact} of {sum(row['kind'] == 'finite' for row in rows)} finite ones are right without sampling")
    return finish(arguments.json, rows, [f"KL({row['q']}‖{row['p']}): {row['ours_reason']}" for row in left])


if __name__ == "__main__":
    raise SystemExit(main())
