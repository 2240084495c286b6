"""Losses with a number of their own: floors, ceilings, clamps and priors are measured, and the evidence shows them."""

import re

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.distributions import Categorical, Normal, kl_divergence

from torch_klloss import audit


def terms(mean, logvar):
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar)


def ratio_of(report):
    return float(re.search(r"\(ratio (-?[\d.]+)", report.mistakes[0].evidence)[1])


@pytest.mark.parametrize(
    ("loss", "id", "words"),
    [
        (lambda m, v: torch.maximum(terms(m, v).sum(1).mean(), torch.tensor(1.0)), "free-nats", "floor of 1 under"),
        (lambda m, v: terms(m, v).sum().clamp(min=20.0), "free-nats", "floor of 20 under the KL, as it is reduced"),
        (lambda m, v: terms(m, v).sum(1).clamp(min=2.0), "free-nats", "floor of 2 under the KL of each example"),
        (lambda m, v: terms(m, v).mean(0).clamp(min=0.5).sum(), "free-nats", "floor of 0.5 under the batch's mean"),
        (lambda m, v: terms(m, v).clamp(min=0.1).sum(1).mean(), "free-nats", "floor of 0.1 under each element"),
        (lambda m, v: F.relu(terms(m, v).sum(1).mean() - 1.5), "free-nats", "subtracts 1.5 from the KL"),
        (lambda m, v: terms(m, v).sum(1).mean().clamp(max=2.5), "ceiling", "ceiling of 2.5 over"),
        (lambda m, v: terms(m, v.clamp(-1, 1)).sum(1).mean(), "clamped-spread", "min=-1, max=1"),
        (lambda m, v: terms(m, v.clamp(max=0.5)).sum(1), "clamped-spread", "log-variance at ordinary values: max=0.5"),
        (
            lambda m, v: kl_divergence(Normal(m, (v / 2).exp()), Normal(0.3, 0.5)).sum(1).mean(),
            "another-prior",
            "Normal(0.3, 0.5)",
        ),
    ],
)
def test_a_number_of_the_loss_is_measured_and_shown_where_it_acts(loss, id, words):
    report = audit(loss, signature="mean_logvar")
    assert [finding.id for finding in report.mistakes] == [id], report
    assert words in report.mistakes[0].explanation
    assert abs(ratio_of(report) - 1) > 0.02


def test_a_floor_and_a_mean_over_latents_are_both_named():
    report = audit(lambda mean, logvar: terms(mean, logvar).mean().clamp(min=0.3))
    assert {finding.id for finding in report.mistakes} == {"free-nats", "mean-over-latent"}
    assert "floor of 0.3 under" in str(report)


def test_clamps_of_four_tensors_and_floors_of_classes_are_found():
    def clamped(mu_q, std_q, mu_p, std_p):
        return kl_divergence(Normal(mu_q, std_q.clamp(min=0.7)), Normal(mu_p, std_p.clamp(min=0.7))).sum(-1).mean()

    def floored(logits_q, logits_p):
        return kl_divergence(Categorical(logits=logits_q), Categorical(logits=logits_p)).mean().clamp(min=0.5)

    assert "standard deviation at ordinary values: min=0.7" in str(audit(clamped))
    assert "floor of 0.5" in str(audit(floored))


def test_a_clamp_far_out_is_no_mistake():
    assert audit(lambda mean, logvar: terms(mean, logvar.clamp(-20, 10)).sum(-1).mean()).ok


def test_the_evidence_against_an_unknown_loss_is_where_it_is_farthest_off():
    report = audit(lambda mean, logvar: terms(mean, logvar).sum(-1).mean() + torch.relu(mean - 1).sum() ** 2)
    assert report.mistakes[0].id == "unknown"
    assert abs(ratio_of(report) - 1) > 0.5


def test_a_target_that_is_the_same_for_every_q_is_named():
    def loss(logits_q, logits_p):
        target = torch.full_like(logits_p, 1 / logits_p.shape[-1])
        return F.kl_div(logits_p.log_softmax(-1), target, reduction="batchmean")

    assert audit(loss).mistakes[0].id == "uniform-for-q"
    assert audit(lambda logits_q, logits_p: loss(logits_p, logits_q)).mistakes


def test_k3_is_no_loss_of_classes():
    def sampled(logits_q, logits_p):
        q, p = Categorical(logits=logits_q), Categorical(logits=logits_p)
        x = q.sample()
        log_r = p.log_prob(x) - q.log_prob(x)
        return (log_r.exp() - 1 - log_r).mean()

    def weighted(logits_q, logits_p):
        log_q, log_p = logits_q.log_softmax(-1), logits_p.log_softmax(-1)
        log_r = log_p - log_q
        return (log_q.exp().detach() * (log_r.exp() - 1 - log_r)).sum(-1).mean()

    for loss in (sampled, weighted):
        report = audit(loss)
        assert [finding.id for finding in report.mistakes] == ["gradient-of-other-direction"], report
