"""How large is the error of each gradient and value form of `MonteCarlo`, from S = 64 draws?

Eleven pairs of three kinds: on the line, in 32 dimensions against a mixture of ten components or the energy of a
two-layer network, and a mixture as q. For each: how many times smaller the mean squared error is than with iid "k1" for
the value, and than with iid "pathwise" for the gradient (summed over the parameters of q).

All estimators here are unbiased, which is checked first: every two of them have to agree within six standard errors, in
the value and along the mean gradient; exit status 1 otherwise. The mean squared error is then the variance over
independent estimates. "mixed" is measured in 20 runs, each with its own memory (`MixedGradient`) and after 50 steps
with a single example; the row "÷ best" compares its error with the better one of pathwise and sticking the landing.
Each draw costs one evaluation of log p, and for a gradient one of ∇log p. For a value alone a control variate needs
∇log p as well, so its ratio is halved in the column "per evaluation". A ratio of 1e+09 means 1e+09 or more, where only
rounding is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Row, argument_parser, finish, show
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Distribution,
    Gamma,
    Independent,
    Laplace,
    MixtureSameFamily,
    Normal,
    StudentT,
    constraints,
)

from torch_klloss.methods import MixedGradient, MonteCarlo
from torch_klloss.samplers import Sobol

S, DIM = 64, 32
NUM_STEPS, NUM_RUNS, BATCH = 50, 20, 200
EXACT = 1e9  # a ratio beyond which only rounding is left


class Energy(Distribution):
    """log p = -|x|²/2 - 3 f(x) with a random two-layer network f, known up to its constant."""

    arg_constraints = {}  # noqa: RUF012
    support = constraints.real_vector

    def __init__(self, activation: nn.Module) -> None:
        super().__init__(torch.Size(), torch.Size((DIM,)), validate_args=False)
        generator = torch.Generator().manual_seed(3)
        sizes = ((64, DIM), (64, 64), (1, 64))
        self.layers = [torch.randn(size, generator=generator) / size[1] ** 0.5 for size in sizes]
        self.activation = activation

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log p up to its constant."""
        first, second, last = self.layers
        hidden = self.activation(self.activation(x @ first.T) @ second.T)
        return -(x**2).sum(-1) / 2 - 3 * (hidden @ last.T).squeeze(-1)


@dataclass(frozen=True)
class Case:
    """A pair, given by the parameters of q and a function that builds q and p.

    The first dimension of a parameter of q indexes examples.
    """

    name: str
    parameters: tuple[Tensor, ...]
    build: Callable[..., Distribution]
    p: Distribution

    def leaves(self, batch: int) -> list[Tensor]:
        """Return copies of the parameters that require a gradient, one for every example."""
        return [t.expand(batch, *t.shape).clone().requires_grad_() for t in self.parameters]


def vectors(loc: Tensor, scale: Tensor) -> Distribution:
    return Independent(Normal(loc, scale), 1)


def mixture(logits: Tensor, loc: Tensor, scale: Tensor) -> Distribution:
    return MixtureSameFamily(Categorical(logits=logits), Normal(loc, scale))


