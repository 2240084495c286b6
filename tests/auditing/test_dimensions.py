"""More than two dimensions: sums over all of them, nats a step, and fixes that are right there."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.distributions import Categorical

from torch_klloss import AutoKL, audit
from torch_klloss.auditing.experiment.signatures import SIGNATURES
from torch_klloss.auditing.right_lines import loss_of


def elements(mean, logvar):
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar)


def fix_of(report):
    """The line that a report shows for the right one."""
    return report.mistakes[0].fix.partition("In these arguments: ")[2].partition(", or with")[0]


@pytest.mark.parametrize("num_dims", [3, 4, 5])
def test_the_fix_of_a_mean_over_all_latents_is_right_in_as_many_dimensions(num_dims):
    report = audit(lambda mean, logvar: elements(mean, logvar).mean(dim=tuple(range(1, num_dims))), num_dims=num_dims)
    assert report.mistakes[0].id == "mean-over-latent"
    assert audit(loss_of(fix_of(report), ("mean", "logvar")), num_dims=num_dims).ok
    assert "does not take [batch, latent]" not in str(report)


def cases_of_fixes():
    """Return every signature with the most dimensions of two and three that it takes; with two for a longer run."""
    for name, signature in SIGNATURES.items():
        *others, most = [rank for rank in signature.ranks if rank in (2, 3)]
        yield pytest.param(name, most)
        yield from (pytest.param(name, rank, marks=pytest.mark.exhaustive) for rank in others)


@pytest.mark.parametrize(("name", "num_dims"), list(cases_of_fixes()))
def test_every_fix_is_right_where_it_is_shown(name, num_dims):
    signature = SIGNATURES[name]
    given = name in ("log_probs", "samples")
    right = loss_of(signature.right.partition(", or with")[0], signature.roles)
    report = audit(lambda *x: 3 * right(*x), signature=name, num_dims=num_dims, budget=160, gradient=False)
    assert not report.ok
    line = fix_of(report)
    assert line
    again = audit(loss_of(line, signature.roles), signature=name, num_dims=num_dims, budget=160, gradient=not given)
    assert again.ok, (line, str(again))


def test_a_mean_over_steps_is_named_and_so_are_others_beside_it():
    last = lambda mean, logvar: elements(mean, logvar).sum(-1).mean()
    for num_dims in (3, 4):
        report = audit(last, num_dims=num_dims)
        assert [finding.id for finding in report.mistakes] == ["mean-over-steps"]
        assert audit(loss_of(fix_of(report), ("mean", "logvar")), num_dims=num_dims).ok
    both = audit(lambda mean, logvar: 2 * last(mean, logvar), num_dims=3)
    assert {finding.id for finding in both.mistakes} == {"half-missing", "mean-over-steps"}
    assert audit(lambda mean, logvar: elements(mean, logvar).sum(-1), num_dims=3).ok  # still to be summed


def distillation(student_logits, teacher_logits):
    q = teacher_logits.softmax(-1)
    return (q * (teacher_logits.log_softmax(-1) - student_logits.log_softmax(-1))).sum(-1).mean()


def test_a_kl_a_token_is_a_convention_of_classes():
    report = audit(distillation, num_dims=3)
    assert report.ok
    assert "nats a step" in report.convention
    a, b = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    assert torch.isclose(distillation(a, b), AutoKL(batch_dims=2)(Categorical(logits=b), Categorical(logits=a)))
    for reduction, name in (("mean", "mean-over-latent"), ("batchmean", "")):
        loss = lambda student_logits, teacher_logits, r=reduction: F.kl_div(
            student_logits.log_softmax(-1), teacher_logits.softmax(-1), reduction=r
        )
        found = audit(loss, num_dims=3)
        assert [finding.id for finding in found.mistakes] == ([name] if name else [])


def test_a_sampled_kl_of_sequences_is_judged():
    def kl(q, p):
        z = q.rsample()
        return (q.log_prob(z) - p.log_prob(z)).flatten(1).sum(-1).mean()

    assert audit(kl, num_dims=3, budget=320).ok


def test_a_loss_of_vectors_is_not_said_to_refuse_them():
    note = "does not take [batch, latent]"
    assert note not in str(audit(lambda mean, logvar: elements(mean, logvar).flatten(1).sum(1).mean(), num_dims=4))
    assert note in str(audit(lambda mean, logvar: elements(mean, logvar).sum((1, 2, 3)).mean()))
