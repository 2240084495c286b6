"""Poisson, Bernoulli, Geometric and Binomial at the ends of their parameters."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Binomial, Geometric, Poisson
from torch.distributions import kl_divergence as torch_kl

from tests.closed_forms.checks import DTYPES, INF, check, t64, value_and_gradients
from torch_klloss import AutoKL, has_closed_form, kl_divergence


def test_a_poisson_of_rate_zero_is_as_far_from_another_as_its_rate():
    value, by_q, by_p = value_and_gradients(lambda a, b: (Poisson(a), Poisson(b)), t64(0, 0), t64(2, 0))
    check(value, 2.0, 0.0)
    assert by_q.isfinite().all()
    check(by_p, 1.0, 1.0)


def test_a_poisson_is_infinitely_far_from_one_of_rate_zero():
    value, _, by_p = value_and_gradients(lambda a, b: (Poisson(a), Poisson(b)), t64(2.0), t64(0.0))
    check(value, INF)
    check(by_p, 0.0)


def test_a_certain_bernoulli_is_as_far_from_another_as_its_surprise():
    q, p = t64(0, 0, 1, 1), t64(0.25, 0, 0.25, 1)
    value, by_q, by_p = value_and_gradients(lambda a, b: (Bernoulli(a), Bernoulli(b)), q, p)
    check(value, -math.log(0.75), 0.0, -math.log(0.25), 0.0)
    assert by_q.isfinite().all()
    check(by_p, 1 / 0.75, 1.0, -4.0, -1.0)


def test_a_bernoulli_is_infinitely_far_from_a_certain_one_and_torch_fills_other_rows():
    q, p = Bernoulli(t64(0.0, 0.5)), Bernoulli(t64(0.1).expand(2, 2))
    check(kl_divergence(q, Bernoulli(t64(0.0, 1.0))), 0.0, INF)
    expected = [-math.log(0.9), 0.5 * math.log(0.5 / 0.1) + 0.5 * math.log(0.5 / 0.9)]
    check(kl_divergence(q, p), *expected, *expected)
    assert not torch.allclose(torch_kl(q, p), kl_divergence(q, p))


def test_probabilities_are_not_clamped():
    p = t64(1e-12)
    value, _, by_p = value_and_gradients(lambda a, b: (Bernoulli(a), Bernoulli(b)), t64(0.5), p)
    check(value, -math.log(2) - 0.5 * (math.log(1e-12) + math.log1p(-1e-12)))
    check(by_p, -0.5e12)
    in_float32 = kl_divergence(Bernoulli(torch.tensor(0.5)), Bernoulli(p.float()))
    check(in_float32, value.item())
    assert torch_kl(Bernoulli(torch.tensor(0.5)), Bernoulli(p.float())) < 8  # it clamps at 1.2e-7


@DTYPES
def test_a_logit_of_200_is_as_given(dtype):
    q, p = (
        torch.tensor([0.0, 0.0, 200.0, -200.0], dtype=dtype),
        torch.tensor([-200.0, 200.0, -200.0, 200.0], dtype=dtype),
    )
    value, by_q, by_p = value_and_gradients(lambda a, b: (Bernoulli(logits=a), Bernoulli(logits=b)), q, p)
    check(value, 100 - math.log(2), 100 - math.log(2), 400 - 200, 200.0)
    check(by_q, 50.0, -50.0, 0.0, 0.0)
    check(by_p, -0.5, 0.5, -1.0, 1.0)


def test_infinite_logits_are_certain_outcomes():
    q, p = t64(-INF, -INF, INF, 0.0, -INF), t64(-INF, 0.0, INF, INF, INF)
    value, by_q, by_p = value_and_gradients(lambda a, b: (Bernoulli(logits=a), Bernoulli(logits=b)), q, p)
    check(value, 0.0, math.log(2), 0.0, INF, INF)
    check(by_q, 0.0, 0.0, 0.0, 0.0, 0.0)
    check(by_p, 0.0, 0.5, 0.0, 0.0, 0.0)


def test_one_bernoulli_may_be_given_by_its_probability_and_the_other_by_its_logit():
    probs, logits = t64(0.0, 1e-9, 0.3, 1.0), t64(-200.0, -3.0, 2.0, 1e4)
    grid = [t.flatten() for t in torch.meshgrid(probs, logits, indexing="ij")]
    as_probs = Bernoulli(logits.sigmoid().repeat(4))
    for build, swapped in (
        (lambda a, b: (Bernoulli(a), Bernoulli(logits=b)), False),
        (lambda a, b: (Bernoulli(logits=b), Bernoulli(a)), True),
    ):
        value, *grads = value_and_gradients(build, *grid)
        assert all(g.isfinite().all() for g in grads)
        pair = (Bernoulli(grid[0]), as_probs)
        expected = kl_divergence(*(reversed(pair) if swapped else pair))
        plain = expected.isfinite() & (grid[1].abs() < 100)  # as a probability the others are 0 or 1
        torch.testing.assert_close(value[plain], expected[plain], rtol=1e-12, atol=1e-20)
    check(kl_divergence(Bernoulli(t64(0.5)), Bernoulli(logits=t64(1e4))), 5e3 - math.log(2))
    check(kl_divergence(Bernoulli(t64(1.0)), Bernoulli(logits=t64(-1e4))), 1e4)


def test_what_torch_has_cached_does_not_count_as_given():
    q, p = Bernoulli(t64(0.0)), Bernoulli(logits=t64(-200.0))
    assert q.logits > -100  # clamped
    assert p.probs > 0  # and now both parameters are in the dictionaries of q and of p
    check(kl_divergence(q, Bernoulli(t64(0.0))), 0.0)
    check(kl_divergence(Bernoulli(logits=t64(0.0)), p), 100 - math.log(2))


def test_a_geometric_that_succeeds_at_once_is_as_far_from_another_as_its_surprise():
    value, by_q, by_p = value_and_gradients(lambda a, b: (Geometric(a), Geometric(b)), t64(1, 1, 0.5), t64(0.25, 1, 1))
    check(value, math.log(4), 0.0, INF)
    assert by_q.isfinite().all()
    check(by_p, -4.0, -1.0, 0.0)


@DTYPES
def test_geometrics_of_very_rare_success_differ_by_the_ratio_alone(dtype):
    q = torch.tensor([-50.0, -200.0, -2000.0], dtype=dtype)
    value, by_q, by_p = value_and_gradients(lambda a, b: (Geometric(logits=a), Geometric(logits=b)), q, q + 1)
    torch.testing.assert_close(value, torch.full_like(q, math.e - 2))
    torch.testing.assert_close(by_p, torch.full_like(q, math.e - 1))
    torch.testing.assert_close(by_q, torch.full_like(q, 1 - math.e))


def test_a_binomial_of_certain_trials_is_as_far_as_they_are_surprising():
    value, by_q, by_p = value_and_gradients(
        lambda a, b: (Binomial(3, a), Binomial(3, b)), t64(1, 0, 1, 0), t64(0.25, 0.25, 1, 0)
    )
    check(value, 3 * math.log(4), -3 * math.log(0.75), 0.0, 0.0)
    assert by_q.isfinite().all()
    assert by_p.isfinite().all()
    assert torch_kl(Binomial(3, t64(1.0)), Binomial(3, t64(0.25))) == -INF


def test_a_binomial_is_infinitely_far_from_one_that_never_succeeds():
    q, p = Binomial(3, t64(0.5)), Binomial(3, t64(0.0))
    check(kl_divergence(q, p), INF)
    assert torch_kl(q, p).isfinite()


def test_a_binomial_that_counts_further_is_infinitely_far_unless_it_never_succeeds():
    q, p = Binomial(torch.tensor([4, 4, 3]), t64(0.5, 0.0, 0.5)), Binomial(3, t64(0.5))
    check(kl_divergence(q, p), INF, 3 * math.log(2), 0.0)


def test_a_binomial_that_counts_less_far_has_no_closed_form_but_a_sum():
    q, p = Binomial(2, t64(0.5)), Binomial(torch.tensor([[2], [3]]), t64(0.5))
    with pytest.raises(NotImplementedError, match="fewer trials"):
        kl_divergence(q, p)
    assert not has_closed_form(q, p)
    check(AutoKL(reduction="none")(q, p), 0.0, 0.25 * math.log(2) + 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3))


def test_binomials_without_trials_are_equal_whatever_their_probability():
    value, *grads = value_and_gradients(lambda a, b: (Binomial(0, a), Binomial(0, b)), t64(0.5, 1), t64(0, 0.3))
    check(value, 0.0, 0.0)
    assert all((g == 0).all() for g in grads)


def test_binomials_broadcast_against_each_other():
    q = Binomial(torch.tensor([3, 7]), t64(0.2, 0.4))
    p = Binomial(torch.tensor([3, 7]), t64([[0.3, 0.3], [0.0, 0.4]]))
    one = [
        [kl_divergence(Binomial(n, a), Binomial(n, b)) for n, a, b in zip((3, 7), q.probs, row, strict=True)]
        for row in p.probs
    ]
    check(kl_divergence(q, p), *(float(v) for row in one for v in row))
