"""What does a loss of this library cost a training step, compared with torch's KL and the usual one-liner?

The peers compute the KL of a diagonal Normal posterior against the standard Normal, sum it over the latent dimensions
and take the mean over the batch. Three questions, each forward alone and forward with backward:

- "same pair": q and p exist already, and every peer is given the same two objects. The leaves, to which every peer
  differentiates, are (loc, scale) for "Normal" and for "Independent", which wraps it, and (mean, logvar) for
  "diagonal_normal".
- "from (mean, logvar)": includes the construction of q and p, and compares with the one-liner too.
- "from (mean, logvar), with a draw": a VAE's step also needs z = q.rsample(), and with it the standard deviation, which
  `diagonal_normal` does not compute for the KL.

Values and gradients are checked in float64 before anything is timed; a disagreement gives exit status 1. Times are
medians over rounds in which the peers take turns; a ratio is the median of the ratios within a round. One thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from common import Row, argument_parser, finish, interleaved, median, quartiles, ratios, show
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal
from torch.distributions import kl_divergence as torch_kl

from torch_klloss import AnalyticKL, AutoKL, MonteCarloKL, diagonal_normal, standard_normal_like

SIZES = ((128, 32), (1024, 128), (4096, 512))
LOSSES = {"AutoKL": AutoKL(), "AnalyticKL": AnalyticKL(), "MonteCarloKL(1)": MonteCarloKL(1)}
TARGET = 1.15  # AutoKL over torch, same pair, at the first size
COLUMNS = {
    "peer": "peer",
    "value": "value (nats)|.6f",
    "value_error": "error|.1e",
    "gradient_error": "gradient error|.1e",
    "forward_us": "forward (µs)|.1f",
    "forward_ratio": "÷ torch|.2f",
    "both_us": "and backward (µs)|.1f",
    "both_ratio": "÷ torch|.2f",
    "one_liner_ratio": "÷ one-liner|.2f",
}


@dataclass(frozen=True)
class Case:
    """The peers of one question: losses of the same leaves, by name; "torch" is the baseline."""

    name: str
    leaves: tuple[Tensor, Tensor]
    peers: dict[str, Callable[[], Tensor]]
    gives_logvar: bool  # the second leaf is a log-variance, not a standard deviation
    outlives_step: bool  # q and p are built once, outside of the timing

    def step(self, peer: str) -> None:
        """Take the peer's loss and its gradient to the leaves, as a training step does."""
        for leaf in self.leaves:
            leaf.grad = None
        # A pair that outlives the step keeps its part of the graph, at the same cost for all peers.
        self.peers[peer]().backward(retain_graph=self.outlives_step)

    def gradient(self, peer: str) -> Tensor:
        """Return the gradient after `step`, `[2, batch, latent]`."""
        self.step(peer)
        return torch.stack([leaf.grad for leaf in self.leaves if leaf.grad is not None])


def cases(mean: Tensor, logvar: Tensor) -> list[Case]:
    """Return the questions for one posterior."""
    leaf_mean, leaf_logvar = (t.clone().requires_grad_() for t in (mean, logvar))
    loc, scale = mean.clone().requires_grad_(), (0.5 * logvar).exp().requires_grad_()
    normal = Normal(loc, scale), Normal(torch.zeros_like(loc), torch.ones_like(scale))
    q = diagonal_normal(leaf_mean, leaf_logvar)

    def same(name: str, leaves: tuple[Tensor, Tensor], q: Distribution, p: Distribution, gives_logvar: bool) -> Case:
        peers = {"torch": lambda: _per_example(torch_kl(q, p)).mean()}
        peers |= {name: partial(loss, q, p) for name, loss in LOSSES.items()}
        return Case(f"same pair: {name}", leaves, peers, gives_logvar, outlives_step=True)

    independent = Independent(normal[0], 1), Independent(normal[1], 1)
    return [
        same("Normal", (loc, scale), *normal, gives_logvar=False),
        same("Independent", (loc, scale), *independent, gives_logvar=False),
        same("diagonal_normal", (leaf_mean, leaf_logvar), q, standard_normal_like(q), gives_logvar=True),
        Case(
            "from (mean, logvar)",
            (leaf_mean, leaf_logvar),
            from_parameters(leaf_mean, leaf_logvar, draw=False),
            gives_logvar=True,
            outlives_step=False,
        ),
        Case(
            "from (mean, logvar), with a draw",
            (leaf_mean, leaf_logvar),
            from_parameters(leaf_mean, leaf_logvar, draw=True),
            gives_logvar=True,
            outlives_step=False,
        ),
    ]


def from_parameters(mean: Tensor, logvar: Tensor, *, draw: bool) -> dict[str, Callable[[], Tensor]]:
    """Return the peers that build q and p in every step, and draw z if `draw`."""

    def with_draw(kl: Tensor, sample: Callable[[], Tensor]) -> Tensor:
        return kl + 0 * sample().sum() if draw else kl  # forward and backward cost, no effect

    def by_torch() -> Tensor:
        q = Normal(mean, (0.5 * logvar).exp())
        p = Normal(torch.zeros_like(mean), torch.ones_like(mean))
        return with_draw(torch_kl(q, p).sum(-1).mean(), q.rsample)

    def by_hand() -> Tensor:
        kl = (-0.5 * (1 + logvar - mean**2 - logvar.exp())).sum(-1).mean()
        return with_draw(kl, lambda: mean + torch.randn_like(mean) * (0.5 * logvar).exp())

    def by_loss(loss: torch.nn.Module) -> Tensor:
        q = diagonal_normal(mean, logvar)
        return with_draw(loss(q, standard_normal_like(q)), q.rsample)

    return {"torch": by_torch, "one-liner": by_hand} | {name: partial(by_loss, loss) for name, loss in LOSSES.items()}


