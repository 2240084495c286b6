"""Audits of losses of language models: logits `[batch, time, vocabulary]` with a mask."""

import pytest
import torch
from torch.nn import functional

from torch_klloss.auditing import CATALOGUE, audit
from torch_klloss.auditing.experiment.tokens import token_mask
from torch_klloss.language import DistillationLoss, ReferenceKL, log_probs_of


def per_token(q, p):
    return (q.softmax(-1) * (q.log_softmax(-1) - p.log_softmax(-1))).sum(-1)


def token_mean(student_logits, teacher_logits, mask):
    return (per_token(teacher_logits, student_logits) * mask).sum() / mask.sum()


RIGHT = {
    "the mean over the tokens that count": token_mean,
    "the sum over the tokens that count": lambda student_logits, teacher_logits, loss_mask: per_token(
        student_logits, teacher_logits
    )[loss_mask].sum(),
    "the mean over the sequences of their token means": lambda policy_logits, ref_logits, mask: (
        (per_token(policy_logits, ref_logits) * mask).sum(1) / mask.sum(1)
    ).mean(),
    "the mean over the sequences of their sums": lambda logits_p, logits_q, completion_mask: (
        (functional.kl_div(logits_p.log_softmax(-1), logits_q.softmax(-1), reduction="none").sum(-1) * completion_mask)
        .sum(1)
        .mean()
    ),
    "the mean over the tokens that count, each with the logits before it": lambda logits_q, logits_p, mask: (
        (per_token(logits_q, logits_p)[:, :-1] * mask[:, 1:]).sum() / mask[:, 1:].sum()
    ),
    "a value for each token": lambda logits_q, logits_p, mask: per_token(logits_q, logits_p) * mask,
}


@pytest.mark.parametrize("convention", RIGHT)
def test_a_right_loss_is_right_by_the_names_of_its_parameters(convention):
    report = audit(RIGHT[convention])
    assert report.ok, report
    assert report.signature == "token_logits"
    assert report.convention == convention
    assert "the KL's" in report.gradient


def test_the_losses_of_the_library_are_right():
    for reduction in ("token_mean", "sequence_mean", "sequence_sum", "sum", "none"):
        loss = DistillationLoss(reduction=reduction)
        report = audit(
            lambda student_logits, teacher_logits, mask, f=loss: f(
                student=student_logits, teacher=teacher_logits, mask=mask
            )
        )
        assert report.ok, report
    loss = ReferenceKL(gradient="token", reduction="token_mean")
    assert audit(lambda policy_logits, ref_logits, mask: loss(policy=policy_logits, reference=ref_logits, mask=mask)).ok


def sampled(policy_logits, ref_logits):
    """Return the log-ratios at tokens that are drawn from the policy."""
    ids = policy_logits.detach().softmax(-1).flatten(0, 1).multinomial(1).view(policy_logits.shape[:-1])
    return log_probs_of(policy_logits, ids) - log_probs_of(ref_logits, ids)


def k1(policy_logits, ref_logits, mask):
    return (sampled(policy_logits, ref_logits) * mask).sum() / mask.sum()


def k3(policy_logits, ref_logits, mask):
    ratio = sampled(policy_logits, ref_logits)
    return ((torch.exp(-ratio) - 1 + ratio) * mask).sum() / mask.sum()


@pytest.mark.parametrize(("loss", "id"), [(k1, "detached-samples"), (k3, "gradient-of-other-direction")])
def test_k1_and_k3_as_losses_have_a_right_value_and_a_wrong_gradient(loss, id):
    report = audit(loss, budget=320)
    assert report.verdict == "wrong gradient", report
    assert [mistake.id for mistake in report.mistakes] == [id]


def masked(values, mask):
    return (values * mask).sum() / mask.sum()


OLD = {
    "swapped": lambda logits_q, logits_p, mask: masked(per_token(logits_p, logits_q), mask),
    "cross-entropy": lambda logits_q, logits_p, mask: masked(
        -(logits_q.softmax(-1) * logits_p.log_softmax(-1)).sum(-1), mask
    ),
    "symmetrised": lambda logits_q, logits_p, mask: masked(
        per_token(logits_q, logits_p) + per_token(logits_p, logits_q), mask
    ),
    "temperature-2": lambda logits_q, logits_p, mask: masked(per_token(logits_q / 2, logits_p / 2), mask),
    "no-gradient": lambda logits_q, logits_p, mask: masked(per_token(logits_q, logits_p), mask).detach(),
    "sign": lambda logits_q, logits_p, mask: -masked(per_token(logits_q, logits_p), mask),
}


@pytest.mark.parametrize("id", OLD)
def test_mistakes_of_two_categoricals_are_told_of_tokens_too(id):
    assert id in [mistake.id for mistake in audit(OLD[id]).mistakes]


def test_a_mistake_is_told_under_every_reduction():
    def cross_entropy(teacher_logits, student_logits, mask):
        terms = -(teacher_logits.softmax(-1) * student_logits.log_softmax(-1)).sum(-1) * mask
        return (terms.sum(1) / mask.sum(1)).mean()

    report = audit(cross_entropy)
    assert [mistake.id for mistake in report.mistakes] == ["cross-entropy"], report
    assert report.convention == "the mean over the sequences of their token means"


def test_there_are_fifteen_mistakes_of_tokens_alone():
    assert sum(mistake.only == frozenset({"token_logits"}) for mistake in CATALOGUE) >= 15


def test_the_masks_of_the_probes_are_ragged():
    lengths = token_mask(6, 5).sum(-1).tolist()
    assert lengths[0] == 5
    assert len(set(lengths)) > 2
    assert min(lengths) >= 1
