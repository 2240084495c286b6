"""How much smaller is the error of each sampler for the same number of evaluations, and is its error bar right?

S = 4 … 256 points of q from every sampler, averaged by log q(x) - log p(x), gradient pathwise. The mean squared error
of independent draws is divided by the sampler's, for value and gradient. The reference is a mean over nets of 2^14
points, which has to agree with independent draws. Exit status 1 if an estimate is biased (|z| ≥ 6), a promised ratio is
not reached, or an interval of 95 % covers less than 92 % or more than 98 %. If the skewness of an estimate is over 0.7,
draws that are too rare to occur carry much of its variance, and 83 % is enough. The table also has the coverage of the
plain t interval, which ignores skewness.

Then the time of a call relative to independent draws, and the time and memory of 4096 draws in chunks of 64 relative to
all at once and to 64 draws. One thread.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from common import Row, argument_parser, finish, interleaved, median, quartiles, ratios, show
from lib.chunk_memory import extra_memory
from torch import Tensor
from torch.distributions import (
    Beta,
    Categorical,
    Distribution,
    Gamma,
    Laplace,
    MixtureSameFamily,
    Normal,
    StudentT,
)

from torch_klloss import KLEstimate
from torch_klloss.methods import MonteCarlo
from torch_klloss.samplers import IID, Antithetic, Sampler, Sobol, Stratified

SIZES = (4, 8, 16, 32, 64, 128, 256)
SAMPLERS: dict[str, Sampler] = {
    "IID": IID(),
    "Antithetic": Antithetic(),
    "Stratified": Stratified(),
    "Sobol": Sobol(),
}
WITH_ERROR: dict[str, Sampler] = {
    "IID": IID(),
    "Antithetic": Antithetic(),
    "Stratified(8)": Stratified(8),
    "Sobol(8)": Sobol(8),
}
COVERAGE = 0.92, 0.98
SKEWED, SKEWED_COVERAGE = 0.7, 0.83
INTERVALS, QUICK_INTERVALS = 20_000, 5_000  # the standard errors of a coverage of 98 % are 0.1 % and 0.2 %


@dataclass(frozen=True)
class Pair:
    """A pair, with the ratios to the error of independent draws that are promised at S = 64."""

    name: str
    q_family: Callable[..., Distribution]
    q_parameters: tuple[float, ...]
    p: Distribution
    value: float
    gradient: float

    def leaves(self, batch: int) -> list[Tensor]:
        """Return q's parameters, repeated for every repetition."""
        return [torch.full((batch,), v, dtype=torch.float64, requires_grad=True) for v in self.q_parameters]


def two_normals(weight: Tensor, *parameters: Tensor) -> MixtureSameFamily:
    """Return a mixture of two Normals from a weight, two locations and two scales."""
    loc, other_loc, scale, other_scale = parameters
    components = Normal(torch.stack([loc, other_loc], -1), torch.stack([scale, other_scale], -1))
    return MixtureSameFamily(Categorical(torch.stack([weight, 1 - weight], -1)), components)


def pairs() -> list[Pair]:
    """Return the pairs with promised ratios, and one of finite support."""

    def t(*values: float) -> list[Tensor]:
        return [torch.tensor(v, dtype=torch.float64) for v in values]

    unit = Normal(*t(0, 1))
    mixture = (0.3, -1.0, 1.5, 0.5, 0.7)
    return [
        Pair("Normal(1, 0.5) ‖ Normal(0, 1)", Normal, (1, 0.5), unit, 25, 40),
        Pair("Gamma(2, 1.5) ‖ Gamma(3, 1)", Gamma, (2, 1.5), Gamma(*t(3, 1)), 100, 60),
        Pair("Normal(0.7, 0.6) ‖ StudentT(4)", Normal, (0.7, 0.6), StudentT(*t(4)), 20, 50),
        Pair("Laplace(0.5, 0.7) ‖ Normal(0, 1)", Laplace, (0.5, 0.7), unit, 4, 5),
        Pair("mixture of 2 Normals ‖ Normal(0, 1)", two_normals, mixture, unit, 25, 25),
        Pair("Beta(2, 3) ‖ Beta(1, 1.5)", Beta, (2, 3), Beta(*t(1, 1.5)), 0, 0),
    ]


