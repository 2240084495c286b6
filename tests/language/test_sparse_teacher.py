"""Teachers that are known at a few tokens: bounds, unbiasedness by exact sums, and what is refused."""

import math

import pytest
import torch

from torch_klloss.language import (
    DistillationLoss,
    ForwardKL,
    Jeffreys,
    JensenShannon,
    ReverseKL,
    SkewKL,
    SparseTeacher,
    token_kl,
)

ALL = [ForwardKL(), ReverseKL(), Jeffreys(), JensenShannon(), SkewKL()]


def top(logits, k, **options):
    log_probs, ids = logits.log_softmax(-1).topk(k)
    return SparseTeacher(ids, log_probs, **options)


def estimate(divergence, student, teacher):
    return DistillationLoss(divergence).estimate(student=student, teacher=teacher)


@pytest.mark.parametrize("divergence", ALL, ids=repr)
def test_the_bucket_is_a_lower_bound_and_the_full_divergence_with_all_tokens(divergence):
    teacher, student = (2 * torch.randn(2000, 9, dtype=torch.float64) for _ in range(2))
    full = estimate(divergence, student, teacher).value
    for k in (1, 3, 8):
        found = estimate(divergence, student, top(teacher, k))
        assert (found.method, found.exact) == ("bucket", False)
        assert (found.value <= full * (1 + 1e-12) + 1e-15).all()
    torch.testing.assert_close(estimate(divergence, student, top(teacher, 9)).value, full, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("divergence", ALL, ids=repr)
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_the_gradient_to_the_student_is_that_of_the_coarse_classes(divergence, tail):
    teacher, student = torch.randn(4, 12, dtype=torch.float64), torch.randn(4, 12, dtype=torch.float64)
    sparse = top(teacher, 3, tail=tail)

    def coarse(logits):
        logs = logits.log_softmax(-1)
        head = logs.gather(-1, sparse.ids)
        rest = logs.scatter(-1, sparse.ids, -math.inf).logsumexp(-1, keepdim=True)
        return torch.cat((head, rest), -1) if tail == "bucket" else head

    results = []
    for by_hand in (False, True):
        leaf = student.clone().requires_grad_()
        loss = DistillationLoss(divergence)
        value = loss(student=coarse(leaf), teacher=coarse(teacher)) if by_hand else loss(student=leaf, teacher=sparse)
        results.append((value, torch.autograd.grad(value, leaf)[0]))
    for found, right in zip(*results, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-13)


def test_a_tail_of_1e_14_keeps_its_digits_where_one_minus_the_sum_has_none():
    student = torch.tensor([[0.0, math.log(2), math.log(3e-14), math.log(2e-14)]], dtype=torch.float64)
    teacher = torch.tensor([[0.5, 0.3, 0.1, 0.1]], dtype=torch.float64).log()
    tail = 5e-14 / (3 + 5e-14)
    log_student = student.log_softmax(-1)[0, :2]
    right = 0.5 * (math.log(0.5) - log_student[0]) + 0.3 * (math.log(0.3) - log_student[1])
    right = right + 0.2 * math.log(0.2 / tail)
    ids = torch.tensor([[0, 1]])
    found = estimate(ForwardKL(), student, SparseTeacher(ids, teacher[:, :2])).value
    torch.testing.assert_close(found, right[None], rtol=1e-10, atol=0)


def test_fewer_tokens_are_said_by_valid():
    teacher, student = torch.randn(3, 20), torch.randn(3, 20)
    wide, valid = top(teacher, 5), torch.tensor([[True, True, False, False, False]]).expand(3, 5)
    ids = torch.where(valid, wide.ids, -1)
    found = estimate(ForwardKL(), student, SparseTeacher(ids, wide.log_probs, valid=valid)).value
    torch.testing.assert_close(found, estimate(ForwardKL(), student, top(teacher, 2)).value)


@pytest.mark.parametrize("k", [0, 2])
def test_draws_have_the_value_and_the_gradient_of_the_full_kl_in_expectation(k):
    teacher = torch.randn(1, 6, dtype=torch.float64)
    student = torch.randn(1, 6, dtype=torch.float64, requires_grad=True)
    head = top(teacher, k) if k else None
    logs = teacher.log_softmax(-1)
    tail = logs if head is None else logs.scatter(-1, head.ids, -math.inf)
    chance = tail.softmax(-1)
    total = torch.zeros(())
    for i in range(6):  # all draws
        if chance[0, i] > 0:
            one = SparseTeacher.sampled(torch.tensor([[i]]), logs[:, i : i + 1], head=head)
            total = total + chance[0, i] * DistillationLoss()(student=student, teacher=one)
    right = token_kl(teacher, student).sum()
    torch.testing.assert_close(total, right, rtol=1e-13, atol=0)
    found, exact = (torch.autograd.grad(t, student)[0] for t in (total, right))
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-14)


