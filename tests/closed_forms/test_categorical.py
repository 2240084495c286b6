"""Categorical and OneHotCategorical: masked classes, extreme logits, both parametrisations."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, OneHotCategorical, OneHotCategoricalStraightThrough
from torch.distributions import kl_divergence as torch_kl

from tests.closed_forms.checks import DTYPES, INF, check, t64, value_and_gradients
from torch_klloss import categorical, kl_divergence

MASKED = [-INF, 0.5, -INF, 1.5]


@DTYPES
@pytest.mark.parametrize("num_classes", [4, 300])  # the second goes through float32 first
@pytest.mark.parametrize(
    "family", [categorical, lambda a: Categorical(logits=a), lambda a: OneHotCategorical(logits=a)]
)
def test_a_class_that_both_mask_contributes_nothing_and_has_a_gradient_of_zero(family, num_classes, dtype):
    kept = torch.linspace(-1, 1, num_classes - 2, dtype=dtype)
    masks = kept.new_full((2,), -INF)
    q, p = torch.cat((masks, kept)), torch.cat((masks, 3 * kept))
    value, by_q, by_p = value_and_gradients(lambda a, b: (family(a), family(b)), q, p)
    expected = value_and_gradients(lambda a, b: (family(a), family(b)), kept, 3 * kept)
    torch.testing.assert_close(value, expected[0])
    for grad, e in zip((by_q, by_p), expected[1:], strict=True):
        check(grad[:2], 0.0, 0.0)
        torch.testing.assert_close(grad[2:], e)


def test_a_class_that_only_q_masks_counts_with_its_probability():
    value, by_q, by_p = value_and_gradients(
        lambda a, b: (categorical(a), categorical(b)), t64(-INF, 0, 0), t64(1.0, 0, 0)
    )
    p = t64(1.0, 0, 0).softmax(-1)
    check(value, -math.log(2) - math.log(p[1]))
    check(by_q, 0.0, 0.0, 0.0)
    torch.testing.assert_close(by_p, p - t64(0.0, 0.5, 0.5))


@pytest.mark.parametrize("least", [-INF, -1e9, -3e38])
def test_a_class_that_only_p_masks_makes_the_kl_infinite_and_the_gradient_zero(least):
    q, p = t64([[0.0, 1.0, least], [0.0, 1.0, -2.0]]), t64([[0.0, 1.0, -INF], [0.0, 1.0, -INF]])
    value, *grads = value_and_gradients(lambda a, b: (categorical(a), categorical(b)), q, p)
    check(value, 0.0 if least == -INF else INF, INF)
    assert all((g[1] == 0).all() for g in grads)
    assert all(g.isfinite().all() for g in grads)


@DTYPES
def test_a_mask_of_finite_logits_is_a_mask(dtype):
    least = torch.finfo(dtype).min
    q, p = torch.tensor([least, 0.0, 1.0], dtype=dtype), torch.tensor([least, 1.0, 0.0], dtype=dtype)
    value, *grads = value_and_gradients(lambda a, b: (categorical(a), categorical(b)), q, p)
    torch.testing.assert_close(value, kl_divergence(categorical(q[1:]), categorical(p[1:])))
    assert all(g.isfinite().all() for g in grads)


@DTYPES
def test_logits_of_any_size_give_what_the_difference_of_their_largest_says(dtype):
    q, p = torch.tensor([200.0, -200, 0], dtype=dtype), torch.tensor([-1e4, 1e4, 0], dtype=dtype)
    value, *grads = value_and_gradients(lambda a, b: (categorical(a), categorical(b)), q, p)
    check(value, 2e4)
    assert all(g.isfinite().all() for g in grads)


def test_a_common_offset_of_float32_logits_costs_no_digits():
    torch.manual_seed(0)
    q = torch.randn(20, 8)
    p = q + 100 + 1e-3 * torch.randn(20, 8)
    exact = kl_divergence(categorical(q.double()), categorical(p.double()))
    value = kl_divergence(categorical(q), categorical(p))
    torch.testing.assert_close(value, exact.float(), rtol=2 * torch.finfo(torch.float32).eps, atol=0)


def test_probabilities_of_zero_are_masks_too():
    build = lambda a, b: (Categorical(a), Categorical(b))
    value, by_q, by_p = value_and_gradients(
        build, t64([[0.0, 0.5, 0.5], [0.0, 1.0, 1.0]]), t64([[0.0, 1.0, 3.0], [2.0, 1.0, 1.0]])
    )
    check(value, 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75), math.log(2))
    assert by_q.isfinite().all()
    assert by_p.isfinite().all()
    check(kl_divergence(*build(t64(0.5, 0.5), t64(0.0, 1.0))), INF)


def test_one_categorical_may_be_given_by_probabilities_and_the_other_by_logits():
    probs, logits = t64([[0.0, 0.2, 0.8], [0.1, 0.2, 0.7]]), t64([[-INF, 0.0, 2.0], [1.0, -200.0, 3.0]])
    by_logits = probs.log(), logits
    for order in (slice(None), slice(None, None, -1)):
        build = lambda a, b, order=order: (Categorical(a), categorical(b))[order]
        value, *grads = value_and_gradients(build, probs, logits)
        torch.testing.assert_close(value, kl_divergence(*(categorical(a) for a in by_logits[order])))
        assert all(g.isfinite().all() for g in grads)


def test_categoricals_of_other_numbers_of_classes_are_refused():
    for q, p in ((3, 1), (1, 3), (3, 4)):
        with pytest.raises(ValueError, match=rf"same number of classes, got {q} and {p}"):
            kl_divergence(Categorical(torch.ones(q)), Categorical(torch.ones(p)))
    assert torch_kl(Categorical(torch.ones(3)), Categorical(torch.ones(1))) < 0


def test_a_one_hot_code_is_its_class():
    q, p = t64(0.0, 1.0, -2.0), t64(1.0, 0.0, 0.0)
    expected = kl_divergence(categorical(q), categorical(p))
    for family in (OneHotCategorical, OneHotCategoricalStraightThrough):
        torch.testing.assert_close(kl_divergence(family(logits=q), family(logits=p)), expected, rtol=1e-14, atol=0)


def test_a_shared_prior_is_broadcast_over_the_batch_and_gets_the_sum_of_the_gradients():
    torch.manual_seed(0)
    q, p = torch.randn(6, 40, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    _, _, by_p = value_and_gradients(lambda a, b: (categorical(a), categorical(b)), q, p)
    torch.testing.assert_close(by_p, (p.softmax(-1) - q.softmax(-1)).sum(0))


def test_a_bernoulli_is_a_categorical_of_two_classes():
    q, p = t64(-3.0, 0.0, 40.0), t64(2.0, 0.1, 41.0)
    pairs = [torch.stack((torch.zeros_like(x), x), -1) for x in (q, p)]
    bernoulli = kl_divergence(Bernoulli(logits=q), Bernoulli(logits=p))
    torch.testing.assert_close(bernoulli, kl_divergence(*map(categorical, pairs)), rtol=1e-14, atol=0)
