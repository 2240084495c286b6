"""How fast are the closed forms, forward and backward, compared with the alternatives?

- "VAE": from (mean, logvar) to a scalar and back, beside `kl_divergence(q, p).sum(-1).mean()` of torch and the formula
  written by hand.
- "Categorical": from the logits of a large vocabulary, gradients to one side or to both, beside `F.kl_div` of two
  `log_softmax` and torch's own; also the peak memory beyond the gradients, in units of one tensor of logits.
- "MultivariateNormal": a batch against one shared p.
- Every same-family pair of `tests/references` that torch has too, elementwise, q and p built beforehand.
- "AutoKL": what a loss adds to a KL that costs next to nothing.

`--compile` compares ours and the peer under `torch.compile`, which takes about 15 seconds a pair. Values and gradients
are checked before anything is timed, and a disagreement gives exit status 1; a target that is missed does not. Times
are processor time, which other programs affect less: medians over rounds in which the peers take turns. A ratio is the
median of the ratios within a round. Everything runs on one thread.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from common import Row, argument_parser, finish, interleaved, median, quartiles, ratios, show

sys.path.insert(0, str(Path(__file__).parents[1]))

from lib.kl_cases import (
    OURS,
    VOCABULARY,
    Case,
    compiled,
    elementwise,
    is_elementwise,
    one_element,
    shared_prior,
    vae,
    vocabulary,
)
from lib.peak_memory import extra_memory
from torch.distributions import Distribution

from tests.references.targets import references

ELEMENTWISE = (128, 32)
VAE_TARGETS = {
    (4096, 512): {"torch": 0.2, "one-liner": 0.4},
    (1024, 128): {"torch": 0.25, "one-liner": 0.5},
    (128, 32): {"one-liner": 1.0},
}
VOCABULARY_TARGETS = {"F.kl_div": 0.45, "torch": 0.25}
COMPILED_VAE_TARGET = {"one-liner": 1.05}
EXTRA_MEMORY_TARGET = 0.15  # of one tensor of logits
COLUMNS = {
    "case": "case",
    "size": "size",
    "peer": "peer",
    "ours_ms": "ours (ms)|.3f",
    "peer_ms": "peer (ms)|.3f",
    "ratio": "ours ÷ peer|.2f",
    "quartiles": "quartiles",
    "target": "target|.3g",
    "met": "met",
}
MEMORY_COLUMNS = {
    "case": "case",
    "size": "size",
    "peer": "whose",
    "extra": "extra memory ÷ logits|.2f",
    "target": "target|.2f",
    "met": "met",
}


def eager_cases(quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Yield the name and the builder of every case in eager mode, so that one case is in memory at a time."""
    for size in [(128, 32)] if quick else VAE_TARGETS:
        yield "VAE", partial(vae, size, VAE_TARGETS[size])
    for side in ("p", "q", "both"):
        size, targets = ((64, 4096), {}) if quick else ((2048, 32768), VOCABULARY_TARGETS)
        yield "Categorical", partial(vocabulary, size, side, targets)
    yield "MultivariateNormal", partial(shared_prior, *((16, 16, {}) if quick else (512, 64, {"torch": 1 / 8})))
    for case in one_element():
        yield "AutoKL", lambda case=case: case
    dtypes = (torch.float32,) if quick else (torch.float32, torch.float64)
    measured = [*filter(is_elementwise, references())][:: 4 if quick else 1]
    for reference, dtype in itertools.product(measured, dtypes):
        yield reference.name, partial(elementwise, reference, ELEMENTWISE, dtype)


def compiled_cases(quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Yield the same for the compiled cases."""
    for size in [(128, 32)] if quick else VAE_TARGETS:
        yield "VAE", lambda size=size: compiled(vae(size, COMPILED_VAE_TARGET))
    for reference in [] if quick else filter(is_elementwise, references()):
        yield reference.name, lambda r=reference: compiled(elementwise(r, ELEMENTWISE, torch.float32, compiled=True))


def processor_seconds(functions: dict[str, Callable[[], object]], rounds: int, calls: int) -> dict[str, list[float]]:
    """Time as `interleaved` does, but by the processor's clock."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}

    def block(name: str) -> None:
        begin = time.process_time()
        for _ in range(calls):
            functions[name]()
        seconds[name].append((time.process_time() - begin) / calls)

    interleaved({name: partial(block, name) for name in functions}, rounds)
    return seconds


def timed(case: Case, seconds: float) -> list[Row]:
    """Return one row for each peer, from at least three rounds and about the given number of seconds."""
    steps = {name: partial(case.step, name) for name in case.losses}
    warm = {name: median(times) for name, times in processor_seconds(steps, 2, 1).items()}
    calls = max(1, round(0.002 / warm[OURS]))
    rounds = max(3, min(100, round(seconds / (calls * sum(warm.values())))))
    times = processor_seconds(steps, rounds, calls)
    rows = []
    for peer in [name for name in case.losses if name != OURS]:
        low, ratio, high = quartiles(ratios(times[OURS], times[peer]))
        goal = case.targets.get(peer)
        rows.append(
            {
                "case": case.name,
                "size": case.size,
                "peer": peer,
                "ours_ms": 1e3 * median(times[OURS]),
                "peer_ms": 1e3 * median(times[peer]),
                "ratio": ratio,
                "quartiles": f"{low:.2f} to {high:.2f}",
                "target": goal,
                "met": _verdict(ratio, goal),
            }
        )
    return rows


def memory(quick: bool) -> list[Row]:
    """Return the peak memory of the Categorical's peers."""
    size = (1024, 16384) if quick else (2048, 32768)  # malloc maps every tensor above 32 MB separately
    measured = (
        [("both", OURS)]
        if quick
        else [*itertools.product(("p", "q"), [OURS]), *itertools.product(["both"], VOCABULARY)]
    )
    rows = []
    for side, name in measured:
        extra = extra_memory(name, size, side)
        goal = EXTRA_MEMORY_TARGET if name == OURS and not quick else None
        rows.append(
            {"case": f"Categorical, gradients to {side}", "size": "x".join(map(str, size)), "peer": name}
            | {"extra": extra, "target": goal, "met": "" if extra is None else _verdict(extra, goal)}
        )
    return rows


def _verdict(measured: float, goal: float | None) -> str:
    return "" if goal is None else "yes" if measured <= goal else "NO"


def main() -> int:
    """Check, time, print; return the exit status."""
    parser = argument_parser(__doc__)
    parser.add_argument("--compile", action="store_true", help="time the compiled functions instead")
    parser.add_argument("--cases", default="", metavar="TEXT", help="only the cases whose name contains TEXT")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[Row] = []
    disagreements: list[str] = []
    if arguments.compile:
        Distribution.set_default_validate_args(False)  # a constructor that validates breaks the graph
    for name, make in (compiled_cases if arguments.compile else eager_cases)(arguments.quick):
        if arguments.cases in name:
            case = make()
            disagreements += case.disagreements()
            rows += timed(case, 0.05 if arguments.quick else 1.5)
    if rows:
        show("forward and backward", rows, COLUMNS)
    if not arguments.compile and arguments.cases in "Categorical":
        rows_of_memory = memory(arguments.quick)
        show("peak memory beyond the gradients", rows_of_memory, MEMORY_COLUMNS)
        rows += rows_of_memory
    if not rows:
        parser.error(f"no case's name contains {arguments.cases!r}.")
    return finish(arguments.json, rows, disagreements)


if __name__ == "__main__":
    raise SystemExit(main())
