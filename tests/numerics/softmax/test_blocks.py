"""Rows of many classes, added up block by block: the digits of values and gradients, and which rows are refused."""

import math

import pytest
import torch

from tests.language.conventions import DEFINITIONS, by_definition
from torch_klloss.language import DistillationLoss, ForwardKL, Jeffreys, JensenShannon, ReverseKL, SkewKL, token_kl
from torch_klloss.numerics.softmax import blocks, rows
from torch_klloss.numerics.softmax.strips import Strips

NUM_CLASSES = 9001  # more than enough for blocks, and no multiple of one
LAWS = {  # standard deviation of the teacher's logits, and distance of the student's: from flat to a law of one token
    "flat": (1.0, 1.0),
    "peaked": (2.0, 1.5),
    "of few": (4.0, 1.0),
    "of few, near": (4.0, 0.3),
    "of one": (8.0, 2.0),
    "of one, near": (8.0, 0.1),
}
FORMS = [ForwardKL(), Jeffreys(0.3), JensenShannon(), JensenShannon(0.1), SkewKL(0.1), SkewKL(0.1, reverse=True)]


def logits(law, dtype=torch.float32, num_rows=6):
    scale, distance = LAWS[law]
    teacher = scale * torch.randn(num_rows, NUM_CLASSES)
    student = teacher + distance * torch.randn(num_rows, NUM_CLASSES)
    return teacher.to(dtype).requires_grad_(), student.to(dtype).requires_grad_()


def units(value, right):
    """Return the distances in units of float32's last place."""
    return (value.double() - right).abs() / 2 ** (right.log2().floor() - 23)


@pytest.fixture
def kinds(monkeypatch):
    """How the rows of every call were computed."""
    found, careful = [], rows._careful
    by_blocks = rows.by_blocks

    def seen(a, b, index, problem, dtype):
        result = by_blocks(a, b, index, problem, dtype)
        found.append((dtype, int(result.is_good.sum())))
        return result

    def seen_careful(a, b, index, *rest):
        found.append(("careful", len(a) if index is None else len(index)))
        return careful(a, b, index, *rest)

    monkeypatch.setattr(rows, "by_blocks", seen)
    monkeypatch.setattr(rows, "_careful", seen_careful)
    return found


@pytest.mark.parametrize("divergence", FORMS, ids=repr)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_have_their_last_digits_and_gradients_the_digits_of_float32(divergence, law, dtype):
    teacher, student = logits(law, dtype)
    value = DistillationLoss(divergence, reduction="none")(student=student, teacher=teacher)
    wide = [t.detach().double().requires_grad_() for t in (teacher, student)]
    right = by_definition(divergence, *wide)
    assert units(value, right).max() <= (16 if divergence.terms.is_mixed else 8)
    found, exact = (torch.autograd.grad(v.sum(), of) for v, of in ((value, (teacher, student)), (right, wide)))
    most = 2e-5 if dtype is torch.float32 else 2.0**-8
    for f, e in zip(found, exact, strict=True):
        assert ((f.double() - e).norm(dim=-1) <= most * e.norm(dim=-1)).all()


@pytest.mark.parametrize("law", ["flat", "peaked", "of few"])
def test_float32_is_enough_for_laws_that_differ(law, kinds):
    teacher, student = logits(law)
    token_kl(teacher, student)
    assert kinds == [(torch.float32, 6)]


def test_near_laws_are_left_to_the_centred_form(kinds):
    teacher, _ = logits("flat")
    for distance in (1e-2, 1e-5):
        token_kl(teacher, teacher + distance * torch.randn_like(teacher))
    assert kinds == [(torch.float32, 0), (torch.float32, 0)]


def test_near_mixtures_take_float64_and_nearer_ones_the_careful_formula(kinds):
    teacher, _ = logits("flat")
    loss = DistillationLoss(JensenShannon())
    loss(student=teacher + 1e-2 * torch.randn_like(teacher), teacher=teacher)
    assert kinds == [(torch.float32, 0), (torch.float64, 6)]
    kinds.clear()
    loss(student=teacher + 1e-5 * torch.randn_like(teacher), teacher=teacher)
    assert kinds[-1] == ("careful", 6)


def test_without_the_heavy_blocks_in_float64_the_digits_are_lost(monkeypatch):
    teacher, student = logits("of few", num_rows=64)
    right = by_definition(ForwardKL(), teacher, student)
    monkeypatch.setattr(blocks, "_HEAVY", 1.1)
    monkeypatch.setattr(blocks, "_rounding", lambda first: torch.zeros(()))
    assert units(token_kl(teacher, student), right).max() > 4


