"""DistillationLoss and token_kl: divergences, reductions, masks, packed and shifted sequences."""

import math

import mpmath
import numpy as np
import pytest
import torch

from tests.language.conventions import DEFINITIONS, by_definition
from torch_klloss import AutoKL, categorical
from torch_klloss.language import (
    DistillationLoss,
    ForwardKL,
    Jeffreys,
    JensenShannon,
    LinearHead,
    ReverseKL,
    SkewKL,
    log_probs_of,
    token_kl,
)
from torch_klloss.numerics.softmax.pairs import Arithmetic, Terms, rows_of
from torch_klloss.numerics.softmax.sides import Head
from torch_klloss.schedules import Linear

DIVERGENCES = pytest.mark.parametrize("divergence", list(DEFINITIONS), ids=repr)


def grads_of(value, *tensors):
    return torch.autograd.grad(value, tensors, retain_graph=True)


@DIVERGENCES
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("num_classes", [7, 1500])
def test_value_and_both_gradients_are_those_of_the_definition(divergence, temperature, num_classes):
    teacher, student = (torch.randn(6, num_classes).requires_grad_() for _ in range(2))
    loss = DistillationLoss(divergence, temperature=temperature, reduction="sum")(student=student, teacher=teacher)
    right = by_definition(divergence, teacher, student, temperature).sum()
    torch.testing.assert_close(loss.double(), right, rtol=1e-6, atol=0)
    for found, grad in zip(grads_of(loss, teacher, student), grads_of(right, teacher, student), strict=True):
        assert (found - grad).norm() < 1e-6 * grad.norm()


@DIVERGENCES
def test_a_half_precision_gradient_is_off_by_its_own_storage_alone(divergence):
    teacher = torch.randn(3, 900).bfloat16()
    student = (teacher.float() + 0.05 * torch.randn(3, 900)).bfloat16().requires_grad_()
    loss = DistillationLoss(divergence, reduction="sum")(student=student, teacher=teacher)
    wide = student.detach().double().requires_grad_()
    right = by_definition(divergence, teacher, wide).sum()
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss.double(), right, rtol=2e-6, atol=0)
    (found,), (exact,) = grads_of(loss, student), grads_of(right, wide)
    assert ((found.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-30).all()


def exact_kl(a, b, temperature):
    """Return the KL of softmax(a/T) and softmax(b/T) to 60 digits."""
    with mpmath.workdps(60):
        logs = []
        for x in (a, b):
            each = [mpmath.mpf(v) / mpmath.mpf(temperature) for v in x.tolist()]
            norm = mpmath.log(mpmath.fsum(map(mpmath.exp, each)))
            logs.append([v - norm for v in each])
        return mpmath.fsum(mpmath.exp(q) * (q - p) for q, p in zip(*logs, strict=True))


def ulps(value, exact):
    with mpmath.workdps(60):
        unit = float(np.spacing(np.float32(float(exact))))
        return float(abs(mpmath.mpf(float(np.float32(value))) - exact) / unit)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7, 0.05])
@pytest.mark.parametrize("offset", [0.0, 13.7])
@pytest.mark.parametrize(
    ("scale", "distance"), [(1, 1e-6), (3, 1e-4), (10, 1e-2), (4, 0.3), (1, 1.5), (4, 5), (100, 100)]
)
@pytest.mark.parametrize("num_classes", [5, 600])
def test_float32_logits_keep_their_digits_with_and_without_float64(num_classes, scale, distance, offset, temperature):
    a = scale * torch.randn(num_classes)
    b = a + offset + distance * torch.randn(num_classes)
    exact = exact_kl(a, b, temperature)
    if not 1e-36 < exact < 1e4:
        return
    assert ulps(token_kl(a, b, temperature=temperature).item(), exact) <= 4
    single = rows_of(a[None], b[None], Arithmetic(temperature), Terms()).value(Terms()).item()  # as off the CPU
    assert ulps(single, exact) <= 5


