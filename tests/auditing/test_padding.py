# ruff: noqa: RET504 -- the audit goes by the names of variables
"""Sequences with padding: where a step has a mask or lengths, its KL has to leave the padding out."""

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Normal, kl_divergence

from torch_klloss.auditing import audit_module

LENGTHS = torch.tensor([7, 2, 5, 3, 6, 5])


def steps_of(mu, logvar):
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(-1)


def as_named(name, n, real):
    """What a step holds under a name."""
    if name == "lengths":
        return n
    if name == "noise_mask":
        return torch.rand(real.shape) < 0.5
    if name == "padding_mask":
        return ~real
    return real.float() if name == "mask" else None


def report_on(kl_of, *, mask="mask", lengths=LENGTHS):
    """The report on a step with a mask of this name, whose KL is computed from the KL of each step and the mask."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.enc = nn.Linear(5, 8)

        def training_step(self, batch, batch_idx):
            x, n = batch
            real = torch.arange(x.shape[1]) < n[:, None]
            held = {mask: as_named(mask, n, real)}
            mu, logvar = self.enc(x).chunk(2, -1)
            kl_loss = kl_of(steps_of(mu, logvar), real)
            return kl_loss + 0 * len(held)

    torch.manual_seed(1)
    return audit_module(Model(), (torch.randn(6, 7, 5), lengths))


COUNTED = {
    "summed": lambda steps, real: steps.sum(1).mean(),
    "a token": lambda steps, real: steps.mean(),
    "all": lambda steps, real: steps.sum(),
    "an example": lambda steps, real: steps.sum(1),
}
LEFT_OUT = {
    "summed": lambda steps, real: (steps * real).sum(1).mean(),
    "a token": lambda steps, real: steps[real].mean(),
    "a token by division": lambda steps, real: (steps * real).sum() / real.sum(),
    "all": lambda steps, real: (steps * real).sum(),
    "an example": lambda steps, real: (steps * real).sum(1),
    "a step": lambda steps, real: steps * real,
    "means of means": lambda steps, real: ((steps * real).sum(1) / real.sum(1)).mean(),
}


@pytest.mark.parametrize("mask", ["mask", "lengths", "padding_mask"])
@pytest.mark.parametrize("kl", COUNTED)
def test_padding_that_is_counted_is_wrong_beside_a_mask(mask, kl):
    report = report_on(COUNTED[kl], mask=mask)
    assert [finding.mistakes for finding in report.findings] == [("padding-counted",)], report


@pytest.mark.parametrize("kl", LEFT_OUT)
def test_the_kl_without_the_padding_is_right_in_every_reduction(kl):
    report = report_on(LEFT_OUT[kl])
    assert report.ok, report


def test_a_mean_over_all_steps_of_a_masked_kl_is_wrong():
    report = report_on(lambda steps, real: (steps * real).mean())
    assert report.findings[0].mistakes == ("padding-in-the-mean",)


@pytest.mark.parametrize(
    ("mask", "lengths"),
    [("mask", torch.full((6,), 7)), ("noise_mask", LENGTHS), ("none", LENGTHS)],
    ids=["without padding", "a mask of something else", "without a mask"],
)
def test_a_step_without_padding_is_judged_as_before(mask, lengths):
    assert report_on(COUNTED["summed"], mask=mask, lengths=lengths).ok


def test_padding_of_tokens_and_of_sampled_kls_is_found():
    class Tokens(nn.Module):
        def training_step(self, batch, batch_idx):
            x, lengths = batch  # noqa: RUF059 -- found by its name
            q, p = Categorical(logits=x), Categorical(logits=0.3 * x.flip(-1))
            kl = kl_divergence(q, p).sum(1).mean()
            return kl

    class Sampled(nn.Module):
        def training_step(self, batch, batch_idx):
            x, lengths = batch
            mask = torch.arange(x.shape[1]) < lengths[:, None]
            q, p = Normal(x, 0.5), Normal(0.0, 1.0)
            z = q.rsample()
            kl = ((q.log_prob(z) - p.log_prob(z)).sum(-1) * mask).sum(1).mean()
            return kl

    batch = (torch.randn(6, 7, 5), LENGTHS)
    assert audit_module(Tokens(), batch).findings[0].mistakes == ("padding-counted",)
    report = audit_module(Sampled(), batch)
    assert report.ok, report
