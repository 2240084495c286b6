"""Train a VAE on scikit-learn's digits whose latent is an angle: q(z|x) = VonMises, p(z) uniform on the circle.

    python examples/circular_latent.py --out runs/circular_latent

VonMises has no `rsample`, and needs none here: the expectation of log p(x|z) is a sum over a grid of angles, each
weighted by q (on a circle the error of such a sum falls exponentially). One decoded image an angle serves the whole
batch.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, Uniform, VonMises

from torch_klloss import AutoKL
from torch_klloss.plots import reconstruction_figure

NUM_TRAIN = 1500
NUM_ANGLES = 64
MAX_CONCENTRATION = 60.0  # beyond it q falls between two angles of the grid


class CircularVAE(nn.Module):
    """A VAE whose latent is one angle."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 3))
        self.decoder = nn.Sequential(nn.Linear(2, 128), nn.ReLU(), nn.Linear(128, 64))
        self.kl = AutoKL()

    def posterior(self, x: Tensor) -> VonMises:
        """Return q(z|x)."""
        east, north, width = self.encoder(x).unbind(-1)
        return VonMises(torch.atan2(north, east), 0.1 + MAX_CONCENTRATION * torch.sigmoid(width))

    def decode(self, angle: Tensor) -> Independent:
        """Return p(x|z), which has no seam at ±π."""
        return Independent(Bernoulli(logits=self.decoder(torch.stack([angle.cos(), angle.sin()], -1))), 1)

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return -E_q[log p(x|z)] and KL(q(z|x)‖p(z)), in nats per image."""
        q = self.posterior(x)
        angles = 2 * math.pi * torch.arange(NUM_ANGLES) / NUM_ANGLES - math.pi
        weights = q.log_prob(angles.unsqueeze(-1)).softmax(0)  # [angles, images]
        log_likelihood = self.decode(angles).expand((len(x), NUM_ANGLES)).log_prob(x.unsqueeze(1))
        return -(weights.T * log_likelihood).sum(-1).mean(), self.kl(q, Uniform(-math.pi, math.pi))


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train; print and return the bound on held-out images; draw the circle."""
    parser = argparse.ArgumentParser(description="A VAE whose latent is an angle.")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/circular_latent"), help="folder for the figure")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # small models are several times slower on two
    torch.manual_seed(args.seed)
    images = (torch.as_tensor(load_digits().data, dtype=torch.float32) > 8).float()
    images = images[torch.randperm(len(images))]
    train, held_out = images[:NUM_TRAIN], images[NUM_TRAIN:]

    model = CircularVAE()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(args.epochs):
        for rows in torch.randperm(len(train)).split(128):
            optimiser.zero_grad()
            sum(model.terms(train[rows])).backward()
            optimiser.step()

    with torch.no_grad():
        reconstruction, kl = (term.item() for term in model.terms(held_out))
        circle = model.decode(2 * math.pi * torch.arange(12) / 12).mean
        shown = held_out[:12]
        rows = shown, model.decode(model.posterior(shown).mean).mean, circle
    args.out.mkdir(parents=True, exist_ok=True)
    reconstruction_figure(*(row.view(-1, 8, 8) for row in rows)).savefig(args.out / "circle.png")
    route = model.kl.route(model.posterior(shown), Uniform(-math.pi, math.pi))
    print(f"KL(VonMises‖Uniform) takes the route {route!r}")
    print(
        f"held-out ELBO {-(reconstruction + kl):.2f}: reconstruction {reconstruction:.2f}, KL {kl:.2f} nats per image"
    )
    print(f"figure: {args.out / 'circle.png'}, its last row once round the circle")
    return {"reconstruction": reconstruction, "kl": kl}


if __name__ == "__main__":
    main()
