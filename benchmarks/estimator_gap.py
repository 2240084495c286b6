"""How large is the error of each estimator of KL(q‖p) and of its gradient, at a given cost?

Five pairs, S = 1 … 4096 draws from q, ℓ = log q(x) - log p(x), r = p(x)/q(x):

- values: the library's `MonteCarlo` (the mean of ℓ, "k1"), and hand-written k2 = ℓ²/2, k3 = r - 1 + ℓ, the entropy form
  -H(q) - mean log p, and the classic mistake: ℓ weighted by q(x) although the draws come from q.
- gradients by q's parameters: `MonteCarlo(gradient=…)` with "pathwise", "sticking_the_landing", "score_function".

The reference is a float64 quadrature, which has to agree with the closed form where one exists. Before timing, every
unbiased estimator has to agree with the reference, and the mistakes have to differ from it; exit status 1 otherwise.
Then 64 estimates at a time are drawn as one batch, the estimators taking turns: the root mean square error is over all
of them, the time is the median of a batch. Evaluations of log q and of log p both count. One thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Row, argument_parser, finish, interleaved, median, ratios, show
from torch import Tensor
from torch.distributions import Distribution, Gamma, Independent, Laplace, Normal, StudentT

from torch_klloss import has_closed_form, kl_divergence
from torch_klloss.methods import MonteCarlo
from torch_klloss.methods.monte_carlo.method import Gradient

Estimator = Callable[[Distribution, Distribution, int], Tensor]
BATCH = 64  # how many estimates are drawn at once
SAMPLE_SIZES = tuple(4**k for k in range(7))
SHOWN_SIZES = (64, 4096)


@dataclass(frozen=True)
class Pair:
    """A pair of distributions, with the parameters that it is built from."""

    name: str
    story: str
    q_family: Callable[..., Distribution]
    q_parameters: tuple[Tensor, ...]
    p_family: Callable[..., Distribution]
    p_parameters: tuple[Tensor, ...]
    k3_has_variance: bool  # whether E_q[r²] is finite

    def build(self, batch: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], Distribution, Distribution]:
        """Return q's parameters as leaves of the given batch shape, q and p; a vector parameter is one event."""
        event_dims = self.q_parameters[0].dim()
        leaves = [t.to(dtype).expand(batch + t.shape).clone().requires_grad_() for t in self.q_parameters]
        p_parameters = [t.to(dtype) for t in self.p_parameters]
        q, p = self.q_family(*leaves), self.p_family(*p_parameters)
        return (leaves, Independent(q, event_dims), Independent(p, event_dims)) if event_dims else (leaves, q, p)

    def quadrature(self, num_panels: int) -> Tensor:
        """Return KL and gradient in float64, `[1 + parameters]`, by Simpson's rule over ±30 standard deviations of q.

        The mean of q is a node between two panels, so that the kink of a Laplace density adds no error.
        """
        leaves = [t.clone().requires_grad_() for t in self.q_parameters]
        q, p = self.q_family(*leaves), self.p_family(*self.p_parameters)
        mean, reach = q.mean.detach(), 30 * q.stddev.detach()
        support: Any = q.support
        low = mean - reach if support.check(mean - reach).all() else torch.full_like(mean, 1e-12)
        steps = torch.linspace(0, 1, 2 * num_panels + 1, dtype=mean.dtype).reshape(-1, *[1] * mean.dim())
        x = low + (mean + reach - low) * steps
        weights = torch.full_like(steps, 2.0)
        weights[1::2], weights[0], weights[-1] = 4.0, 1.0, 1.0
        log_q = q.log_prob(x)
        spacing = (mean + reach - low) / (6 * num_panels)
        value = (weights * spacing * log_q.exp() * (log_q - p.log_prob(x))).sum()
        return torch.cat([value.reshape(1), *(g.flatten() for g in torch.autograd.grad(value, leaves))]).detach()


