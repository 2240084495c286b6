"""What does a step cost on an accelerator, beside torch's own?

    python benchmarks/devices.py                  # on a device that the CPU pretends to be: what is launched there
    python benchmarks/devices.py --device cuda    # or mps: the same cases, timed on a real one

One step is the KL, or the loss, of distributions that are built in it, forward and backward in float32. On the
pretended device of `tests/devices` three things are counted: kernels, waits of the host for the device, and the bytes
in use at most, in units of the tensors that the step is given. "without float64" says where a KL is computed if the
device has none: on the device, or of copies on the CPU. Blank is what torch has nothing for. On a real device the table
has times in their place; the peers take turns.

Every result is compared with the CPU's first; a disagreement gives exit status 1. `--write-docs` puts the list of the
families that need float64 into docs/devices.md.
"""

from __future__ import annotations

import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from common import Row, argument_parser, finish, interleaved, median, ratios, show
from torch import Tensor
from torch.distributions import Distribution

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.devices import cases, comparison  # noqa: E402
from tests.devices.cases import ALIKE  # noqa: E402
from tests.devices.documentation import write  # noqa: E402
from tests.devices.pairs import Case, N  # noqa: E402
from tests.devices.pretended import pretended  # noqa: E402

STEPS = (
    "AutoKL, vae",
    "AutoKL, learned prior",
    "AutoKL, scalar prior",
    "AutoKL, classes",
    "MonteCarloKL(1), student prior",
    "MonteCarloKL(8), student prior",
    "ELBOLoss: likelihood=bernoulli_logits",
)
QUICK = ("Normal", "Categorical(logits)", "Gamma", *STEPS[:1])
EXAMPLES = 128
COLUMNS = {
    "case": "case",
    "kernels": "kernels|d",
    "kernel_ratio": "÷ torch|.2f",
    "waits": "waits|d",
    "torch_waits": "torch's|d",
    "memory": "memory|.1f",
    "torch_memory": "torch's|.1f",
    "float64": "without float64",
}
TIMES = {"case": "case", "us": "time (µs)|.0f", "torch_us": "torch's (µs)|.0f", "time_ratio": "÷ torch|.2f"}


def enlarged(case: Case) -> Case:
    """Return a case with more examples, which are those of the case again."""
    if case.tensors[0].shape[:1] != (N,):
        return case
    repeats = EXAMPLES // N
    tensors = [torch.cat([t] * repeats) if t.shape[:1] == (N,) else t for t in case.tensors]
    return replace(case, tensors=tensors)


def chosen(quick: bool) -> list[Case]:
    """Return the cases."""
    names = QUICK if quick else (*ALIKE, *STEPS)
    return [enlarged(cases.case(name)) for name in names]


def counted(case: Case) -> Row:
    """Return what is launched, waited for and held on the pretended device."""
    comparison.on_device(case, torch.float32)  # which copies constants
    ours = comparison.on_device(case, torch.float32)
    peer = comparison.on_device(case, torch.float32, step=case.peer)
    narrow = comparison.on_device(case, torch.float32, float64=False)
    size = sum(4 * t.numel() for t in case.tensors)
    return {
        "case": case.name,
        "kernels": ours.num_kernels,
        "torch_kernels": peer.num_kernels,
        "kernel_ratio": ours.num_kernels / peer.num_kernels if case.is_whole else None,
        "waits": ours.num_waits,
        "torch_waits": peer.num_waits,
        "memory": ours.peak / size,
        "torch_memory": peer.peak / size if case.is_whole else None,
        "float64": "on the CPU" if any("to the host" in place for place in narrow.waits) else "on the device",
        "wrong": comparison.differences(case, torch.float32, narrow, comparison.on_host(case, torch.float32)),
    }


def timed(case: Case, device: str, rounds: int) -> Row:
    """Return the times of a step on a real device."""
    tensors = comparison.placed(case, torch.float32, device)
    steps = {"ours": comparison.step_on(case, device), "torch": case.peer}
    synchronize = getattr(torch, device).synchronize

    def run(step: Callable[..., Tensor]) -> None:
        comparison.take(step, tensors)
        synchronize()

    functions = {name: partial(run, step) for name, step in steps.items()}
    interleaved(functions, rounds=3)
    seconds = interleaved(functions, rounds, calls=4)
    found = comparison.Outcome([t.cpu() for t in comparison.take(steps["ours"], tensors)], {})
    return {
        "case": case.name,
        "us": 1e6 * median(seconds["ours"]),
        "torch_us": 1e6 * median(seconds["torch"]),
        "time_ratio": median(ratios(seconds["ours"], seconds["torch"])) if case.is_whole else None,
        # Other devices have other random numbers.
        "wrong": comparison.differences(case, torch.float32, found, comparison.on_host(case, torch.float32))
        if case.exact
        else "",
    }


def main() -> int:
    """Count or time, print; return the exit status."""
    parser = argument_parser(__doc__)
    parser.add_argument("--device", help="a real one, such as cuda or mps (default: the pretended one)")
    parser.add_argument("--write-docs", action="store_true", help="write the list into docs/devices.md, and no more")
    arguments = parser.parse_args()
    if arguments.write_docs:
        write()
        return 0
    torch.set_num_threads(1)
    Distribution.set_default_validate_args(False)  # its checks wait, in torch's own steps too
    warnings.simplefilter("ignore")  # of the heavy tails of some cases
    rounds = 5 if arguments.quick else 50
    if not arguments.device:
        with pretended():  # now, for torch takes no new device once a backward pass has run, and some cases run one
            pass
    rows: list[Row] = [
        counted(case) if arguments.device is None else timed(case, arguments.device, rounds)
        for case in chosen(arguments.quick)
    ]
    where = arguments.device or "a pretended accelerator"
    title = f"a step of {EXAMPLES} examples on {where}, forward and backward"
    show(title, rows, TIMES if arguments.device else COLUMNS)
    if not arguments.device:
        print(summary(rows))
    return finish(arguments.json, rows, [f"{row['case']}: {row['wrong']}" for row in rows if row["wrong"]])


def summary(rows: Sequence[Row]) -> str:
    """Return the figures of all cases."""
    more = sum(max(0, row["waits"] - row["torch_waits"]) for row in rows)
    compared = [row["kernel_ratio"] for row in rows if row["kernel_ratio"] is not None]
    native = sum(row["float64"] == "on the device" for row in rows)
    return (
        f"kernels ÷ torch: median {statistics.median(compared):.2f}, largest {max(compared):.2f}; waits beyond "
        f"torch's: {more}; without float64 {native} of {len(rows)} run on the device, the others on the CPU"
    )


if __name__ == "__main__":
    raise SystemExit(main())
