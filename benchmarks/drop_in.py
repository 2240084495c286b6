"""What does a training step cost once `torch.distributions.kl_divergence` is swapped for this library?

Every case is what people write: the distributions are built in the step, by torch's own constructors, from parameters
that a network would put out, against a prior whose parameters are tensors, numbers or learnt. A step builds q and p,
takes the KL, sums it over the latent dimensions, takes the mean over the batch, and goes back to the parameters.

- "torch" is the baseline, and "torch again" the very same step, which shows the noise of the machine;
- "kl_divergence" changes the import alone, and "AutoKL" is the loss;
- "for nothing" is the step with a KL that takes no time, which shows what the rest of it takes;
- "one-liner", for the VAE's pair, is the formula as it is usually written by hand;
- "MonteCarloKL" is compared with the loop by hand: `rsample`, two `log_prob`, the mean.

Values and gradients are checked against torch's in float64 first; a disagreement gives exit status 1, a missed target
does not. Times are medians over rounds in which the peers take turns; a ratio is the median of the ratios within a
round. One thread. `--compile` compares the compiled steps, without the validation of parameters, at 10 to 20
seconds a case and size.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from common import Row, argument_parser, finish, interleaved, median, ratios, show
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Cauchy,
    Dirichlet,
    Distribution,
    Exponential,
    Gamma,
    Geometric,
    Gumbel,
    HalfNormal,
    Independent,
    Laplace,
    LogNormal,
    MultivariateNormal,
    Normal,
    Pareto,
    Poisson,
    StudentT,
    Uniform,
)
from torch.distributions import kl_divergence as torch_kl
from torch.nn.functional import softplus

from torch_klloss import AutoKL, MonteCarloKL, diagonal_normal, kl_divergence

SIZES = ((1, 1), (128, 32), (1024, 128), (4096, 512))
NATIVE = {(1, 1): (1.3, None), (128, 32): (1.0, 1.4), (1024, 128): (0.8, 1.0), (4096, 512): (0.6, 1.0)}
"""The median and the worst ratio to reach at each size, over the families of elementary formulas."""
COMPILED = (1.2, 1.2)  # the same of the compiled steps, at every size
OTHERS = 2.0
PEERS = ("torch again", "for nothing", "kl_divergence", "AutoKL", "one-liner")
Pair = tuple[Distribution, Distribution]


@dataclass(frozen=True)
class Case:
    """A pair as it is built from two outputs of a network and two tensors of a prior, all `[batch, latent]`.

    Attributes:
        name: what the table shows.
        build: from the two outputs, any real numbers, and the prior's tensors, zeros and ones, to q and p.
        native: whether the formula is elementary, or one of a Categorical or a full covariance.
        peer: the baseline, "torch" for the KL or "by hand" for a sampled one.
    """

    name: str
    build: Callable[[Tensor, Tensor, Tensor, Tensor], Pair]
    native: bool = True
    peer: str = "torch"


def positive(x: Tensor) -> Tensor:
    """Return what makes a scale or a rate of an output, as networks do it."""
    return softplus(x) + 1e-3


def factor(x: Tensor, eye: Tensor) -> Tensor:
    """Return lower triangular factors near the identity, `[batch, 8, 8]`, made of the first outputs."""
    return eye + 0.1 * torch.tril(x[:, :1, None].expand(-1, 8, 8))


CASES = (
    Case("Normal", lambda a, b, z, o: (Normal(a, positive(b)), Normal(z, o))),
    Case("Normal‖Normal(0., 1.)", lambda a, b, z, o: (Normal(a, positive(b)), Normal(0.0, 1.0))),
    Case(
        "Independent(Normal)",
        lambda a, b, z, o: (Independent(Normal(a, positive(b)), 1), Independent(Normal(z, o), 1)),
    ),
    Case("diagonal_normal‖Normal", lambda a, b, z, o: (diagonal_normal(a, b), Independent(Normal(z, o), 1))),
    Case("LogNormal", lambda a, b, z, o: (LogNormal(a, positive(b)), LogNormal(z, o))),
    Case("HalfNormal", lambda a, b, z, o: (HalfNormal(positive(b)), HalfNormal(o))),
    Case("Laplace", lambda a, b, z, o: (Laplace(a, positive(b)), Laplace(z, o))),
    Case("Cauchy", lambda a, b, z, o: (Cauchy(a, positive(b)), Cauchy(z, o))),
    Case("Exponential", lambda a, b, z, o: (Exponential(positive(b)), Exponential(o))),
    Case("Pareto", lambda a, b, z, o: (Pareto(1 + positive(a), positive(b)), Pareto(o, o))),
    Case("Uniform", lambda a, b, z, o: (Uniform(-torch.sigmoid(a), torch.sigmoid(b)), Uniform(-o, o))),
    Case("Poisson", lambda a, b, z, o: (Poisson(positive(b)), Poisson(o))),
    Case("Bernoulli probs", lambda a, b, z, o: (Bernoulli(torch.sigmoid(a)), Bernoulli(0.5 * o))),
    Case("Bernoulli logits", lambda a, b, z, o: (Bernoulli(logits=a), Bernoulli(logits=z))),
    Case("Binomial", lambda a, b, z, o: (Binomial(10, torch.sigmoid(a)), Binomial(10, 0.5 * o))),
    Case("Geometric", lambda a, b, z, o: (Geometric(torch.sigmoid(a)), Geometric(0.5 * o))),
    Case("Categorical", lambda a, b, z, o: (Categorical(logits=a), Categorical(logits=z))),
    Case(
        "MultivariateNormal (8)",
        lambda a, b, z, o: (
            MultivariateNormal(_eight(a), scale_tril=factor(b, torch.eye(8))),
            MultivariateNormal(torch.zeros(8), scale_tril=torch.eye(8)),
        ),
    ),
    Case("Gumbel", lambda a, b, z, o: (Gumbel(a, positive(b)), Gumbel(z, o)), native=False),
    Case("Gamma", lambda a, b, z, o: (Gamma(positive(a), positive(b)), Gamma(o, o)), native=False),
    Case("Beta", lambda a, b, z, o: (Beta(positive(a), positive(b)), Beta(o, o)), native=False),
    Case("Dirichlet", lambda a, b, z, o: (Dirichlet(positive(a)), Dirichlet(o)), native=False),
)
SAMPLED = Case("Normal‖StudentT", lambda a, b, z, o: (Normal(a, positive(b)), StudentT(4 * o, z, o)), peer="by hand")
NEEDS_A_ROW = ("Dirichlet", "Categorical", "MultivariateNormal (8)")  # a single element is no distribution of theirs


def _eight(x: Tensor) -> Tensor:
    return x[:, :1].expand(-1, 8)


def peers(case: Case, a: Tensor, b: Tensor, z: Tensor, o: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return the losses to compare, by name; the first one is the baseline."""
    loss = AutoKL()

    def by_torch() -> Tensor:
        return _reduced(torch_kl(*_of_torch(case, a, b, z, o)))

    found: dict[str, Callable[[], Tensor]] = {"torch": by_torch, "torch again": lambda: by_torch()}
    found["for nothing"] = lambda: _ForNothing.of(*case.build(a, b, z, o)).mean()
    found["kl_divergence"] = lambda: _reduced(kl_divergence(*case.build(a, b, z, o)))
    found["AutoKL"] = lambda: loss(*case.build(a, b, z, o))
    if case.name.startswith("diagonal_normal"):
        found["one-liner"] = lambda: (-0.5 * (1 + b - a**2 - b.exp())).sum(-1).mean()
    return found