def test_a_kl_of_1e_33_has_its_digits():
    a = torch.randn(300)
    a[0] = a.max() + 3.7
    b = a + 0.01 * torch.randn(300)
    exact = exact_kl(a, b, 0.05)
    assert exact < 1e-30
    assert ulps(token_kl(a, b, temperature=0.05).item(), exact) <= 4


@DIVERGENCES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_logits_give_exactly_zero(divergence, dtype):
    logits = (20 * torch.randn(4, 700)).to(dtype).requires_grad_()
    value = DistillationLoss(divergence, reduction="none")(student=logits, teacher=logits.detach())
    assert (value == 0).all()
    assert (grads_of(value.sum(), logits)[0] == 0).all()


def test_a_column_that_both_mask_drops_out_and_one_that_the_student_masks_is_infinite():
    teacher, student = torch.randn(2, 400), torch.randn(2, 400).requires_grad_()
    hidden = torch.tensor([3, 17, 250])
    masked = [t.index_fill(-1, hidden, -math.inf) for t in (teacher, student)]
    kept = torch.ones(400, dtype=torch.bool).index_fill(0, hidden, False)
    torch.testing.assert_close(token_kl(*masked), token_kl(teacher[:, kept], student[:, kept]))
    for divergence in DEFINITIONS:
        loss = DistillationLoss(divergence, reduction="none")
        value = loss(student=masked[1], teacher=teacher)
        is_infinite = divergence.terms.by_q > 0 and divergence.terms.q_mix == 1
        assert (value == math.inf).all() == is_infinite
        assert not value.isnan().any()
        assert grads_of(torch.where(value == math.inf, value * 0.5, value).sum(), student)[0].isfinite().all()


