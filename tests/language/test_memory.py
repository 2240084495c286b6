"""The memory of a step beyond its gradients, as torch's allocator counts it."""

import pytest
import torch

from torch_klloss.language import (
    DistillationLoss,
    ForwardKL,
    Jeffreys,
    JensenShannon,
    LinearHead,
    ReverseKL,
    SkewKL,
    token_kl,
)


def extra_memory(loss, *leaves):
    """Return the peak of the allocated bytes during the loss and its gradients, less these."""
    with torch.profiler.profile(profile_memory=True) as profile:
        loss().backward()
    used = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            used += event.nbytes()
            peak = max(peak, used)
    return peak - sum(leaf.grad.nbytes for leaf in leaves)


EXHAUSTIVE = [
    (divergence, dtype, valid, both)
    for divergence in (ForwardKL(), ReverseKL(), Jeffreys(), JensenShannon(), SkewKL())
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for valid, both in ((1.0, False), (0.5, False), (1.0, True))
]
CASES = [
    (ForwardKL(), torch.float32, 0.5, False),
    (JensenShannon(), torch.bfloat16, 1.0, True),
    *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in EXHAUSTIVE),
]


@pytest.mark.parametrize(("divergence", "dtype", "valid", "both"), CASES)
def test_a_step_takes_a_tenth_of_the_logits_beside_its_gradients(divergence, dtype, valid, both):
    size = (128, 32_000)
    teacher, student = (torch.randn(size).to(dtype).requires_grad_() for _ in range(2))
    teacher.requires_grad_(both)
    mask = None if valid == 1 else torch.rand(size[0]) < valid
    loss = lambda: DistillationLoss(divergence)(student=student, teacher=teacher, mask=mask)
    memory = extra_memory(loss, student, *([teacher] if both else []))
    assert 0 < memory <= (0.10 if dtype is torch.float32 else 0.15) * student.nbytes


def test_what_is_kept_whole_is_seen():
    student, teacher = torch.randn(8, 4000, requires_grad=True), torch.randn(8, 4000)
    loss = lambda: torch.nn.functional.kl_div(student.log_softmax(-1), teacher, log_target=True, reduction="batchmean")
    assert extra_memory(loss, student) > 1.5 * student.nbytes


def test_a_head_takes_less_than_half_of_the_logits_that_are_never_made():
    hidden, weight = torch.randn(512, 128, requires_grad=True), torch.randn(16_000, 128, requires_grad=True)
    teacher = torch.randn(512, 16_000)
    memory = extra_memory(lambda: token_kl(teacher, LinearHead(hidden, weight)).mean(), hidden, weight)
    assert memory <= 0.40 * teacher.nbytes