def _of_torch(case: Case, a: Tensor, b: Tensor, z: Tensor, o: Tensor) -> Pair:
    if case.name.startswith("diagonal_normal"):
        return Independent(Normal(a, (0.5 * b).exp()), 1), Independent(Normal(z, o), 1)
    return case.build(a, b, z, o)


def sampled_peers(num_samples: int, a: Tensor, b: Tensor, z: Tensor, o: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return the sampled loss and the loop by hand."""
    loss = MonteCarloKL(num_samples)

    def by_hand() -> Tensor:
        q, p = SAMPLED.build(a, b, z, o)
        x = q.rsample((num_samples,))
        return _reduced((q.log_prob(x) - p.log_prob(x)).mean(0))

    return {
        "by hand": by_hand,
        "by hand again": lambda: by_hand(),
        "MonteCarloKL": lambda: loss(*SAMPLED.build(a, b, z, o)),
    }


class _ForNothing(torch.autograd.Function):
    """A KL and its gradients that are there already: zeros for every row, and ones."""

    @staticmethod
    def of(q: Distribution, p: Distribution) -> Tensor:
        value: Tensor = _ForNothing.apply(*{id(t): t for t in _given(q)}.values())
        return value

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.grads = [_made(t.shape, 1.0) for t in parameters]
        return _made(parameters[0].shape[:1], 0.0).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(ctx.grads)


def _given(q: Distribution) -> Iterator[Tensor]:
    """Yield the tensors that a distribution, or one that it is made of, was given and that require a gradient."""
    for t in vars(q).values():
        if isinstance(t, Distribution):
            yield from _given(t)
        elif isinstance(t, Tensor) and t.requires_grad:
            yield t


@cache
def _made(shape: torch.Size, number: float) -> Tensor:
    return torch.full(shape, number)


def _reduced(kl: Tensor) -> Tensor:
    return (kl if kl.dim() == 1 else kl.sum(-1)).mean()


def disagreements(case: Case, size: tuple[int, int]) -> Iterator[str]:
    """Yield where a peer's value or gradient is not torch's in float64."""
    wide, single = inputs(size, torch.float64), inputs(size, torch.float32)
    expected = value_and_gradients(peers(case, *wide)["torch"], wide[:2])
    for name, loss in peers(case, *single).items():
        if name == "for nothing":
            continue
        for got, right in zip(value_and_gradients(loss, single[:2]), expected, strict=True):
            bound = 1e-4 * float(right.abs().max())
            if not torch.allclose(got.double(), right, rtol=1e-3, atol=bound):
                yield f"{case.name}, {name}: off by {float((got.double() - right).abs().max()):.1e}"


def inputs(size: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return two outputs of a network, and zeros and ones for a prior."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    return a, b, torch.zeros(size, dtype=dtype), torch.ones(size, dtype=dtype)


def value_and_gradients(loss: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the loss and its gradients, zeros where a leaf is not used."""
    value = loss()
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True))]


