"""Hold a policy to a reference while it learns from a reward, by the exact steps of the KL, by k1 and by k3.

    python examples/reference_kl.py --out runs/reference_kl

The policy writes sequences of tokens, each given the one before, so that the KL of its sequences and its gradient can
be summed exactly. At points of the training every estimator computes both from many batches: how far its mean is from
the exact sum is its bias, and how far a batch is from the mean its noise. "k3 backpropagated" is what many trainers do.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from torch_klloss.language import ReferenceKL, log_probs_of, token_kl
from torch_klloss.plots import BLUE, GREEN, INK, VERMILION, new_figure, tidy_axes

VOCABULARY, LENGTH, BATCH = 16, 12, 32
WEIGHT = 1.0  # of the KL
Estimator = Callable[[Tensor, Tensor, Tensor], Tensor]


def logits_of(table: Tensor, tokens: Tensor) -> Tensor:
    """Return the logits `[batch, time, vocabulary]` of every token, given the one before; the first follows token 0."""
    return table[torch.nn.functional.pad(tokens[:, :-1], (1, 0))]


def draw(table: Tensor) -> Tensor:
    """Return sequences `[batch, time]` of the policy."""
    last, tokens = torch.zeros(BATCH, dtype=torch.long), []
    for _ in range(LENGTH):
        last = table.detach()[last].softmax(-1).multinomial(1).squeeze(-1)
        tokens.append(last)
    return torch.stack(tokens, -1)


def exact_sum(policy: Tensor, reference: Tensor) -> Tensor:
    """Return the KL of the sequences, summed over the law of the token before every step."""
    transition, of_steps = policy.softmax(-1), token_kl(policy, reference)
    law, total = torch.nn.functional.one_hot(torch.tensor(0), VOCABULARY).to(policy.dtype), 0.0
    for _ in range(LENGTH):
        total, law = total + law @ of_steps, law @ transition
    return total


def with_loss(estimator: str) -> Estimator:
    """Return an estimator of the library."""
    loss = ReferenceKL(estimator)

    def estimate(policy: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
        return loss(policy=logits_of(policy, tokens), reference=logits_of(reference, tokens), tokens=tokens)

    return estimate


def k3_backpropagated(policy: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
    """Return the sum of exp(-l) - 1 + l of l = log q/p of the tokens, to be differentiated as it stands."""
    log_ratio = log_probs_of(logits_of(policy, tokens), tokens) - log_probs_of(logits_of(reference, tokens), tokens)
    return (torch.exp(-log_ratio) - 1 + log_ratio).sum(-1).mean()


ESTIMATORS: dict[str, Estimator] = {
    "exact steps": with_loss("exact"),
    "k1": with_loss("k1"),
    "k3": with_loss("k3"),
    "k3 backpropagated": k3_backpropagated,
}
STYLES = dict(
    zip(
        ESTIMATORS,
        ((BLUE, "-"), (GREEN, (0, (4, 2))), (INK, (0, (1, 1.2))), (VERMILION, (0, (4, 1, 1, 1)))),
        strict=True,
    )
)


def measure(estimator: Estimator, policy: Tensor, reference: Tensor, num_batches: int) -> dict[str, float]:
    """Return bias and noise of value and gradient, relative to the exact sum, and what the biases may be by chance."""
    leaf = policy.detach().clone().requires_grad_()
    truth = exact_sum(leaf, reference)
    (gradient,) = torch.autograd.grad(truth, leaf)
    values, gradients = [], []
    for _ in range(num_batches):
        value = estimator(leaf, reference, draw(leaf))
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value, leaf)[0])
    value, by_policy, size = torch.stack(values), torch.stack(gradients), gradient.norm()
    noise = (by_policy.var(0).sum().sqrt() / size).item()
    return {
        "bias": ((value.mean() - truth) / truth).item(),
        "noise": (value.std() / truth).item(),
        "gradient bias": ((by_policy.mean(0) - gradient).norm() / size).item(),
        "gradient noise": noise,
        "chance": noise / num_batches**0.5,
        "KL": truth.item(),
    }


def train(steps: int, num_batches: int, seed: int) -> list[dict[str, dict[str, float]]]:
    """Train by the exact steps, and measure every estimator at eight points of it."""
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(VOCABULARY, VOCABULARY, generator=generator)
    policy = (reference + 0.05 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)).requires_grad_()
    optimiser, kl, points = torch.optim.Adam([policy], lr=0.02), ESTIMATORS["exact steps"], []
    torch.manual_seed(seed)
    for step in track(range(steps), "training"):
        if step % max(1, steps // 8) == 0:
            found = {name: measure(some, policy, reference, num_batches) for name, some in ESTIMATORS.items()}
            points.append({"step": {"step": step}, **found})
        tokens = draw(policy)
        reward = (tokens % 4 == 0).float().sum(-1)  # of every fourth token
        score = log_probs_of(logits_of(policy, tokens), tokens).sum(-1)
        loss = -((reward - reward.mean()) * score).mean() + WEIGHT * kl(policy, reference, tokens)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return points


def plot(points: list[dict[str, dict[str, float]]], path: Path) -> None:
    """Draw noise and bias of the gradients over the KL that the training has reached."""
    figure = new_figure(9, 4.4)
    left, right = figure.subplots(1, 2, sharex=True)
    reached = [point["k1"]["KL"] for point in points]
    for name, (colour, style) in STYLES.items():
        for axes, key in ((left, "gradient noise"), (right, "gradient bias")):
            line = [point[name][key] for point in points]
            axes.plot(reached, line, color=colour, linestyle=style, marker="o", markersize=3, label=name)
    chance = [point["k1"]["chance"] for point in points]
    right.fill_between(reached, 0, chance, color=INK, alpha=0.12, linewidth=0, label="chance, for k1")
    for axes, title in ((left, "noise of a batch"), (right, "bias of the mean")):
        axes.set(title=title, xlabel="exact KL of the sequences, nats", xscale="log", yscale="log")
        tidy_axes(axes)
    left.set_ylabel("relative to the exact gradient")
    figure.suptitle("Gradient of KL(policy‖reference), from sampled sequences")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path)


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Train, print a table, draw a figure, and return what was measured last."""
    parser = argparse.ArgumentParser(description="A policy held to a reference: exact steps, k1 and k3.")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--batches", type=int, default=400, help="of every measurement (default 400)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/reference_kl"), help="folder for the figure")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", ".*a Pareto tail")  # of k3, whose noise is the point here
    torch.set_num_threads(1)  # small models are several times slower on two
    args.out.mkdir(parents=True, exist_ok=True)

    points = train(args.steps, args.batches, args.seed)
    last = {name: points[-1][name] for name in ESTIMATORS}
    table = Table(
        title=f"KL(policy‖reference) = {last['k1']['KL']:.3f} nats a sequence, from {args.batches} batches of {BATCH}"
    )
    for column in ("", "bias", "noise", "gradient: bias", "by chance", "noise"):
        table.add_column(column, justify="right" if column else "left")
    for name, found in last.items():
        keys = ("bias", "noise", "gradient bias", "chance", "gradient noise")
        table.add_row(name, *(f"{found[key]:+.1%}" if key == "bias" else f"{found[key]:.1%}" for key in keys))
    path = args.out / "estimators.png"
    plot(points, path)
    console = Console(width=110)
    console.print(table)
    console.print(f"relative to the exact sum and its gradient; figure: {path}", soft_wrap=True)
    return last


if __name__ == "__main__":
    main()