def pairs() -> list[Pair]:
    """Return the five pairs."""

    def t(*values: float) -> tuple[Tensor, ...]:
        return tuple(torch.tensor(v, dtype=torch.float64) for v in values)

    loc = torch.linspace(-1, 1, 32, dtype=torch.float64)
    scale = torch.full_like(loc, 0.6)
    prior = torch.zeros_like(loc), torch.ones_like(loc)
    unit = t(0, 1)
    return [
        Pair("Normal(1, 0.5) ‖ Normal(0, 1)", "q narrower than p", Normal, t(1, 0.5), Normal, unit, False),
        Pair("32-d Normal(-1…1, 0.6) ‖ Normal(0, 1)", "a VAE's posterior", Normal, (loc, scale), Normal, prior, False),
        Pair("Gamma(5, 5) ‖ Gamma(4.5, 4.75)", "q near p", Gamma, t(5, 5), Gamma, t(4.5, 4.75), True),
        Pair("Laplace(0, 1) ‖ Normal(0, 1)", "q wider than p", Laplace, t(0, 1), Normal, unit, True),
        Pair("Normal(0, 1) ‖ StudentT(4)", "no closed form", Normal, unit, StudentT, t(4), False),
    ]


def _log_probs(q: Distribution, p: Distribution, num_samples: int) -> tuple[Tensor, Tensor]:
    x = q.sample((num_samples,))
    return q.log_prob(x), p.log_prob(x)


def monte_carlo(q: Distribution, p: Distribution, num_samples: int) -> Tensor:
    """Return the library's estimate."""
    return MonteCarlo(num_samples, gradient="none").estimate(q, p).value


def k2(q: Distribution, p: Distribution, num_samples: int) -> Tensor:
    """Return the mean of ℓ²/2."""
    log_q, log_p = _log_probs(q, p, num_samples)
    return ((log_q - log_p) ** 2 / 2).mean(0)


def k3(q: Distribution, p: Distribution, num_samples: int) -> Tensor:
    """Return the mean of r - 1 + ℓ."""
    log_q, log_p = _log_probs(q, p, num_samples)
    return (torch.expm1(log_p - log_q) + log_q - log_p).mean(0)


def entropy_form(q: Distribution, p: Distribution, num_samples: int) -> Tensor:
    """Return -H(q) - mean log p, with q's entropy in closed form."""
    return -q.entropy() - p.log_prob(q.sample((num_samples,))).mean(0)


def weighted_again(q: Distribution, p: Distribution, num_samples: int) -> Tensor:
    """Return the classic mistake: draws from q, weighted again by the density of q."""
    log_q, log_p = _log_probs(q, p, num_samples)
    return (log_q.exp() * (log_q - log_p)).mean(0)


def detached_log_ratio(q: Distribution, p: Distribution, num_samples: int) -> Tensor:
    """Return ℓ at draws that carry no gradient: as a loss its expected gradient is zero."""
    log_q, log_p = _log_probs(q, p, num_samples)
    return (log_q - log_p).mean(0)


def gradient_option(option: Gradient) -> Estimator:
    """Return the library's estimate with the given gradient."""
    return lambda q, p, num_samples: MonteCarlo(num_samples, gradient=option).estimate(q, p).value


# Each estimator with the number of log-densities that it evaluates a draw. The first of each kind is the peer in time.
ESTIMATORS: dict[str, dict[str, tuple[Estimator, int]]] = {
    "value": {
        "MonteCarlo (k1)": (monte_carlo, 2),
        "k2": (k2, 2),
        "k3": (k3, 2),
        "entropy form": (entropy_form, 1),
        "weighted again": (weighted_again, 2),
    },
    "gradient": {
        "pathwise": (gradient_option("pathwise"), 2),
        "sticking_the_landing": (gradient_option("sticking_the_landing"), 3),
        "score_function": (gradient_option("score_function"), 2),
    },
}
# Estimators that the check has to reject.
MISTAKES: dict[str, tuple[str, Estimator]] = {
    "value": ("weighted again", weighted_again),
    "gradient": ("detached draws", detached_log_ratio),
}
# Colours of Okabe and Ito, which colour-blind readers tell apart; marker and line differ too.
STYLES = {
    "MonteCarlo (k1)": ("#0072B2", "o", "-"),
    "k2": ("#E69F00", "s", "-"),
    "k3": ("#009E73", "^", "-"),
    "entropy form": ("#CC79A7", "D", "-"),
    "weighted again": ("#000000", "x", "--"),
    "pathwise": ("#0072B2", "o", "-"),
    "sticking_the_landing": ("#009E73", "^", "-"),
    "score_function": ("#D55E00", "s", "-"),
}
COLUMNS = {
    "num_samples": "S|d",
    "estimator": "estimator",
    "mean": "mean (of a gradient: its norm)|.6f",
    "rmse": "RMSE|.2e",
    "evaluations": "evaluations|d",
    "batch_us": f"time of {BATCH} (µs)|.0f",
    "time_ratio": "÷ first|.2f",
}


