"""Fit a posterior over the weights of a linear regression on scikit-learn's diabetes data (442 patients).

    python examples/bayesian_regression.py

The weights are one latent variable for the whole data set: no dimension indexes examples, so `batch_dims=0`, and the KL
is summed, never averaged. The likelihood of a batch of B of the N patients is weighted by N/B. With a Normal prior and
a Normal likelihood the exact posterior and the evidence are known, and serve as the comparison.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.distributions import Distribution, MultivariateNormal, Normal

from torch_klloss import AutoKL

NUM_DRAWS = 4096  # for the bound after training
NOISE = 0.7  # standard deviation of the standardised response around the regression


class Regression(nn.Module):
    """A posterior q(w) over the weights, with a full covariance."""

    def __init__(self, num_weights: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(num_weights))
        self.lower = nn.Parameter(torch.zeros(num_weights, num_weights))
        self.log_diagonal = nn.Parameter(torch.full((num_weights,), -2.0))
        self.kl = AutoKL(batch_dims=0)

    def posterior(self) -> Distribution:
        """Return q(w)."""
        scale = self.lower.tril(-1) + self.log_diagonal.exp().diag()
        return MultivariateNormal(self.mean, scale_tril=scale)

    def prior(self) -> Distribution:
        """Return p(w), the standard Normal."""
        return MultivariateNormal(torch.zeros_like(self.mean), torch.eye(len(self.mean)))

    def terms(self, x: Tensor, y: Tensor, num_draws: int = 8) -> tuple[Tensor, Tensor]:
        """Return -E_q[log p(y|x, w)], a mean over the batch, and KL(q(w)‖p(w)), in nats."""
        q = self.posterior()
        prediction = q.rsample((num_draws,)) @ x.T
        return -Normal(prediction, NOISE).log_prob(y).mean(), self.kl(q, self.prior())


def exact(x: Tensor, y: Tensor) -> tuple[MultivariateNormal, float]:
    """Return the exact posterior and the evidence log p(y|x), in nats."""
    precision = torch.eye(x.shape[1]) + x.T @ x / NOISE**2
    posterior = MultivariateNormal(torch.linalg.solve(precision, x.T @ y) / NOISE**2, precision_matrix=precision)
    evidence = MultivariateNormal(torch.zeros(len(y)), x @ x.T + NOISE**2 * torch.eye(len(y))).log_prob(y)
    return posterior, evidence.item()


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Fit; print and return the bound with its standard error, the evidence, and the KL to the exact posterior."""
    parser = argparse.ArgumentParser(description="Bayesian linear regression with a KL over the weights.")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # small models are several times slower on two
    torch.manual_seed(args.seed)
    data = load_diabetes()
    x = nn.functional.normalize(torch.as_tensor(data.data, dtype=torch.float32), dim=0) * len(data.data) ** 0.5
    y = torch.as_tensor(data.target, dtype=torch.float32)
    y = (y - y.mean()) / y.std()

    model = Regression(x.shape[1])
    optimiser = torch.optim.Adam(model.parameters(), lr=0.03)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, args.epochs)
    for _ in range(args.epochs):
        for rows in torch.randperm(len(x)).split(111):
            optimiser.zero_grad()
            nll, kl = model.terms(x[rows], y[rows])
            (len(x) * nll + kl).backward()
            optimiser.step()
        decay.step()

    posterior, evidence = exact(x, y)
    with torch.no_grad():
        q, p = model.posterior(), model.prior()
        log_likelihood = Normal(q.sample((NUM_DRAWS,)) @ x.T, NOISE).log_prob(y).sum(-1)
        kl, distance = model.kl(q, p), model.kl(q, posterior).item()
        bound, error = (log_likelihood.mean() - kl).item(), (log_likelihood.std() / NUM_DRAWS**0.5).item()
    print(f"KL(q(w)‖p(w)) takes the route {model.kl.route(q, p)!r}: {kl.item():.2f} nats")
    print(f"ELBO {bound:.2f}, evidence {evidence:.2f}: the bound lacks {evidence - bound:.2f} ± {error:.2f} nats")
    print(f"which is the KL of q to the exact posterior: {distance:.2f}")
    return {"bound": bound, "bound_std_error": error, "evidence": evidence, "distance": distance}


if __name__ == "__main__":
    main()