def _per_example(kl: Tensor) -> Tensor:
    return kl if kl.dim() == 1 else kl.sum(-1)


def checked(case: Case, mean: Tensor, logvar: Tensor) -> tuple[dict[str, Row], list[str]]:
    """Compare every peer with the formula in float64; return its row so far, and the disagreements.

    An exact peer makes at most 16 roundings an element, of quantities no larger than 1 + |v| + μ² + exp(v), and
    log2(n) in a pairwise sum. A sampled one is allowed six standard errors, estimated from its own examples.
    """
    m, v = mean.double(), logvar.double()
    true_value = (0.5 * (m**2 + v.exp() - 1 - v)).sum(-1).mean()
    by_logvar = v.expm1() / 2
    # d/dσ = 2/σ d/dv
    truth = torch.stack([m, by_logvar if case.gives_logvar else 2 * by_logvar * (-v / 2).exp()]) / len(m)
    eps = torch.finfo(mean.dtype).eps
    magnitude = 1 + v.abs() + m**2 + v.exp() + (0 if case.gives_logvar else (-v / 2).exp())
    value_bound = (16 + math.log2(m.numel())) * eps * magnitude.sum(-1).mean()
    gradient_bound = 16 * eps * magnitude / len(m)
    rows, disagreements = {}, []
    for peer, loss in case.peers.items():
        value, gradient = loss().detach(), case.gradient(peer).double()
        value_error, gradient_errors = (value.double() - true_value).abs(), gradient - truth
        if peer.startswith("MonteCarlo"):
            # log q - log p = ½ (z² - ε²) - v/2 with z = μ + σε: its variance an element is ½ (σ² - 1)² + μ²σ²
            variance = 0.5 * v.expm1() ** 2 + m**2 * v.exp()
            good = value_error < 6 * variance.sum().sqrt() / len(m)
            flat = gradient_errors.flatten(1)
            good &= (flat.mean(1).abs() < 6 * flat.std(1) / flat.shape[1] ** 0.5).all()
        else:
            good = (value_error < value_bound) & (gradient_errors.abs() < gradient_bound).all()
        if not good:
            disagreements.append(f"{case.name}, {tuple(mean.shape)}, {peer}: {value.item()} for {true_value.item()}")
        relative_gradient_error = (gradient_errors.norm() / truth.norm()).item()
        rows[peer] = {
            "case": case.name,
            "size": "x".join(map(str, mean.shape)),
            "peer": peer,
            "value": value.item(),
            "value_error": value_error.item(),
            "gradient_error": relative_gradient_error,
        }
    return rows, disagreements


def time_case(case: Case, rows: dict[str, Row], block_seconds: float, rounds: int) -> None:
    """Add the times and ratios to the rows."""
    both = {peer: partial(case.step, peer) for peer in case.peers}
    seconds: dict[str, dict[str, list[float]]] = {}
    kinds: dict[str, dict[str, Callable[[], object]]] = {"forward": {**case.peers}, "both": {**both}}
    for kind, functions in kinds.items():
        warm = interleaved(functions, rounds=5)
        calls = max(1, round(block_seconds / median(warm["torch"])))
        seconds[kind] = interleaved(functions, rounds, calls)
    for peer, row in rows.items():
        for kind, times in seconds.items():
            row[f"{kind}_us"] = 1e6 * median(times[peer])
            low, row[f"{kind}_ratio"], high = quartiles(ratios(times[peer], times["torch"]))
            row[f"{kind}_ratio_quartiles"] = low, high
        by_hand = seconds["both"].get("one-liner")
        row["one_liner_ratio"] = None if by_hand is None else median(ratios(seconds["both"][peer], by_hand))


def main() -> int:
    """Check, time, print; return the exit status."""
    arguments = argument_parser(__doc__).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = SIZES[:1] if arguments.quick else SIZES
    block_seconds, rounds = (0.0005, 20) if arguments.quick else (0.002, 100)
    rows: list[Row] = []
    disagreements: list[str] = []
    for size in sizes:
        mean, logvar = torch.randn(size), torch.randn(size)
        for case in cases(mean, logvar):
            case_rows, wrong = checked(case, mean, logvar)
            disagreements += wrong
            time_case(case, case_rows, block_seconds, rounds if math.prod(size) < 1e6 else rounds // 4)
            shown = [key for key in COLUMNS if key != "one_liner_ratio" or "one-liner" in case.peers]
            title = f"{case.name}, {size[0]}x{size[1]}"
            show(title, list(case_rows.values()), {key: COLUMNS[key] for key in shown})
            rows += case_rows.values()
    for row in rows:
        if row["peer"] == "AutoKL" and row["size"] == "128x32" and row["case"].startswith("same pair"):
            low, high = row["both_ratio_quartiles"]
            print(
                f"AutoKL ÷ torch at 128x32, {row['case']}: {row['both_ratio']:.2f} with backward (quartiles {low:.2f} "
                f"to {high:.2f}; target: at most {TARGET}), {row['forward_ratio']:.2f} forward alone"
            )
    return finish(arguments.json, rows, disagreements)


if __name__ == "__main__":
    raise SystemExit(main())