def reference(pair: Pair) -> tuple[Tensor, list[str]]:
    """Return KL and gradient by quadrature, and where they disagree with half the nodes or with the closed form."""
    truth = pair.quadrature(2**14)
    bound = 1e-9 * (1 + truth.abs())  # far below any sampling error here, far above rounding
    others = {"half the nodes": pair.quadrature(2**13)}
    leaves, q, p = pair.build((), torch.float64)
    if has_closed_form(q, p):
        value = kl_divergence(q, p)
        gradient = torch.autograd.grad(value, leaves)
        others["the closed form"] = torch.cat([value.detach().reshape(1), *(g.flatten() for g in gradient)])
    wrong = [name for name, other in others.items() if not ((other - truth).abs() < bound).all()]
    return truth, [f"{pair.name}: quadrature against {name}" for name in wrong]


def estimate(
    kind: str, estimator: Estimator, pair: tuple[Sequence[Tensor], Distribution, Distribution], num_samples: int
) -> Tensor:
    """Return one value, or one gradient, for every batch element: `[batch, coordinates]`."""
    leaves, q, p = pair
    if kind == "value":
        with torch.no_grad():
            return estimator(q, p, num_samples).unsqueeze(-1)
    gradient = torch.autograd.grad(estimator(q, p, num_samples).sum(), leaves)
    return torch.cat([g.reshape(len(g), -1) for g in gradient], -1)


def check(pair: Pair, truth: Tensor, num_samples: int = 64) -> list[str]:
    """Return which unbiased estimators miss the reference, and which mistakes agree with it."""
    built = pair.build((1024,), torch.float32)
    wrong = []
    for kind, goal in (("value", truth[:1]), ("gradient", truth[1:])):
        estimators = {name: estimator for name, (estimator, _) in ESTIMATORS[kind].items()}
        mistake, mistaken = MISTAKES[kind]
        for name, estimator in (estimators | {mistake: mistaken}).items():
            if name == "k2" or (name == "k3" and not pair.k3_has_variance):
                continue  # the bias of k2 is unknown; k3 then has no standard error
            estimates = estimate(kind, estimator, built, num_samples).double()
            # The lower limit is the rounding of float32, for estimators of almost no variance.
            std_error = (estimates.std(0) / len(estimates) ** 0.5).clamp_min(1e-6)
            z = ((estimates.mean(0) - goal).abs() / std_error).max().item()
            if (z < 6) == (name == mistake):
                wrong.append(f"{pair.name}: {kind} by {name} has z = {z:.1f}")
    return wrong


def measure(pair: Pair, truth: Tensor, num_samples: int, rounds: int) -> list[Row]:
    """Return one row for every estimator of the value and every one of the gradient, at one number of draws."""
    built = pair.build((BATCH,), torch.float32)
    rows: list[Row] = []
    for kind, goal in (("value", truth[:1]), ("gradient", truth[1:])):
        kept: dict[str, list[Tensor]] = {name: [] for name in ESTIMATORS[kind]}

        def run(name: str, kind: str = kind, kept: dict[str, list[Tensor]] = kept) -> None:
            kept[name].append(estimate(kind, ESTIMATORS[kind][name][0], built, num_samples))

        seconds = interleaved({name: partial(run, name) for name in kept}, rounds)
        peer = seconds[next(iter(kept))]
        for name, (_, evaluations) in ESTIMATORS[kind].items():
            estimates = torch.cat(kept[name]).double()
            rows.append(
                {
                    "pair": pair.name,
                    "kind": kind,
                    "estimator": name,
                    "num_samples": num_samples,
                    "evaluations": evaluations * num_samples,
                    "mean": _summary(estimates.mean(0)),
                    "reference": _summary(goal),
                    "rmse": (estimates - goal).square().sum(-1).mean().sqrt().item(),
                    "batch_us": 1e6 * median(seconds[name]),
                    "time_ratio": median(ratios(seconds[name], peer)),
                }
            )
    return rows