@dataclass(frozen=True)
class Estimates:
    """Repeated estimates `[repetitions]` with gradients `[parameters, repetitions]`."""

    value: Tensor
    gradient: Tensor

    def mse(self, truth: Estimates) -> tuple[float, float]:
        """Return the mean squared errors of value and gradient."""
        value = (self.value - truth.value.mean()) ** 2
        gradient = (self.gradient - truth.gradient.mean(1, keepdim=True)) ** 2
        return value.mean().item(), gradient.sum(0).mean().item()


def estimates(pair: Pair, sampler: Sampler, num_samples: int, repetitions: int) -> Estimates:
    """Return repeated estimates, all drawn at once."""
    leaves = pair.leaves(repetitions)
    estimate = MonteCarlo(num_samples, sampler=sampler).estimate(pair.q_family(*leaves), pair.p)
    gradients = torch.autograd.grad(estimate.value.sum(), leaves)
    return Estimates(estimate.value.detach(), torch.stack(gradients))


def errors_of(pair: Pair, sizes: Sequence[int], repetitions: int) -> tuple[list[Row], list[str]]:
    """Return the ratios of the squared errors of independent draws to the sampler's, and the broken promises."""
    truth = estimates(pair, Sobol(), 2**14, 16)
    rows, disagreements = [], []
    for num_samples in sizes:
        baseline: tuple[float, float] | None = None
        for name, sampler in SAMPLERS.items():
            found = estimates(pair, sampler, num_samples, repetitions)
            mse = found.mse(truth)
            baseline = baseline or mse
            z = (found.value.mean() - truth.value.mean()) / (mse[0] / repetitions) ** 0.5
            row = {"pair": pair.name, "sampler": name, "S": num_samples, "mse": mse[0], "z": z.item()}
            row |= {"gradient_mse": mse[1], "value": baseline[0] / mse[0], "gradient": baseline[1] / mse[1]}
            rows.append(row)
            if abs(z) >= 6:
                disagreements.append(f"{name} on {pair.name}: biased, z = {z:.1f}")
            if name == "Sobol" and num_samples == 64 and (row["value"] < pair.value or row["gradient"] < pair.gradient):
                disagreements.append(f"{name} on {pair.name}: {row['value']:.1f} and {row['gradient']:.1f}")
            if name in ("Stratified", "Sobol") and min(row["value"], row["gradient"]) < 0.95:
                disagreements.append(f"{name} on {pair.name}: loses to independent draws at S = {num_samples}")
    return rows, disagreements


def coverage_of(pair: Pair, intervals: int) -> tuple[list[Row], list[str]]:
    """Return how often intervals of 95 % contain the truth, at S = 64."""
    truth = estimates(pair, Sobol(), 2**14, 16).value.mean()
    rows, disagreements = [], []
    for name, sampler in WITH_ERROR.items():
        with torch.no_grad():
            q = pair.q_family(*pair.leaves(intervals))
            estimate = MonteCarlo(64, sampler=sampler, gradient="none").estimate(q, pair.p)
        symmetric = dataclasses.replace(estimate, skewness=None)
        covers, width = coverage_and_width(estimate, truth)
        student, student_width = coverage_and_width(symmetric, truth)
        centred = estimate.value - truth
        skewness = ((centred**3).mean() / (centred**2).mean() ** 1.5).item()
        least = COVERAGE[0] if abs(skewness) < SKEWED else SKEWED_COVERAGE
        met = COVERAGE[0] <= covers <= COVERAGE[1]
        row = {"pair": pair.name, "sampler": name, "covers": covers, "student": student, "skewness": skewness}
        rows.append(row | {"width": width / student_width, "met": "yes" if met else "NO"})
        if not least <= covers <= COVERAGE[1]:
            disagreements.append(f"{name} on {pair.name}: intervals of 95 % cover {covers:.1%}")
    return rows, disagreements


def coverage_and_width(estimate: KLEstimate, truth: Tensor) -> tuple[float, float]:
    """Return how often an interval of 95 % contains the truth, and how wide it is on average."""
    low, high = estimate.interval(0.95)
    return ((low <= truth) & (truth <= high)).double().mean().item(), (high - low).mean().item()


