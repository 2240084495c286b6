# ruff: noqa: RET504 -- the audit goes by the names of variables
"""`audit_module` for other families than the Normal, and for KLs that are no numbers or have no KL's shape."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.distributions import (
    Bernoulli,
    Categorical,
    Gamma,
    Laplace,
    MixtureSameFamily,
    Normal,
    kl_divergence,
)

from torch_klloss.auditing import audit_module


def audited(kl_of):
    """The report on a step whose KL is that of the encoder's output."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.encoder = nn.Linear(6, 8)

        def training_step(self, batch, batch_idx):
            return kl_of(self.encoder(batch))

    torch.manual_seed(1)
    return audit_module(Model(), torch.randn(12, 6))


def laplaces(output):
    location, log_scale = output.chunk(2, dim=1)
    return Laplace(location, log_scale.exp()), Laplace(torch.zeros_like(location), torch.ones_like(location))


def right_laplace(output):
    q, p = laplaces(output)
    kl = kl_divergence(q, p).sum(1).mean()
    return kl


def sampled_laplace(output):
    q, p = laplaces(output)
    z = q.rsample()
    kl = (q.log_prob(z) - p.log_prob(z)).sum(1).mean()
    return kl


def swapped_laplace(output):
    q, p = laplaces(output)
    kl = kl_divergence(p, q).sum(1).mean()
    return kl


def sampled_against_a_mixture(output):
    location, log_scale = output.chunk(2, dim=1)
    q = Normal(location, log_scale.exp())
    p = MixtureSameFamily(Categorical(torch.ones(2)), Normal(torch.tensor([-1.0, 1.0]), torch.ones(2)))
    z = q.rsample()
    kl = (q.log_prob(z) - p.log_prob(z)).sum(1).mean()
    return kl


def gammas_averaged(output):
    shape, rate = output.exp().chunk(2, dim=1)
    posterior, prior = Gamma(shape, rate), Gamma(torch.ones_like(shape), torch.ones_like(rate))
    kl_loss = kl_divergence(posterior, prior).mean()
    return kl_loss


def categorical_summed(output):
    q, p = Categorical(logits=output), Categorical(logits=torch.zeros_like(output))
    kl = kl_divergence(q, p).sum()
    return kl


def bernoulli_swapped_and_averaged(output):
    q, p = Bernoulli(logits=output), Bernoulli(logits=torch.zeros_like(output))
    kl = kl_divergence(p, q).mean()
    return kl


def kl_div_with_its_default(output):
    student, teacher = output, output.flip(1)
    kl = F.kl_div(student.log_softmax(-1), teacher.softmax(-1))
    return kl


def not_a_number(output):
    mu, logvar = output.chunk(2, dim=1)
    kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(1).mean() * float("nan")
    return kl


def column_against_row(output):
    mu, logvar = output.chunk(2, dim=1)
    kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(1)
    kl_loss = kl[:, None] + torch.zeros(len(kl))
    return kl_loss.mean()


@pytest.mark.parametrize(
    "kl_of", [right_laplace, sampled_laplace, sampled_against_a_mixture, categorical_summed], ids=lambda f: f.__name__
)
def test_right_kls_of_other_families_are_right(kl_of):
    report = audited(kl_of)
    assert report.ok, str(report)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.parametrize(
    ("kl_of", "mistakes"),
    [
        (swapped_laplace, "swapped"),
        (gammas_averaged, "mean-over-latent"),
        (bernoulli_swapped_and_averaged, "swapped + mean-over-latent"),
        (kl_div_with_its_default, "mean-over-latent"),
        (not_a_number, "not-a-number"),
        (column_against_row, "wrong-shape"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_wrong_kls_of_other_families_are_wrong_and_named(kl_of, mistakes):
    report = audited(kl_of)
    assert not report.ok
    assert mistakes in [found for finding in report.findings for found in finding.mistakes], str(report)
