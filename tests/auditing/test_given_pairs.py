# ruff: noqa: RET504 -- the audit goes by the names of variables
"""Sampled KLs in a training step with given pairs: compared at the step's samples, or in the mean over many runs."""

import pytest
import torch
from torch import nn
from torch.distributions import AffineTransform, Independent, Normal, TransformedDistribution

from torch_klloss.auditing import audit_module


def with_step(kl_of):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.enc, self.a = nn.Linear(12, 8), nn.Parameter(torch.tensor([0.5, -0.3, 0.2, 0.1]))

        def training_step(self, batch, batch_idx):
            kl = kl_of(self, *self.enc(batch).chunk(2, -1))
            return kl

    torch.manual_seed(1)
    return Model(), torch.randn(16, 12)


def plain(module, x):
    mu, logvar = module.enc(x).chunk(2, -1)
    q = Independent(Normal(mu, (0.5 * logvar).exp()), 1)
    return {"kl": (q, Independent(Normal(torch.zeros(4), 1.0), 1))}


def flow(module, x):
    q, p = plain(module, x)["kl"]
    return {"kl": (TransformedDistribution(q, [AffineTransform(0.0, module.a.exp(), event_dim=1)]), p)}


def sampled(self, mu, logvar):
    std = (0.5 * logvar).exp()
    z = mu + std * torch.randn_like(mu)
    return (Normal(mu, std).log_prob(z) - Normal(0.0, 1.0).log_prob(z)).sum(-1).mean()


def sampled_flow(self, mu, logvar):
    std = (0.5 * logvar).exp()
    z0 = mu + std * torch.randn_like(mu)
    log_q = Normal(mu, std).log_prob(z0).sum(-1) - self.a.sum()
    return (log_q - Normal(0.0, 1.0).log_prob(z0 * self.a.exp()).sum(-1)).mean()


def without_points(self, mu, logvar):
    e = torch.randn_like(mu)
    return 0.5 * ((mu + (0.5 * logvar).exp() * e) ** 2 - e**2 - logvar).sum(-1).mean()


def without_determinant(self, mu, logvar):
    return sampled_flow(self, mu, logvar) + self.a.sum()


def mean_over_latents(self, mu, logvar):
    return without_points(self, mu, logvar) / 4


@pytest.mark.parametrize("pairs", [None, plain])
def test_a_sampled_kl_is_right_with_pairs_and_without(pairs):
    report = audit_module(*with_step(sampled), pairs=pairs)
    assert report.ok, report
    assert "from the samples of this step" in str(report)


def test_a_flow_is_right_at_the_samples_of_the_step():
    report = audit_module(*with_step(sampled_flow), pairs=flow)
    assert report.ok, report


def test_a_kl_without_points_is_judged_by_its_mean():
    report = audit_module(*with_step(without_points), pairs=plain)
    assert report.ok, report
    assert "the mean of 64 runs" in str(report)
    assert report.findings[0].ratio == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize(
    ("kl", "pairs", "mistakes"), [(without_determinant, flow, ()), (mean_over_latents, plain, ("mean-over-latent",))]
)
def test_a_mean_that_is_not_the_kl_is_not_called_right(kl, pairs, mistakes):
    report = audit_module(*with_step(kl), pairs=pairs)
    assert not report.ok
    assert report.findings[0].mistakes == mistakes
    assert "the mean of 64 runs" in str(report)