def step(loss: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> Callable[[], None]:
    """Return a training step: the loss, and its gradients to the leaves."""

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss().backward()

    return run


def measured(
    case: str,
    size: tuple[int, int],
    losses: dict[str, Callable[[], Tensor]],
    leaves: tuple[Tensor, ...],
    seconds: float,
) -> Row:
    """Return a row: the time of the first peer, and of the others relative to it."""
    steps = {name: step(loss, leaves) for name, loss in losses.items()}
    first = next(iter(steps))
    one = median(interleaved({first: steps[first]}, 7)[first])
    rounds = max(7, min(200, round(seconds / (one * len(steps)))))
    calls = max(1, round(0.0005 / one))
    times = interleaved(steps, max(7, rounds // calls), calls)
    row: Row = {"case": case, "size": "x".join(map(str, size)), "baseline_us": 1e6 * median(times[first])}
    return row | {name: median(ratios(times[name], times[first])) for name in list(steps)[1:]}


def summary(rows: list[Row], size: tuple[int, int], native: list[str], *, are_compiled: bool = False) -> Iterator[str]:
    """Yield the median and the worst ratio at a size, beside what is to be reached."""
    label = "x".join(map(str, size))
    for peer in ("for nothing", "kl_divergence", "AutoKL"):
        for is_native in (True, False):
            found = [
                (row[peer], row["case"])
                for row in rows
                if row["size"] == label and (row["case"] in native) == is_native and peer in row
            ]
            if not found:
                continue
            worst, name = max(found)
            middle, most = (COMPILED if are_compiled else NATIVE[size]) if is_native else (OTHERS, OTHERS)
            kind = "elementary" if is_native else "special functions"
            aims = [f" (target {t})" if t and peer != "for nothing" else "" for t in (middle, most)]
            spread = f"median {median([r for r, _ in found]):.2f}{aims[0]}, worst {worst:.2f} {name}{aims[1]}"
            yield f"{peer} ÷ torch at {label}, {kind}: {spread}"


def compiled_rows(size: tuple[int, int], chosen: list[Case], seconds: float) -> list[Row]:
    """Return the rows of the compiled steps, each in one graph; torch's as it can compile its own."""
    rows = []
    Distribution.set_default_validate_args(False)  # a constructor that validates breaks the graph
    for case in track(chosen, "compiling", console=Console(stderr=True), disable=not sys.stderr.isatty()):
        torch.compiler.reset()  # or it gives up after eight cases
        leaves = inputs(size, torch.float32)
        losses = peers(case, *leaves)
        names = [name for name in ("torch", "kl_divergence", "AutoKL", "one-liner") if name in losses]
        kept = {name: torch.compile(losses[name], fullgraph=name != "torch") for name in names}
        baseline = "compiled"
        try:
            kept["torch"]()
        except RuntimeError:  # torch cannot compile its own formula of two MultivariateNormals
            kept["torch"], baseline = losses["torch"], "eager"
        rows.append(measured(case.name, size, kept, leaves[:2], seconds) | {"baseline": baseline})
    return rows


def main() -> int:
    """Check, time, print; return the exit status."""
    parser = argument_parser(__doc__)
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="only the cases whose names start so")
    parser.add_argument("--compile", action="store_true", help="compare the compiled steps instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [case for case in CASES if not arguments.cases or case.name.startswith(tuple(arguments.cases))]
    if not chosen:
        parser.error(
            f"no case starts with {' or '.join(arguments.cases)}; they are: {', '.join(c.name for c in CASES)}."
        )
    seconds = 0.02 if arguments.quick else 2.0
    sizes = ((128, 32),) if arguments.quick else SIZES
    wrong = [line for case in chosen for line in disagreements(case, (16, 8))]
    rows: list[Row] = []
    native = [case.name for case in CASES if case.native]
    for size in sizes:
        cases = [case for case in chosen if size != (1, 1) or case.name not in NEEDS_A_ROW]
        if arguments.compile:
            found = compiled_rows(size, cases, seconds)
        else:
            found = []
            for case in cases:
                tensors = inputs(size, torch.float32)
                found.append(measured(case.name, size, peers(case, *tensors), tensors[:2], seconds))
        shown = [key for key in PEERS if any(key in row for row in found)]
        for row in found:
            row.setdefault("one-liner", None)
        columns = {"case": "case"} | ({"baseline": "torch's step"} if arguments.compile else {})
        columns |= {"baseline_us": "torch (µs)|.0f"} | {key: f"{key}|.2f" for key in shown}
        show(f"Forward and backward, {'x'.join(map(str, size))}, ÷ torch", found, columns)
        for line in summary(found, size, native, are_compiled=arguments.compile):
            print(line)
        rows += found
    if not arguments.compile and not arguments.cases:
        rows += sampled_rows(sizes, seconds)
    return finish(arguments.json, rows, wrong)


def sampled_rows(sizes: tuple[tuple[int, int], ...], seconds: float) -> list[Row]:
    """Print and return the rows of the sampled losses."""
    rows = []
    for size in sizes:
        if math.prod(size) > 2**18:
            continue
        for num_samples in (1, 8):
            tensors = inputs(size, torch.float32)
            losses = sampled_peers(num_samples, *tensors)
            rows.append(measured(f"{SAMPLED.name}, {num_samples} draws", size, losses, tensors[:2], seconds))
    columns = {"case": "case", "size": "size", "baseline_us": "by hand (µs)|.0f", "by hand again": "again|.2f"}
    show("Sampled, forward and backward", rows, columns | {"MonteCarloKL": "MonteCarloKL ÷ by hand|.2f"})
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
