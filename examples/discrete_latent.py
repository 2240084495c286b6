"""Train a VAE on scikit-learn's digits with a Categorical latent: the index of one of 20 prototypes.

    python examples/discrete_latent.py --out runs/discrete_latent

A finite latent needs no sample and no relaxation: its support is enumerated, and each value weighted by its probability
under q. The prior learns how common every prototype is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Independent

from torch_klloss import AutoKL, categorical
from torch_klloss.plots import reconstruction_figure

NUM_TRAIN = 1500
NUM_VALUES = 20


class DiscreteVAE(nn.Module):
    """A VAE whose latent has `NUM_VALUES` values; their prototypes begin as the given images, `[values, 64]`."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, NUM_VALUES))
        self.prototypes = nn.Parameter(4 * images - 2)
        self.prior_logits = nn.Parameter(torch.zeros(NUM_VALUES))
        self.kl = AutoKL()

    def posterior(self, x: Tensor) -> Categorical:
        """Return q(z|x)."""
        return categorical(self.encoder(x))

    def prior(self) -> Categorical:
        """Return p(z)."""
        return categorical(self.prior_logits)

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return -E_q[log p(x|z)], summed over the support of q, and KL(q(z|x)‖p(z)), in nats per image."""
        q = self.posterior(x)
        values = q.enumerate_support(expand=False)  # [values, 1]
        weights = q.log_prob(values).exp()  # [values, images]
        log_likelihood = Independent(Bernoulli(logits=self.prototypes[values]), 1).log_prob(x)
        return -(weights * log_likelihood).sum(0).mean(), self.kl(q, self.prior())


def purity(values: Tensor, labels: Tensor) -> float:
    """Return the share of images whose digit is the most common one for their latent value."""
    counts = torch.zeros(NUM_VALUES, 10)
    counts.index_put_((values, labels), torch.ones(len(values)), accumulate=True)
    return (counts.max(1).values.sum() / len(values)).item()


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train; print and return bound and purity on held-out images; draw the prototypes."""
    parser = argparse.ArgumentParser(description="A VAE with a Categorical latent, by enumeration.")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/discrete_latent"), help="folder for the figure")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # small models are several times slower on two
    torch.manual_seed(args.seed)
    digits = load_digits()
    order = torch.randperm(len(digits.data))
    images = (torch.as_tensor(digits.data)[order] > 8).float()
    labels = torch.as_tensor(digits.target)[order]
    train, held_out = images[:NUM_TRAIN], images[NUM_TRAIN:]

    model = DiscreteVAE(train[:NUM_VALUES])
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(args.epochs):
        for rows in torch.randperm(len(train)).split(128):
            optimiser.zero_grad()
            sum(model.terms(train[rows])).backward()
            optimiser.step()

    with torch.no_grad():
        reconstruction, kl = (term.item() for term in model.terms(held_out))
        q = model.posterior(held_out)
        values = q.logits.argmax(-1)
        prototypes = model.prototypes.sigmoid()
        common = model.prior_logits.argsort(descending=True)[:12]
        shown = held_out[:12], prototypes[values[:12]], prototypes[common]
    args.out.mkdir(parents=True, exist_ok=True)
    reconstruction_figure(*(row.view(-1, 8, 8) for row in shown)).savefig(args.out / "prototypes.png")
    results = {"reconstruction": reconstruction, "kl": kl, "purity": purity(values, labels[NUM_TRAIN:])}
    print(f"KL(Categorical‖Categorical) takes the route {model.kl.route(q, model.prior())!r}")
    print(
        f"held-out ELBO {-(reconstruction + kl):.2f}: reconstruction {reconstruction:.2f}, KL {kl:.2f} nats per image"
    )
    print(f"{results['purity']:.1%} of the images have the digit of their prototype; training used no labels")
    print(f"figure: {args.out / 'prototypes.png'}, its last row the commonest prototypes")
    return results


if __name__ == "__main__":
    main()
