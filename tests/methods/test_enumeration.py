"""The exact sum over a finite support."""

import itertools
import math

import pytest
import torch
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Geometric,
    Independent,
    Normal,
    OneHotCategorical,
    Poisson,
)

from torch_klloss.methods import Enumeration

PROBS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def by_hand(q, p, points) -> torch.Tensor:
    """Add up q (log q - log p) in plain Python, from the log-probabilities alone."""
    terms = [(q.log_prob(x).item(), p.log_prob(x).item()) for x in points.double()]
    return torch.tensor(math.fsum(math.exp(a) * (a - b) for a, b in terms), dtype=torch.float64)


@pytest.mark.parametrize(
    ("q", "p"),
    [
        (Binomial(4, PROBS[0]), Poisson(PROBS[1] * 3)),
        (Binomial(4, PROBS[0]), Geometric(PROBS[1])),
        (Binomial(2, PROBS[0]), Binomial(4, PROBS[1])),
        (Bernoulli(PROBS[0]), Poisson(PROBS[1])),
        (Bernoulli(PROBS[0]), Categorical(PROBS)),
        (Categorical(PROBS), Poisson(PROBS[1])),
        (Categorical(PROBS), Binomial(2, PROBS[1])),
        (OneHotCategorical(PROBS), OneHotCategorical(PROBS.flip(0))),
    ],
    ids=lambda d: type(d).__name__,
)
def test_the_sum_is_the_one_by_hand(q, p):
    estimate = Enumeration().estimate(q, p)
    points = q.enumerate_support(expand=False)
    torch.testing.assert_close(estimate.value, by_hand(q, p, points), rtol=1e-14, atol=1e-15)
    assert (estimate.exact, estimate.std_error, estimate.error_bound) == (True, None, None)
    assert (estimate.method, estimate.num_evaluations) == ("enumeration", len(points))


@pytest.mark.parametrize(
    ("q_shape", "p_shape"), [((), (2,)), ((2,), ()), ((3,), (2, 1)), ((2, 1), (3,)), ((1, 2), (3, 1)), ((2,), (2, 2))]
)
@pytest.mark.parametrize("classes", [2, 3])
def test_batch_shapes_broadcast_in_both_directions(q_shape, p_shape, classes):
    q_logits, p_logits = (torch.randn(*shape, classes, dtype=torch.float64) for shape in (q_shape, p_shape))
    value = Enumeration().estimate(Categorical(logits=q_logits), Categorical(logits=p_logits)).value
    shape = torch.broadcast_shapes(q_shape, p_shape)
    assert value.shape == shape
    q_logits, p_logits = (each.expand(*shape, classes) for each in (q_logits, p_logits))
    for i in itertools.product(*map(range, shape)):
        alone = by_hand(Categorical(logits=q_logits[i]), Categorical(logits=p_logits[i]), torch.arange(classes))
        torch.testing.assert_close(value[i], alone, rtol=1e-13, atol=1e-14)


def test_the_gradient_is_that_of_the_sum():
    q_logits = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64, requires_grad=True)
    p_logits = torch.tensor([-0.5, 0.4, 0.2], dtype=torch.float64, requires_grad=True)
    log_q, log_p = q_logits.log_softmax(-1), p_logits.log_softmax(-1)
    expected = torch.autograd.grad((log_q.exp() * (log_q - log_p)).sum(), (q_logits, p_logits))
    value = Enumeration().estimate(Categorical(logits=q_logits), Categorical(logits=p_logits)).value
    for actual, exact in zip(torch.autograd.grad(value, (q_logits, p_logits)), expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=0, atol=1e-15)


def test_zero_times_log_zero_is_zero_in_value_and_gradient():
    logits = torch.tensor([0.0, 1.0, -math.inf], dtype=torch.float64, requires_grad=True)
    p_logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for p in (Categorical(logits=p_logits), Categorical(logits=logits.detach())):
        value = Enumeration().estimate(Categorical(logits=logits), p).value
        log_q = logits[:2].log_softmax(-1)
        exact = (log_q.exp() * (log_q - p.logits[:2])).sum()
        torch.testing.assert_close(value, exact, rtol=0, atol=1e-15)
        assert torch.autograd.grad(value, logits, retain_graph=True)[0][:2].isfinite().all()
    value = Enumeration().estimate(Categorical(logits=logits), Categorical(logits=p_logits)).value
    assert torch.autograd.grad(value, p_logits)[0].isfinite().all()


def test_a_point_that_p_does_not_reach_makes_the_kl_infinite():
    q = Categorical(logits=torch.tensor([[0.0, 0.0, -math.inf], [0.0, -math.inf, 0.0]]))
    p = Categorical(logits=torch.tensor([0.0, 0.0, -math.inf]))
    assert Enumeration().estimate(q, p).value.tolist() == [pytest.approx(0.0, abs=1e-6), math.inf]
    assert Enumeration().estimate(Binomial(3, 0.5), Binomial(2, torch.tensor(0.5))).value == math.inf
    assert Enumeration().estimate(Categorical(torch.ones(3)), Bernoulli(0.5)).value == math.inf


def test_a_probability_given_as_zero_is_zero():
    # torch's log_prob clamps it to the smallest number above.
    q = Categorical(torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64))
    value = Enumeration().estimate(q, Binomial(1, torch.tensor(0.5, dtype=torch.float64))).value
    torch.testing.assert_close(value, torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-15)


def test_independent_is_peeled_and_summed():
    q, p = Bernoulli(PROBS), Binomial(2, PROBS.flip(0))
    value = Enumeration().estimate(Independent(q, 1), Independent(p, 1)).value
    torch.testing.assert_close(value, Enumeration().estimate(q, p).value.sum())


@pytest.mark.parametrize(
    "q",
    [Poisson(1.0), Normal(0.0, 1.0), Binomial(torch.tensor([2, 5]), 0.5), Independent(Bernoulli(PROBS), 1)],
    ids=["infinite", "continuous", "inhomogeneous", "joint"],
)
def test_a_support_that_cannot_be_listed_is_refused(q):
    p = q if not isinstance(q, Independent) else OneHotCategorical(PROBS)
    assert not Enumeration().supports(q, p)
    with pytest.raises(NotImplementedError, match=r"finite support of at most 4096 points.*use MonteCarloKL or AutoKL"):
        Enumeration().estimate(q, p)


def test_a_support_above_the_limit_is_refused():
    q = Categorical(torch.ones(11))
    assert Enumeration(max_support=11).supports(q, q)
    assert not Enumeration(max_support=10).supports(q, q)
    with pytest.raises(NotImplementedError, match="at most 10 points"):
        Enumeration(max_support=10).estimate(q, q)
    with pytest.raises(ValueError, match="max_support must be at least 1, got 0"):
        Enumeration(max_support=0)


def test_a_support_above_the_limit_is_not_even_listed():
    class Huge(Binomial):
        def enumerate_support(self, expand=True):
            raise AssertionError("a billion points were listed")

    assert not Enumeration().supports(Huge(10**9, torch.tensor(0.5)), Poisson(1.0))


@pytest.mark.parametrize("q", [Binomial(3, torch.ones(0)), Categorical(torch.ones(0, 3)), Bernoulli(torch.ones(0))])
def test_an_empty_batch_has_no_kl(q):
    assert Enumeration().estimate(q, Poisson(1.0)).value.shape == (0,)


def test_nan_parameters_give_nan():
    q = Categorical(logits=torch.tensor([0.0, math.nan]), validate_args=False)
    p = Categorical(torch.ones(2))
    assert Enumeration().estimate(q, p).value.isnan()
    assert Enumeration().estimate(p, q).value.isnan()