@pytest.mark.parametrize("least", [-math.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("num_classes", [5, 600])
def test_a_mixture_is_finite_where_only_one_side_has_a_class(num_classes, least):
    teacher, student = torch.randn(3, num_classes), torch.randn(3, num_classes)
    teacher[:, 1], student[:, 3] = least, least
    for divergence in (JensenShannon(0.1), SkewKL(0.1), SkewKL(0.1, reverse=True)):
        right = by_definition(divergence, teacher.clamp(min=-500), student.clamp(min=-500))
        found = DistillationLoss(divergence, reduction="none")(student=student, teacher=teacher)
        torch.testing.assert_close(found.double(), right, rtol=2e-6, atol=0)
        terms = divergence.terms if divergence.terms.by_q else Terms(divergence.terms.by_p, divergence.terms.p_mix)
        a, b = (teacher, student) if divergence.terms.by_q else (student, teacher)
        single = rows_of(a, b, Arithmetic(), terms).value(terms).squeeze(-1)
        torch.testing.assert_close(single.double(), right, rtol=2e-6, atol=0)


@DIVERGENCES
@pytest.mark.parametrize("fill", [math.nan, math.inf, 1e10])
def test_padding_of_any_content_changes_no_bit(divergence, fill):
    keep = torch.rand(3, 8) < 0.6
    results = []
    for padding in (0.0, fill):
        teacher, student = (torch.randn(3, 8, 300, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
        teacher, student = (t.masked_fill(~keep.unsqueeze(-1), padding).requires_grad_() for t in (teacher, student))
        value = DistillationLoss(divergence)(student=student, teacher=teacher, mask=keep)
        results.append((value, *grads_of(value, teacher, student)))
    for clean, padded in zip(*results, strict=True):
        assert torch.equal(clean, padded)
    assert (results[1][1][~keep] == 0).all()


WEIGHTS = torch.tensor([[1.0, 1.0, 0.5, 0.0], [2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("reduction", "right"),
    [
        ("token_mean", lambda v, w: (w * v).sum() / w.sum()),
        ("sequence_mean", lambda v, w: ((w * v).sum(-1)[:2] / w.sum(-1)[:2]).mean()),
        ("sequence_sum", lambda v, w: (w * v).sum() / 2),
        ("sum", lambda v, w: (w * v).sum()),
        ("none", lambda v, w: w * v),
    ],
)
def test_every_reduction_weighs_the_tokens(reduction, right):
    teacher, student = torch.randn(3, 4, 50), torch.randn(3, 4, 50)
    value = token_kl(teacher, student)
    found = DistillationLoss(reduction=reduction)(student=student, teacher=teacher, mask=WEIGHTS)
    torch.testing.assert_close(found, right(value, WEIGHTS))
    if reduction in ("token_mean", "sequence_mean", "sequence_sum"):
        whole = DistillationLoss(reduction=reduction)(student=student, teacher=teacher, mask=WEIGHTS, normalizer=7)
        counts = {"token_mean": WEIGHTS.sum(), "sequence_mean": 2, "sequence_sum": 2}[reduction]
        torch.testing.assert_close(whole, found * counts / 7)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_sum"])
def test_microbatches_with_a_normalizer_add_up_to_the_batch(reduction):
    teacher, student = torch.randn(6, 5, 40), torch.randn(6, 5, 40).requires_grad_()
    mask = torch.rand(6, 5) < 0.7
    mask[:, 0] = True
    loss = DistillationLoss(reduction=reduction)
    whole = loss(student=student, teacher=teacher, mask=mask)
    count = mask.sum() if reduction == "token_mean" else 6
    parts = sum(
        loss(student=student[i:j], teacher=teacher[i:j], mask=mask[i:j], normalizer=count)
        for i, j in ((0, 1), (1, 4), (4, 6))
    )
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(grads_of(parts, student)[0], grads_of(whole, student)[0], rtol=1e-6, atol=1e-9)


def test_a_shift_drops_the_last_logits_and_the_first_label():
    teacher, student = torch.randn(2, 5, 30), torch.randn(2, 5, 30)
    labels = torch.tensor([[1, 2, 3, -100, -100], [4, 5, 6, 7, 8]])
    found = DistillationLoss(shift=1, reduction="none")(student=student, teacher=teacher, labels=labels)
    right = token_kl(teacher[:, :-1], student[:, :-1]) * (labels[:, 1:] != -100)
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_sum", "sum", "none"])
def test_packed_sequences_are_the_padded_ones(reduction, shift):
    lengths = [4, 1, 3]
    teacher, student = torch.randn(3, 4, 30), torch.randn(3, 4, 30)
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    loss = DistillationLoss(reduction=reduction, shift=shift)
    padded = loss(student=student, teacher=teacher, mask=mask)
    packed = loss(
        student=student[mask], teacher=teacher[mask], boundaries=torch.tensor([0, *lengths]).cumsum(0), mask=mask[mask]
    )
    torch.testing.assert_close(packed, padded[mask[:, shift:]] if reduction == "none" else padded)


def test_nothing_valid_is_a_zero_on_the_graph_where_nothing_is_divided_by():
    student, mask = torch.randn(2, 3, 9, requires_grad=True), torch.zeros(2, 3, dtype=torch.bool)
    for loss, options in (
        (DistillationLoss(reduction="sum"), {}),
        (DistillationLoss(), {"normalizer": 5}),
        (DistillationLoss(reduction="sequence_mean"), {"normalizer": torch.tensor(5)}),
        (DistillationLoss(reduction="none"), {}),
    ):
        value = loss(student=student, teacher=torch.randn(2, 3, 9), mask=mask, **options).sum()
        assert value == 0
        assert (grads_of(value, student)[0] == 0).all()
    with pytest.raises(ValueError, match=r"no token of the batch is valid.*normalizer="):
        DistillationLoss()(student=student, teacher=torch.randn(2, 3, 9), mask=mask)


def test_a_schedule_or_a_driver_sets_the_weight():
    teacher, student = torch.randn(2, 9), torch.randn(2, 9)
    plain = DistillationLoss()(student=student, teacher=teacher)
    loss = DistillationLoss(weight=Linear(steps=4))
    torch.testing.assert_close(loss(student=student, teacher=teacher, step=2), plain / 2)
    with pytest.raises(ValueError, match="needs a step"):
        loss(student=student, teacher=teacher)
    loss.weight = 3.0
    torch.testing.assert_close(loss(student=student, teacher=teacher), 3 * plain)


def test_estimate_gives_every_token_with_its_temperature():
    teacher, student = torch.randn(2, 3, 9), torch.randn(2, 3, 9)
    mask = torch.tensor([[True, False, True]] * 2)
    found = DistillationLoss(temperature=2.0, weight=5.0).estimate(student=student, teacher=teacher, mask=mask)
    torch.testing.assert_close(found.value, 4 * token_kl(teacher, student, temperature=2.0, mask=mask))
    assert (found.method, found.exact, found.std_error) == ("exact", True, None)


def test_real_columns_are_said_by_vocab_size():
    teacher, student = torch.randn(4, 40), torch.randn(4, 36).requires_grad_()
    loss = DistillationLoss()(student=student, teacher=teacher, vocab_size=30)
    torch.testing.assert_close(loss, DistillationLoss()(student=student[:, :30], teacher=teacher[:, :30]))
    assert (grads_of(loss, student)[0][:, 30:] == 0).all()


def test_it_is_the_closed_form_of_the_categorical():
    q, p = torch.randn(5, 300), torch.randn(5, 300)
    torch.testing.assert_close(token_kl(q, p).mean(), AutoKL()(categorical(q), categorical(p)), rtol=2e-7, atol=0)


def test_log_probs_of_tokens_keep_their_gradient_and_ignore_what_is_ignored():
    logits, ids = torch.randn(3, 5, 300, requires_grad=True), torch.randint(300, (3, 5))
    ids[0, 1] = -100
    with torch.no_grad():
        logits[0, 1] = math.nan
    found = log_probs_of(logits, ids, temperature=1.3)
    clean = torch.where(ids.unsqueeze(-1) < 0, 0.0, logits)
    right = (clean / 1.3).log_softmax(-1).gather(-1, ids.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (ids >= 0)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(grads_of(found.square().sum(), logits)[0], grads_of(right.square().sum(), logits)[0])


@pytest.mark.parametrize("reduction", ["token_mean", "none"])
def test_a_head_is_its_logits_with_weights_and_without_reduction(reduction):
    hidden, head = torch.randn(4, 9, 16, requires_grad=True), torch.nn.Linear(16, 500)
    teacher, weights = torch.randn(4, 9, 500), torch.rand(4, 9) * (torch.rand(4, 9) < 0.7)
    outer = torch.rand(4, 9) if reduction == "none" else 1.0
    results = []
    for student in (LinearHead(hidden, head.weight, head.bias), head(hidden)):
        loss = DistillationLoss(ReverseKL(), reduction=reduction)(student=student, teacher=teacher, mask=weights)
        results.append((loss, *grads_of((loss * outer).sum(), hidden, head.weight, head.bias)))
    for found, right in zip(*results, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-7)


@pytest.fixture
def products(monkeypatch):
    """How many logits of heads were made."""
    made, panel = [], Head.panel

    def counted(self, rows):
        logits = panel(self, rows)
        made.append(logits.numel())
        return logits

    monkeypatch.setattr(Head, "panel", counted)
    return made


OUTER = {  # what becomes of the loss, the dtype, and how often the logits are made
    "as it is": (lambda v: v, torch.float32, 1),
    "times a number": (lambda v: v * 0.3, torch.float32, 1),
    "in half precision, as it is": (lambda v: v, torch.bfloat16, 1),
    "in half precision, times a number": (lambda v: v * 0.3, torch.bfloat16, 2),
    "nothing": (lambda v: v * 0, torch.float32, 1),
}


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_sum", "sum"])
def test_a_head_is_multiplied_once_where_the_loss_is_a_factor_of_what_is_differentiated(outer, reduction, products):
    function, dtype, times = OUTER[outer]
    hidden, weight = (torch.randn(n, 16).to(dtype) for n in (36, 500))
    hidden, weight = hidden.view(4, 9, 16).requires_grad_(), weight.requires_grad_()
    teacher, weights = torch.randn(4, 9, 500).to(dtype), torch.rand(4, 9) * (torch.rand(4, 9) < 0.7)
    loss = DistillationLoss(temperature=2.0, reduction=reduction, weight=0.7)
    value = function(loss(student=LinearHead(hidden, weight), teacher=teacher, mask=weights))
    found = grads_of(value, hidden, weight)
    assert sum(products) == times * 500 * (weights > 0).sum()
    again = grads_of(value, hidden, weight)  # nothing is kept for a second time
    right = grads_of(function(loss(student=hidden @ weight.T, teacher=teacher, mask=weights)), hidden, weight)
    for f, g, r in zip(found, again, right, strict=True):
        for some in (f, g):
            assert (some - r).norm() <= (1e-6 if dtype is torch.float32 else 2.0**-7) * r.norm()


def test_a_head_is_multiplied_again_where_the_tokens_are_weighted_afterwards(products):
    hidden, weight = torch.randn(9, 16, requires_grad=True), torch.randn(500, 16, requires_grad=True)
    teacher, outer = torch.randn(9, 500), torch.rand(9)
    found = grads_of((token_kl(teacher, LinearHead(hidden, weight)) * outer).sum(), hidden, weight)
    assert sum(products) == 2 * 9 * 500
    right = grads_of((token_kl(teacher, hidden @ weight.T) * outer).sum(), hidden, weight)
    for f, r in zip(found, right, strict=True):
        torch.testing.assert_close(f, r, rtol=1e-5, atol=1e-7)
    products.clear()
    grads_of(token_kl(teacher, LinearHead(hidden, weight), mask=outer).mean(), hidden, weight)
    assert sum(products) == 9 * 500


def test_a_head_keeps_no_gradient_that_is_not_asked_for(products):
    hidden, weight = torch.randn(9, 16), torch.randn(500, 16)
    teacher = torch.randn(9, 500, requires_grad=True)
    grads_of(token_kl(teacher, LinearHead(hidden, weight)).sum(), teacher)
    assert sum(products) == 2 * 9 * 500


def test_second_derivatives_are_right():
    teacher, student = (torch.randn(2, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.tensor([True, False])
    for divergence in (ForwardKL(), JensenShannon(0.3), SkewKL(reverse=True), Jeffreys()):
        loss = DistillationLoss(divergence, temperature=1.3)
        assert torch.autograd.gradgradcheck(lambda t, s, f=loss: f(student=s, teacher=t, mask=mask), (teacher, student))
    hidden, weight = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (2, 6))
    assert torch.autograd.gradgradcheck(lambda h, w: token_kl(LinearHead(h, w), teacher.detach()), (hidden, weight))


@DIVERGENCES
def test_second_derivatives_are_right_at_equality_and_next_to_padding(divergence):
    logits = torch.randn(2, 5, dtype=torch.float64)
    logits[1] = math.nan
    mask, loss = torch.tensor([True, False]), DistillationLoss(divergence, reduction="sum")
    curvature = torch.autograd.functional.hessian(lambda x: loss(student=x, teacher=logits, mask=mask), logits.clone())
    right = torch.zeros_like(curvature)
    right[0, :, 0] = torch.autograd.functional.hessian(lambda x: by_definition(divergence, logits[0], x), logits[0])
    torch.testing.assert_close(curvature, right)


def test_a_head_that_both_sides_share_gets_the_gradient_of_both_once():
    first, second = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    heads = lambda w: token_kl(LinearHead(first, w), LinearHead(second, w))
    assert torch.autograd.gradcheck(heads, weight)
    assert torch.autograd.gradgradcheck(heads, weight)
