"""Rows of logits: which way each is computed, and that the ways agree."""

import math

import pytest
import torch

from tests.language.conventions import by_definition
from torch_klloss.language import DistillationLoss, ForwardKL, Jeffreys, JensenShannon, SkewKL, token_kl
from torch_klloss.numerics.softmax import rows


def logits(*, seed=0, num_classes=700):
    return torch.randn(6, num_classes, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def careful_rows(monkeypatch):
    """The numbers of rows that the careful formula, the slowest one, is asked for."""
    asked, careful = [], rows._careful

    def counted(a, b, index, *rest):
        asked.append(len(a) if index is None else len(index))
        return careful(a, b, index, *rest)

    monkeypatch.setattr(rows, "_careful", counted)
    return asked


@pytest.mark.parametrize("divergence", [ForwardKL(), JensenShannon()], ids=repr)
@pytest.mark.parametrize("mask", [None, torch.tensor([True, False, True, True, False, True])], ids=["all", "some"])
def test_equal_rows_cost_a_comparison_and_have_value_and_gradient_zero(divergence, mask, careful_rows):
    student = logits()
    teacher = student.clone()
    student[1, 5] = teacher[1, 5] = -math.inf
    teacher[2] = logits(seed=1)[2]
    student.requires_grad_()
    loss = DistillationLoss(divergence, reduction="none")
    value = loss(student=student, teacher=teacher, mask=mask)
    value.sum().backward()
    alone = loss(student=student[2:3], teacher=teacher[2:3])
    assert value.nonzero().tolist() == [[2]]
    assert value[2] == alone
    assert student.grad.abs().sum(-1).nonzero().tolist() == [[2]]
    assert careful_rows == []


def test_a_row_that_differs_by_one_digit_is_not_taken_for_equal(careful_rows):
    q = logits()
    p = q.clone()
    p[3, -1] = torch.nextafter(p[3, -1], torch.tensor(math.inf))
    value = token_kl(q, p)
    assert value[3] > 0
    assert value.nonzero().tolist() == [[3]]
    assert careful_rows == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_equal_rows_that_are_no_distribution_are_nan(bad):
    q = logits()
    q[0, 3] = bad
    q[1] = -math.inf
    assert token_kl(q, q.clone()).isnan().tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("divergence", [Jeffreys(0.3), JensenShannon(), SkewKL(0.1)], ids=repr)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize(("scale", "distance"), [(1.0, 0.3), (3.0, 1.0), (8.0, 2.0)])
@pytest.mark.parametrize("num_classes", [300, 2000])
def test_mixtures_of_few_classes_have_their_last_digits(divergence, temperature, scale, distance, num_classes):
    teacher = scale * torch.randn(20, num_classes)
    student = teacher + distance * torch.randn(20, num_classes)
    loss = DistillationLoss(divergence, temperature=temperature, scale_by_temperature=False, reduction="none")
    right = by_definition(divergence, *(t.double() / temperature for t in (teacher, student)))
    off = (loss(student=student, teacher=teacher) - right).abs() / right
    assert off[right > 1e-6].max() <= 3 * 2.0**-23