def _summary(mean: Tensor) -> float:
    """Return a value unchanged, and the norm of a gradient."""
    return (mean if len(mean) == 1 else mean.norm()).item()


def draw(rows: Sequence[Row], kind: str, titles: dict[str, str], path: Path) -> None:
    """Draw the error against the evaluations, one panel a pair, titled by `titles`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(9, 6), layout="constrained")
    rows = [row for row in rows if row["kind"] == kind]
    for axis, name in zip(axes.flat, dict.fromkeys(row["pair"] for row in rows), strict=False):
        _draw_panel(axis, [row for row in rows if row["pair"] == name])
        axis.set_title(titles[name], fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("RMSE (nats)" if kind == "value" else "RMSE of the gradient\n(nats per unit of parameter)")
    for axis in (*axes[1, :2], axes[0, 2]):
        axis.set_xlabel("log-density evaluations")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    axes.flat[-1].axis("off")
    title = "KL(q ‖ p): the value" if kind == "value" else "KL(q ‖ p): its gradient"
    axes.flat[-1].legend(handles, labels, loc="center", frameon=False, title=title, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_panel(axis: Any, rows: Sequence[Row]) -> None:
    for name in dict.fromkeys(row["estimator"] for row in rows):
        own = [row for row in rows if row["estimator"] == name]
        color, marker, line = STYLES[name]
        points = [row["evaluations"] for row in own], [row["rmse"] for row in own]
        axis.loglog(*points, color=color, marker=marker, linestyle=line, markersize=4, linewidth=1.5, label=name)
    ends = [pick(row["evaluations"] for row in rows) for pick in (min, max)]
    lowest = min(row["rmse"] * row["evaluations"] ** 0.5 for row in rows)
    guide = [0.5 * lowest / end**0.5 for end in ends]  # below every line
    axis.loglog(ends, guide, color="0.6", linestyle=":", linewidth=1, label="slope of $S^{-1/2}$")
    axis.grid(color="0.9", linewidth=0.5)


def main() -> int:
    """Check, measure, print, draw; return the exit status."""
    parser = argument_parser(__doc__)
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw the two figures into DIR")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes, rounds = ((1, 16, 64), 4) if arguments.quick else (SAMPLE_SIZES, 16)
    rows: list[Row] = []
    titles: dict[str, str] = {}
    disagreements: list[str] = []
    for pair in pairs():
        truth, wrong = reference(pair)
        disagreements += wrong + check(pair, truth)
        titles[pair.name] = f"{pair.name}\nKL {truth[0].item():.3g}: {pair.story}"
        own = [row for num_samples in sizes for row in measure(pair, truth, num_samples, rounds)]
        rows += own
        for kind in ESTIMATORS:
            title = f"{pair.name}, {kind}: reference {_summary(truth[:1] if kind == 'value' else truth[1:]):.6g}"
            show(title, [r for r in own if r["kind"] == kind and r["num_samples"] in SHOWN_SIZES], COLUMNS)
    if arguments.figures is not None:
        arguments.figures.mkdir(parents=True, exist_ok=True)
        draw(rows, "value", titles, arguments.figures / "estimator_gap.png")
        draw(rows, "gradient", titles, arguments.figures / "estimator_gap_gradients.png")
    return finish(arguments.json, rows, disagreements)


if __name__ == "__main__":
    raise SystemExit(main())