def test_without_its_own_estimate_of_the_rounding_near_laws_lose_their_digits(monkeypatch):
    teacher, student = logits("of few, near", num_rows=64)
    right = by_definition(ForwardKL(), teacher, student)
    monkeypatch.setattr(blocks, "_rounding", lambda first: torch.zeros(()))
    assert units(token_kl(teacher, student), right).max() > 4


@pytest.mark.parametrize("divergence", [*FORMS, ReverseKL()], ids=repr)
def test_classes_that_one_or_both_sides_lack(divergence):
    teacher, student = (t.detach() for t in logits("peaked"))
    teacher[:, 40:300], student[:, 40:300] = -math.inf, -math.inf
    teacher[0, 7], student[1, 8] = -math.inf, -math.inf
    student.requires_grad_()
    value = DistillationLoss(divergence, reduction="none")(student=student, teacher=teacher)
    right = by_definition(divergence, *(t.detach().clamp(min=-1e12) for t in (teacher, student)))
    right = torch.where(right > 1e2 if not divergence.terms.is_mixed else right < 0, math.inf, right)
    assert (value == math.inf).tolist() == (right == math.inf).tolist()
    finite = right < math.inf
    torch.testing.assert_close(value[finite].double(), right[finite], rtol=2e-6, atol=0)
    (grad,) = torch.autograd.grad(value[finite].sum(), student)
    assert grad.isfinite().all()
    assert (grad[:, 40:300] == 0).all()


@pytest.mark.parametrize("offset", [90.0, -120.0, 1e4])
def test_logits_whose_exponentials_are_out_of_range_are_right_as_well(offset):
    teacher, student = logits("peaked")
    right = by_definition(ForwardKL(), teacher + offset, student - offset)
    assert units(token_kl(teacher + offset, student - offset), right).max() <= 4


@pytest.mark.parametrize("index", [None, [0, 1, 2, 5], [3], [1, 2, 4, 5, 6]])
@pytest.mark.parametrize("num_classes", [300, 9001, 60_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_strips_are_all_rows_and_classes_once(index, num_classes, dtype):
    a, b = torch.randn(2, 7, num_classes).to(dtype)
    rows = torch.arange(7) if index is None else torch.tensor(index)
    strips = Strips(a, b, None if index is None else rows, 0.5, torch.float64, 1)
    seen = torch.full((2, len(rows) - 1, num_classes), math.nan, dtype=torch.float64)
    for strip in strips.within(slice(1, len(rows))):
        classes = strip.where[1] if len(strip.where) > 1 else slice(None)
        assert a[strip.where].shape == strip.x.shape == strip.work[0].shape
        for which, part in enumerate((strip.x, strip.y)):
            assert seen[which, strip.place, classes].isnan().all()
            seen[which, strip.place, classes] = part
    assert torch.equal(seen, torch.stack((a, b))[:, rows[1:]].double() / 2)


@pytest.mark.parametrize("divergence", DEFINITIONS, ids=repr)
def test_a_row_alone_is_the_row_among_others(divergence):
    teacher, student = logits("of few", num_rows=9)
    mask = torch.tensor([True, False, True, True, True, False, True, False, True])
    loss = DistillationLoss(divergence, reduction="none")
    whole = loss(student=student, teacher=teacher, mask=mask)
    for i in mask.nonzero().flatten().tolist():
        assert whole[i] == loss(student=student[i : i + 1], teacher=teacher[i : i + 1])


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("divergence", FORMS, ids=repr)
def test_the_sides_may_have_different_dtypes(divergence, dtypes):
    teacher, student = (t.detach().to(dtype) for t, dtype in zip(logits("peaked"), dtypes, strict=True))
    student.requires_grad_()
    value = DistillationLoss(divergence, reduction="none")(student=student, teacher=teacher)
    wide = student.detach().double().requires_grad_()
    right = by_definition(divergence, teacher, wide)
    assert units(value, right).max() <= (16 if divergence.terms.is_mixed else 4)
    (found,), (exact,) = torch.autograd.grad(value.sum(), student), torch.autograd.grad(right.sum(), wide)
    assert (found.double() - exact).norm() <= (1e-6 if dtypes[1] is torch.float32 else 2.0**-8) * exact.norm()


@pytest.mark.parametrize("num_classes", [700, NUM_CLASSES])
def test_logits_in_float64_on_one_side_have_their_digits(num_classes):
    q, p = torch.randn(3, num_classes), torch.randn(3, num_classes, dtype=torch.float64)
    for sides in ((q, p), (p, q)):
        torch.testing.assert_close(token_kl(*sides), by_definition(ForwardKL(), *sides), rtol=1e-13, atol=0)
