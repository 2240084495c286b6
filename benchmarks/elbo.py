"""What does `ELBOLoss` cost a training step, compared with a VAE loss that is written by hand?

A batch of 128 images of 64 pixels, and a latent of 32 dimensions (more sizes without --quick). Three loss functions as
they are found in VAE code, each against the call that replaces it:

- "probabilities": `binary_cross_entropy(recon, x) - ½ Σ (1 + v - μ² - exp v)` and `ELBOLoss().from_tensors(...)`;
- "logits": the same with `binary_cross_entropy_with_logits`;
- "distributions": `-p_x.log_prob(x) + torch.distributions.kl_divergence(q, p)` and `ELBOLoss()(p_x, x, q, p)`, the
  construction of p_x, q and p included.

Values and gradients are checked against float64 before anything is timed; a disagreement gives exit status 1. The calls
of `ELBOLoss` do more than the hand-written loss: they check x and the log-variance, and give the KL of every dimension.
Times are medians over rounds in which the peers take turns, ratios the medians of those within a round. One thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from common import Row, argument_parser, finish, interleaved, median, quartiles, ratios, show
from torch import Tensor
from torch.distributions import Bernoulli, Independent, Normal
from torch.distributions import kl_divergence as torch_kl
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits

from torch_klloss import ELBOLoss, diagonal_normal, standard_normal_like

SIZES = ((128, 64, 32), (128, 784, 32), (1024, 3072, 128))
LOSS = ELBOLoss()
Leaves = tuple[Tensor, Tensor, Tensor]
COLUMNS = {
    "case": "loss",
    "size": "batch x pixels x latent",
    "value": "value (nats)|.4f",
    "value_error": "error|.1e",
    "gradient_error": "gradient error|.1e",
    "by_hand_us": "by hand (µs)|.1f",
    "elbo_us": "ELBOLoss (µs)|.1f",
    "forward_ratio": "÷ by hand, forward|.2f",
    "both_ratio": "and backward|.2f",
}


def one_liner(mean: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())


def hand_probabilities(recon: Tensor, mean: Tensor, logvar: Tensor, x: Tensor) -> Tensor:
    return (binary_cross_entropy(recon, x, reduction="sum") + one_liner(mean, logvar)) / len(x)


def hand_logits(recon: Tensor, mean: Tensor, logvar: Tensor, x: Tensor) -> Tensor:
    return (binary_cross_entropy_with_logits(recon, x, reduction="sum") + one_liner(mean, logvar)) / len(x)


def hand_distributions(recon: Tensor, mean: Tensor, logvar: Tensor, x: Tensor) -> Tensor:
    q = Independent(Normal(mean, (0.5 * logvar).exp()), 1)
    p = Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), 1)
    return (torch_kl(q, p) - Independent(Bernoulli(logits=recon), 1).log_prob(x)).mean()


def elbo_tensors(likelihood: str, recon: Tensor, mean: Tensor, logvar: Tensor, x: Tensor) -> Tensor:
    return LOSS.from_tensors(recon, x, mean, logvar, likelihood=likelihood).loss


def elbo_distributions(recon: Tensor, mean: Tensor, logvar: Tensor, x: Tensor) -> Tensor:
    q = diagonal_normal(mean, logvar)
    return LOSS(Independent(Bernoulli(logits=recon), 1), x, q, standard_normal_like(q)).loss


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "probabilities": (hand_probabilities, partial(elbo_tensors, "bernoulli")),
    "logits": (hand_logits, partial(elbo_tensors, "bernoulli_logits")),
    "distributions": (hand_distributions, elbo_distributions),
}


def gradients(loss: Callable[..., Tensor], leaves: Leaves, x: Tensor) -> list[Tensor]:
    for leaf in leaves:
        leaf.grad = None
    loss(*leaves, x).backward()
    return [leaf.grad.double() for leaf in leaves if leaf.grad is not None]


def checked(case: str, leaves: Leaves, x: Tensor) -> tuple[Row, list[str]]:
    """Compare ELBOLoss with the hand-written loss in float64; return the row so far, and the disagreements.

    The largest of the sums has n = pixels · batch positive terms, whose roundings add up to less than log2(n) + 16 eps.
    """
    by_hand, elbo = CASES[case]
    wide: Leaves = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)  # type: ignore[assignment]
    truth, true_gradients = by_hand(*wide, x.double()).item(), gradients(by_hand, wide, x.double())
    value, found = elbo(*leaves, x).item(), gradients(elbo, leaves, x)
    error = abs(value - truth) / abs(truth)
    gradient_error = max(((g - t).norm() / t.norm()).item() for g, t in zip(found, true_gradients, strict=True))
    bound = 64 * torch.finfo(torch.float32).eps
    row: Row = {
        "case": case,
        "size": "x".join(map(str, (*x.shape, leaves[1].shape[1]))),
        "value": value,
        "value_error": error,
        "gradient_error": gradient_error,
    }
    good = error < bound and gradient_error < bound
    return row, [] if good else [f"{case}, {row['size']}: {value} for {truth}, gradient error {gradient_error:.1e}"]


def time_case(case: str, leaves: Leaves, x: Tensor, rounds: int, block_seconds: float) -> Row:
    """Return the times of both, forward alone and with backward, and their ratios."""
    losses = dict(zip(("by_hand", "elbo"), CASES[case], strict=True))
    kinds: dict[str, dict[str, Callable[[], object]]] = {
        "forward": {name: partial(loss, *leaves, x) for name, loss in losses.items()},
        "both": {name: partial(gradients, loss, leaves, x) for name, loss in losses.items()},
    }
    row: Row = {}
    for kind, functions in kinds.items():
        calls = max(1, round(block_seconds / median(interleaved(functions, rounds=5)["by_hand"])))
        seconds = interleaved(functions, rounds, calls)
        low, row[f"{kind}_ratio"], high = quartiles(ratios(seconds["elbo"], seconds["by_hand"]))
        row[f"{kind}_ratio_quartiles"] = low, high
        row |= {f"{name}_us": 1e6 * median(times) for name, times in seconds.items()}
    return row


def main() -> int:
    """Check, time, print; return the exit status."""
    arguments = argument_parser(__doc__).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rounds, block_seconds = (20, 0.0005) if arguments.quick else (100, 0.002)
    rows: list[Row] = []
    disagreements: list[str] = []
    for batch, pixels, latent in SIZES[:1] if arguments.quick else SIZES:
        x = torch.bernoulli(torch.full((batch, pixels), 0.5))
        logits, mean, logvar = torch.randn(batch, pixels), torch.randn(batch, latent), torch.randn(batch, latent)
        for case in CASES:
            recon = logits.sigmoid() if case == "probabilities" else logits
            leaves: Leaves = tuple(t.clone().requires_grad_() for t in (recon, mean, logvar))  # type: ignore[assignment]
            row, wrong = checked(case, leaves, x)
            disagreements += wrong
            rows.append(row | time_case(case, leaves, x, max(5, min(rounds, 10**8 // x.numel())), block_seconds))
    show("ELBOLoss against the loss by hand, forward and backward", rows, COLUMNS)
    for row in rows[: len(CASES)]:
        low, high = row["both_ratio_quartiles"]
        print(f"{row['case']}, {row['size']}: {row['both_ratio']:.2f} (quartiles {low:.2f} to {high:.2f}; target: 1)")
    return finish(arguments.json, rows, disagreements)


if __name__ == "__main__":
    raise SystemExit(main())