def cases() -> list[Case]:
    """Return the pairs."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def t(*values: float) -> tuple[Tensor, ...]:
        return tuple(torch.tensor(float(v)) for v in values)

    means, spread = 0.35 * normal(10, DIM), 0.5 + torch.rand(10, DIM, generator=generator) / 2
    modes = MixtureSameFamily(Categorical(torch.ones(10)), vectors(means, spread))
    near, between = means[0] + 0.1 * normal(DIM), (means[0] + means[1]) / 2
    narrow, middle = torch.full((DIM,), 0.3), torch.full((DIM,), 0.5)
    standard = Normal(0.0, 1.0)
    loc = 0.5 * normal(DIM)
    two = (torch.tensor([0.3, -0.4]), torch.tensor([-1.0, 1.5]), torch.tensor([0.5, 0.8]))
    return [
        Case("Normal(1, 0.5) ‖ Normal(0, 1)", t(1, 0.5), Normal, standard),
        Case("Normal(0.1, 0.95) ‖ Normal(0, 1)", t(0.1, 0.95), Normal, standard),
        Case("Gamma(2, 1.5) ‖ Gamma(3, 1)", t(2, 1.5), Gamma, Gamma(3.0, 1.0)),
        Case("Normal(0.7, 0.6) ‖ StudentT(4)", t(0.7, 0.6), Normal, StudentT(4.0)),
        Case("Laplace(0.5, 0.7) ‖ Normal(0, 1)", t(0.5, 0.7), Laplace, standard),
        Case("32-d Normal ‖ mixture of 10, near a mode", (near, narrow), vectors, modes),
        Case("32-d Normal ‖ mixture of 10, between modes", (between, middle), vectors, modes),
        Case("32-d Normal ‖ mixture of 10, as wide as all", (means.mean(0), 2 * middle), vectors, modes),
        Case("32-d Normal ‖ energy of a tanh network", (loc, middle), vectors, Energy(nn.Tanh())),
        Case("32-d Normal ‖ energy of a ReLU network", (loc, middle), vectors, Energy(nn.ReLU())),
        Case("mixture of 2 ‖ Normal(0, 1)", two, mixture, standard),
    ]


# "mixed" with its memory is measured separately.
METHODS = {
    "pathwise": MonteCarlo(S),
    "sticking_the_landing": MonteCarlo(S, gradient="sticking_the_landing"),
    "score_function": MonteCarlo(S, gradient="score_function"),
    "mixed (held out)": MonteCarlo(S, gradient="mixed"),
    "entropy": MonteCarlo(S, value="entropy"),
    "control_variate": MonteCarlo(S, value="control_variate"),
    "taylor": MonteCarlo(S, value="taylor"),
    "Sobol": MonteCarlo(S, sampler=Sobol()),
    "Sobol, control_variate": MonteCarlo(S, sampler=Sobol(), value="control_variate"),
}
MEMORY = "mixed (50 steps)"
FITTED = ("control_variate", "taylor", "Sobol, control_variate")


def estimates(case: Case, method: MonteCarlo, batch: int = BATCH) -> Tensor:
    """Return independent values and gradients side by side, `[batch, 1 + parameters]`."""
    leaves = case.leaves(batch)
    value = method.estimate(case.build(*leaves), case.p).value
    gradient = torch.autograd.grad(value.sum(), leaves)
    return torch.cat([value.detach().unsqueeze(-1), *(g.reshape(batch, -1) for g in gradient)], -1).double()


def remembered(case: Case, num_runs: int) -> Tensor:
    """Return the estimates of "mixed" of every run, after 50 steps with a single example."""
    parts = []
    for _ in range(num_runs):
        method = MonteCarlo(S, gradient=MixedGradient())
        for _ in range(NUM_STEPS):
            estimates(case, method, batch=1)
        method.gradient.eval()  # type: ignore[union-attr]
        parts.append(estimates(case, method, BATCH))
    return torch.cat(parts)


def measure(case: Case, rounds: int, num_runs: int) -> tuple[list[Row], list[str]]:
    """Return one row an estimator, and the estimators that disagree with pathwise."""
    samples = {MEMORY: remembered(case, num_runs)}
    for name, method in METHODS.items():
        try:
            samples[name] = torch.cat([estimates(case, method) for _ in range(rounds)])
        except NotImplementedError:
            continue
    base = samples["pathwise"]
    errors = {name: (x[:, 0].var().item(), x[:, 1:].var(0).sum().item()) for name, x in samples.items()}
    best = min(errors["pathwise"][1], errors["sticking_the_landing"][1])
    rows: list[Row] = []
    for name in (*METHODS, MEMORY):
        if name not in samples:
            continue
        value, gradient = (min(x / max(y, 1e-30), EXACT) for x, y in zip(errors["pathwise"], errors[name], strict=True))
        rows.append(
            {
                "pair": case.name,
                "estimator": name,
                "value_ratio": value,
                "value_per_evaluation": value / (2 if name in FITTED else 1),
                "gradient_ratio": gradient,
                "to_best": errors[name][1] / best if "mixed" in name else None,
                "value_mse": errors[name][0],
                "gradient_mse": errors[name][1],
            }
        )
    return rows, [f"{case.name}: {name}" for name, x in samples.items() if not _agree(base, x)]


def _agree(a: Tensor, b: Tensor) -> bool:
    """Return whether two sets of estimates have the same mean: value, and gradient along its mean."""
    direction = a[:, 1:].mean(0)
    pairs = ((a[:, 0], b[:, 0]), (a[:, 1:] @ direction, b[:, 1:] @ direction))
    for x, y in pairs:
        # The lower limit is the rounding of float32, for estimators of almost no variance.
        error = (x.var() / len(x) + y.var() / len(y)).sqrt() + 1e-6 * (1 + x.abs().max())
        if abs(x.mean() - y.mean()) > 6 * error:
            return False
    return True


COLUMNS = {
    "estimator": "estimator",
    "value_ratio": "value: MSE of k1 ÷ own|.3g",
    "value_per_evaluation": "per evaluation|.3g",
    "gradient_ratio": "gradient: MSE of pathwise ÷ own|.3g",
    "to_best": "mixed: MSE ÷ best of both|.3f",
}
# Colours of Okabe and Ito, which colour-blind readers tell apart; the markers differ too.
STYLES = {
    "sticking_the_landing": ("#009E73", "^"),
    MEMORY: ("#0072B2", "o"),
    "control_variate": ("#D55E00", "s"),
    "Sobol": ("#CC79A7", "D"),
    "Sobol, control_variate": ("#000000", "x"),
}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw how many times smaller the error of the gradient is, one line a pair."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["pair"] for row in rows))
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    axis.axvline(1, color="0.5", linewidth=1)
    for estimator, (color, marker) in STYLES.items():
        own = [row for row in rows if row["estimator"] == estimator]
        ratios, heights = [row["gradient_ratio"] for row in own], [names.index(row["pair"]) for row in own]
        axis.plot(ratios, heights, color=color, marker=marker, linestyle="", label=estimator)
    axis.set_xscale("log")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel(f"mean squared error of the pathwise gradient ÷ own, S = {S}")
    axis.grid(color="0.9", linewidth=0.5)
    figure.legend(loc="outside upper center", ncols=len(STYLES), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> int:
    """Check, measure, print, draw; return the exit status."""
    parser = argument_parser(__doc__)
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw the figure into DIR")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rounds, num_runs = (1, 1) if arguments.quick else (20, NUM_RUNS)
    rows: list[Row] = []
    disagreements: list[str] = []
    for case in cases()[:: 3 if arguments.quick else 1]:
        own, wrong = measure(case, rounds, num_runs)
        rows, disagreements = rows + own, disagreements + wrong
        show(case.name, own, COLUMNS)
    if arguments.figures is not None:
        arguments.figures.mkdir(parents=True, exist_ok=True)
        draw(rows, arguments.figures / "gradient_variance.png")
    return finish(arguments.json, rows, disagreements)


if __name__ == "__main__":
    raise SystemExit(main())