def test_the_truncated_sum_and_the_top_k_as_draws_fail_that_proof():
    teacher, student = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log(), torch.tensor([[0.625, 0.375, 1e-9, 1e-9]]).log()
    truncated = (teacher[:, :2].exp() * (teacher - student)[:, :2]).sum()
    assert truncated == pytest.approx(-0.1785, abs=1e-4)
    with pytest.raises(ValueError, match=r"P log P = -0\.1785 nats for a head of mass P = 0\.8000"):
        estimate(ForwardKL(), student, top(teacher, 2, tail="none"))
    drawn = SparseTeacher.sampled(torch.tensor([[0, 1]]), teacher[:, :2])
    assert estimate(ForwardKL(), student, drawn).value < 0 < token_kl(teacher, student)


def test_counts_are_repeated_draws():
    teacher, student = torch.randn(2, 9).log_softmax(-1), torch.randn(2, 9)
    ids, counts = torch.tensor([[1, 4], [0, 8]]), torch.tensor([[3, 1], [2, 2]])
    repeated = torch.stack([i.repeat_interleave(c) for i, c in zip(ids, counts, strict=True)])
    found = estimate(ForwardKL(), student, SparseTeacher.sampled(ids, teacher.gather(-1, ids), counts=counts))
    right = estimate(ForwardKL(), student, SparseTeacher.sampled(repeated, teacher.gather(-1, repeated)))
    torch.testing.assert_close(found.value, right.value)
    torch.testing.assert_close(found.std_error, right.std_error)
    assert found.method == "sampled_tail"


def test_masked_tokens_may_be_nan_and_their_ids_out_of_range():
    teacher, student, mask = torch.randn(3, 20), torch.randn(3, 20), torch.tensor([True, False, True])
    clean = top(teacher, 4)
    ids = clean.ids.masked_fill(~mask[:, None], 0) + torch.arange(4) * ~mask[:, None] + 100 * ~mask[:, None]
    poisoned = student.masked_fill(~mask[:, None], math.nan).requires_grad_()
    loss = DistillationLoss()(student=poisoned, teacher=SparseTeacher(ids, clean.log_probs), mask=mask)
    torch.testing.assert_close(loss, DistillationLoss()(student=student[mask], teacher=top(teacher[mask], 4)))
    assert torch.autograd.grad(loss, poisoned)[0].isfinite().all()


IDS, LOGS = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.3]]).log()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SparseTeacher(IDS, LOGS + 0.3), "whose sum is at most 1, got 1.07"),
        (lambda: SparseTeacher(torch.tensor([[1, 1]]), LOGS), r"must differ.*SparseTeacher\.sampled"),
        (lambda: SparseTeacher(IDS, LOGS, temperature=0.0), "temperature must be above 0"),
        (lambda: SparseTeacher(IDS, LOGS, tail="zero"), "tail must be 'bucket', 'renormalize' or 'none', got 'zero'"),
        (lambda: SparseTeacher(IDS, LOGS[:, :1]), "must have one shape"),
        (lambda: SparseTeacher.sampled(IDS, LOGS, counts=torch.tensor([[1, 0]])), "counts must be above 0, got 0"),
        (lambda: SparseTeacher.sampled(IDS, LOGS, head=SparseTeacher(IDS, LOGS)), "some lie in the head"),
        (lambda: estimate(ForwardKL(), torch.zeros(1, 2), SparseTeacher(IDS + 1, LOGS)), "0 to 1, got 2"),
        (lambda: estimate(ReverseKL(), torch.zeros(1, 4), SparseTeacher.sampled(IDS, LOGS)), "the forward KL alone"),
        (
            lambda: DistillationLoss(temperature=2.0)(student=torch.zeros(1, 4), teacher=SparseTeacher(IDS, LOGS)),
            "cannot be brought to another temperature exactly",
        ),
        (lambda: estimate(ForwardKL(), torch.zeros(2, 4), SparseTeacher(IDS, LOGS)), "must be of the same tokens"),
    ],
)
def test_what_is_no_teacher_is_refused_with_the_way_out(build, message):
    with pytest.raises(ValueError, match=message):
        build()