def times(rounds: int) -> list[Row]:
    """Return the time of forward and backward at 128 x 32 x 64, and its ratio to independent draws."""
    rows = []
    for family, parameters in ((Normal, (0.5, 0.7)), (Laplace, (0.5, 0.7)), (Gamma, (2.0, 1.5))):
        leaves = [torch.full((128, 32), v, requires_grad=True) for v in parameters]
        p = family(*(torch.full((32,), 1.0) for _ in parameters))

        def step(sampler: Sampler, leaves: list[Tensor], family: type, p: Distribution) -> None:
            value = MonteCarlo(64, sampler=sampler).estimate(family(*leaves), p).value
            torch.autograd.grad(value.sum(), leaves)

        peers = {name: partial(step, sampler, leaves, family, p) for name, sampler in SAMPLERS.items()}
        seconds = interleaved(peers, rounds)
        for name in SAMPLERS:
            low, middle, high = quartiles(ratios(seconds[name], seconds["IID"]))
            row = {"family": family.__name__, "sampler": name, "ms": 1e3 * median(seconds[name])}
            rows.append(row | {"ratio": middle, "low": low, "high": high})
    return rows


def figure(rows: Sequence[Row], path: Path) -> None:
    """Draw the root mean square error against the number of points, one line a sampler."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["pair"] for row in rows))
    fig, axes = plt.subplots(2, len(names), figsize=(3.1 * len(names), 5.6), sharex=True, layout="constrained")
    for i, key in enumerate(("mse", "gradient_mse")):
        for ax, pair in zip(axes[i], names, strict=True):
            for name in SAMPLERS:
                points = [(r["S"], r[key] ** 0.5) for r in rows if r["pair"] == pair and r["sampler"] == name]
                ax.loglog(*zip(*points, strict=True), "o-", markersize=3, label=name, base=2)
            ax.set_yscale("log", base=10)
            if i == 0:
                ax.set_title(pair, fontsize=8)
            else:
                ax.set_xlabel("points of q")
        axes[i][0].set_ylabel("RMSE of the KL" if i == 0 else "RMSE of its gradient")
    axes[0][0].legend(frameon=False, fontsize=8)
    fig.savefig(path / "estimator_variance.png", dpi=110)


def main(options: argparse.Namespace) -> int:
    """Run the benchmark."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    repetitions, intervals = (1000, QUICK_INTERVALS) if options.quick else (4000, INTERVALS)
    sizes = (4, 64) if options.quick else SIZES
    errors, covered, disagreements = [], [], []
    for pair in pairs()[:: 2 if options.quick else 1]:
        for rows, (found, wrong) in (
            (errors, errors_of(pair, sizes, repetitions)),
            (covered, coverage_of(pair, intervals)),
        ):
            rows += found
            disagreements += wrong
    shown = [row for row in errors if row["S"] in (4, 64)]
    columns = {"pair": "pair", "sampler": "sampler", "S": "S", "value": "value|.1f", "gradient": "gradient|.1f"}
    show("How many times less squared error than independent draws", shown, columns)
    columns = {"pair": "pair", "sampler": "sampler", "covers": "cover|.1%", "met": "92 to 98 %"}
    columns |= {"student": "t alone|.1%", "width": "width ÷ t|.2f", "skewness": "skewness|.2f"}
    show("Intervals of 95 %, S = 64", covered, columns)
    timed = times(2 if options.quick else 40)
    columns = {"family": "q", "sampler": "sampler", "ms": "ms|.2f", "ratio": "÷ IID|.2f"}
    show("Forward and backward, 128 x 32 batch, S = 64", timed, columns)
    chunked = [] if options.quick else extra_memory(SAMPLERS)
    if chunked:
        columns = {"sampler": "sampler", "memory": "tensors ÷ S = 64|.2f", "resident": "resident ÷ S = 64|.2f"}
        columns |= {"time": "time ÷ unchunked|.2f"}
        show("S = 4096 in chunks of 64, 256 x 32", chunked, columns)
    if options.figures:
        figure(errors, options.figures)
    return finish(options.json, errors + covered + timed + chunked, disagreements)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw the error of every sampler into DIR")
    raise SystemExit(main(parser.parse_args()))
