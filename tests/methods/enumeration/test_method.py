"""Exact sums over a finite support."""

import itertools
import math
from typing import ClassVar

import pytest
import torch
from torch.distributions import (
    AffineTransform,
    Bernoulli,
    Binomial,
    Categorical,
    Distribution,
    Geometric,
    Independent,
    MixtureSameFamily,
    Multinomial,
    Normal,
    OneHotCategorical,
    Poisson,
    TransformedDistribution,
    constraints,
)

from tests.methods.monte_carlo.exact_sums import (
    BERNOULLI,
    BINOMIAL_4,
    BINOMIAL_7,
    BINOMIAL_4000,
    GEOMETRIC,
    NEGATIVE_BINOMIAL,
    POISSON,
    check,
    exact_kl,
    leaves,
)
from torch_klloss.methods import ClosedForm, Enumeration

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


def joint(d: Distribution, dims: int = 1) -> Independent:
    return Independent(d, dims)


def mixture(components: Distribution) -> MixtureSameFamily:
    weights = torch.tensor([0.4, 0.6], dtype=torch.float64)
    return MixtureSameFamily(Categorical(weights), components)


BITS = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=torch.float64)
TWO_BITS = mixture(joint(Bernoulli(torch.stack([PROBS, PROBS.flip(0)]))))

COMPOSED = {
    "product‖joint": (joint(Bernoulli(PROBS)), TWO_BITS, BITS),
    "mixture of products‖product": (TWO_BITS, joint(Bernoulli(PROBS)), BITS),
    "mixture of products‖itself": (TWO_BITS, TWO_BITS, BITS),
    "mixture‖Poisson": (mixture(Binomial(4, PROBS[:2])), Poisson(PROBS[1]), torch.arange(5)),
    "mixture of classes": (mixture(Categorical(PROBS.expand(2, 3))), Categorical(PROBS), torch.arange(3)),
    "nested product‖product": (
        Independent(joint(Bernoulli(PROBS.reshape(3, 1))), 1),
        Independent(Bernoulli(PROBS.flip(0).reshape(3, 1)), 2),
        BITS.unsqueeze(-1),
    ),
    "one-hot mixture": (
        mixture(OneHotCategorical(torch.stack([PROBS, PROBS.flip(0)]))),
        OneHotCategorical(PROBS),
        torch.eye(3),
    ),
    "Multinomial‖Multinomial": (
        Multinomial(3, PROBS),
        Multinomial(3, PROBS.flip(0)),
        torch.tensor([x for x in itertools.product(range(4), repeat=3) if sum(x) == 3]),
    ),
    "Multinomial‖product": (
        Multinomial(3, PROBS),
        joint(Poisson(PROBS)),
        torch.tensor([x for x in itertools.product(range(4), repeat=3) if sum(x) == 3]),
    ),
}


@pytest.mark.parametrize(("q", "p", "points"), COMPOSED.values(), ids=COMPOSED)
def test_composed_supports_are_summed_over_too(q, p, points):
    estimate = Enumeration().estimate(q, p)
    torch.testing.assert_close(estimate.value, by_hand(q, p, points), rtol=1e-13, atol=1e-15)
    assert Enumeration().supports(q, p)
    assert estimate.exact


def test_a_mixture_of_unlike_supports_covers_them_all():
    short, long, p = Binomial(2, PROBS[0]), Binomial(5, PROBS[1]), Geometric(PROBS[0])
    q = mixture(Binomial(torch.tensor([2.0, 5.0], dtype=torch.float64), PROBS[:2]))
    x = torch.arange(6, dtype=torch.float64)
    mass = 0.6 * long.log_prob(x).exp()
    mass[:3] += 0.4 * short.log_prob(x[:3]).exp()
    exact = (mass * (mass.log() - p.log_prob(x))).sum()
    torch.testing.assert_close(Enumeration().estimate(q, p).value, exact, rtol=1e-14, atol=0)
    assert Enumeration().estimate(q, short).value == math.inf


def test_a_batch_of_unlike_supports_is_summed_each_over_its_own():
    n, probs = torch.tensor([2.0, 5.0, 0.0]), torch.tensor([0.3, 0.6, 0.2], dtype=torch.float64)
    q, p = Binomial(n, probs), Poisson(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    value = Enumeration().estimate(q, p).value
    for i in range(3):
        alone = by_hand(Binomial(int(n[i]), probs[i]), Poisson(p.rate[i]), torch.arange(int(n[i]) + 1))
        torch.testing.assert_close(value[i], alone, rtol=1e-13, atol=0)
    shorter = Binomial(torch.tensor([2.0, 4.0, 0.0]), probs)
    assert Enumeration().estimate(q, shorter).value.isinf().tolist() == [False, True, False]


EXACT = {
    "Binomial‖Poisson": (BINOMIAL_4, POISSON, (0.3,), (1.1,), 5),
    "Binomial(4000)‖Poisson": (BINOMIAL_4000, POISSON, (0.3,), (1100.0,), 4001),
    "Binomial‖Geometric": (BINOMIAL_7, GEOMETRIC, (0.3,), (0.2,), 8),
    "Binomial‖more trials": (BINOMIAL_4, BINOMIAL_7, (0.3,), (0.2,), 5),
    "Bernoulli‖NegativeBinomial": (BERNOULLI, NEGATIVE_BINOMIAL, (-1.0,), (2.5, 0.2), 2),
    "sure Bernoulli‖Geometric": (BERNOULLI, GEOMETRIC, (-30.0,), (0.2,), 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("q", "p", "of_q", "of_p", "num_points"), EXACT.values(), ids=EXACT)
def test_value_and_gradient_are_those_at_fifty_digits(q, p, of_q, of_p, num_points, dtype):
    of_q, of_p = leaves(of_q, dtype), leaves(of_p, dtype)
    value = Enumeration().estimate(q(*of_q), p(*of_p)).value
    # float64 sums what float32 rounds once at the end; its own terms are good to some eps of log-masses below 100.
    eps = 2 * torch.finfo(dtype).eps if dtype == torch.float32 else 100 * torch.finfo(dtype).eps
    check(value, of_q + of_p, exact_kl(q, p, of_q, of_p, num_points), eps, 10 * eps)


@pytest.mark.parametrize("distance", [1e-2, 1e-5, 1e-8])
def test_near_equality_the_digits_are_kept_where_the_plain_sum_has_none(distance):
    of_q, of_p = leaves((0.3,)), leaves((0.3 * (1 + distance),))
    q, p = BINOMIAL_7(*of_q), BINOMIAL_7(*of_p)
    exact, _ = exact_kl(BINOMIAL_7, BINOMIAL_7, of_q, of_p, 8)
    error = abs(Enumeration().estimate(q, p).value.item() - exact) / exact
    plain = abs(by_hand(q, p, torch.arange(8)).item() - exact) / exact
    eps = torch.finfo(torch.float64).eps
    assert error < 100 * eps / distance
    assert error < 1e-6
    assert plain > 100 * error


def test_near_equality_no_term_is_negative_and_equality_is_zero():
    logits = torch.randn(1000, 5, generator=torch.Generator().manual_seed(0))
    q, p = Categorical(logits=logits), Categorical(logits=logits * (1 + 1e-6))
    assert (Enumeration().estimate(q, p).value >= 0).all()
    assert (Enumeration().estimate(q, q).value == 0).all()


def test_the_derivative_at_a_probability_of_zero_is_that_of_the_closed_form():
    weights = torch.tensor([0.6, 0.4, 0.0], dtype=torch.float64)
    for given in ("probs", "logits"):
        raw = (weights if given == "probs" else weights.log()).requires_grad_()
        q, p = Categorical(**{given: raw}), Categorical(logits=torch.zeros(3, dtype=torch.float64))
        summed, closed = (
            torch.autograd.grad(method.estimate(q, p).value, raw, retain_graph=True)[0]
            for method in (Enumeration(), ClosedForm())
        )
        torch.testing.assert_close(summed[:2], closed[:2], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(summed[2], closed[2], rtol=1e-2, atol=0)  # infinite by the probability, bounded
        weights = weights.detach()


@pytest.mark.parametrize(("q", "p"), [(0.0, 0.3), (1.0, 0.3), (0.3, 0.0), (0.3, 1.0), (0.0, 1.0)])
def test_certain_outcomes_have_the_value_and_the_gradient_of_the_closed_form(q, p):
    q, p = leaves((q, p))
    pair = Bernoulli(q), Bernoulli(p)
    summed, closed = (method.estimate(*pair).value for method in (Enumeration(), ClosedForm()))
    torch.testing.assert_close(summed, closed, rtol=1e-14, atol=1e-15)
    for a, b in zip(torch.autograd.grad(summed, (q, p)), torch.autograd.grad(closed, (q, p)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-12)  # where it is infinite, the bounds of it differ a bit


@pytest.mark.parametrize(("certain", "slope"), [(0.0, 1.0), (1.0, -1.0)])
def test_two_that_are_certain_of_the_same_part_as_soon_as_p_doubts(certain, slope):
    q, p = leaves((certain, certain))
    value = Enumeration().estimate(Bernoulli(q), Bernoulli(p)).value
    assert value == 0
    by_q, by_p = torch.autograd.grad(value, (q, p))
    assert by_p == slope  # of -log(1 - p)
    assert by_q == -slope  # nothing changes where both doubt alike


@pytest.mark.parametrize(
    ("q", "p"),
    [
        (Normal(0.0, 1.0), Normal(0.0, 1.0)),
        (joint(Poisson(torch.ones(2))), mixture(joint(Poisson(torch.ones(2, 2))))),
        (joint(Bernoulli(torch.full((13,), 0.5))), mixture(joint(Bernoulli(torch.full((2, 13), 0.5))))),
        (Multinomial(40, torch.ones(4)), Multinomial(40, torch.ones(4))),
    ],
    ids=["continuous", "infinite product", "large product", "large Multinomial"],
)
def test_a_support_that_cannot_be_listed_is_refused(q, p):
    assert Enumeration().supports(q, p) is False
    with pytest.raises(NotImplementedError, match=r"finite support of at most 4096 points.*use MonteCarloKL or AutoKL"):
        Enumeration().estimate(q, p)


def test_moved_classes_are_summed_where_they_are():
    moved = TransformedDistribution(Bernoulli(PROBS), [AffineTransform(torch.tensor([1.0, 0.0, 0.5]), 2.0)])
    value = Enumeration().estimate(moved, Geometric(PROBS[0])).value
    geometric = Geometric(PROBS[0])
    for i, points in enumerate(([1.0, 3.0], [0.0, 2.0])):
        exact = sum(
            m * (m.log() - geometric.log_prob(torch.tensor(x)))
            for m, x in zip((1 - PROBS[i], PROBS[i]), points, strict=True)
        )
        torch.testing.assert_close(value[i], exact, rtol=1e-14, atol=0)
    assert value[2] == math.inf


def test_the_sum_works_under_vmap_and_in_a_graph_of_any_order():
    logits = torch.randn(5, 3, dtype=torch.float64)

    def kl(row):
        return Enumeration().estimate(Categorical(logits=row), Poisson(torch.ones((), dtype=torch.float64))).value

    each = torch.stack([kl(row) for row in logits])
    torch.testing.assert_close(torch.func.vmap(kl)(logits), each, rtol=1e-14, atol=0)
    gradients = torch.func.vmap(torch.func.grad(kl))(logits)
    leaf = logits.clone().requires_grad_()
    expected = torch.autograd.grad(torch.stack([kl(row) for row in leaf]).sum(), leaf)[0]
    torch.testing.assert_close(gradients, expected, rtol=1e-13, atol=1e-15)


def test_a_support_above_the_limit_is_refused():
    q = Categorical(torch.ones(11))
    assert Enumeration(max_support=11).supports(q, q)
    assert not Enumeration(max_support=10).supports(q, q)
    with pytest.raises(NotImplementedError, match="at most 10 points"):
        Enumeration(max_support=10).estimate(q, q)
    with pytest.raises(ValueError, match="max_support must be an integer of at least 1, got 0"):
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


class Die(Distribution):
    """A user-defined law that lists its points."""

    arg_constraints: ClassVar = {}
    has_enumerate_support = True

    def __init__(self, sides):
        self.sides = sides
        super().__init__(validate_args=False)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self):
        return constraints.integer_interval(1, self.sides)

    def log_prob(self, value):
        return torch.full_like(value, -math.log(self.sides))

    def enumerate_support(self, expand=True):
        if self.sides > 4096:
            raise AssertionError("more points were listed than may be summed")
        return torch.arange(1.0, self.sides + 1)


def test_a_law_that_lists_its_own_points_is_summed_over_them():
    value = Enumeration().estimate(Die(6), Die(8)).value
    assert value.item() == pytest.approx(math.log(8 / 6), rel=1e-6)
    assert Enumeration().estimate(Die(8), Die(6)).value == math.inf
    assert Enumeration().estimate(Bernoulli(torch.tensor(0.5)), Die(6)).value == math.inf
    assert Enumeration().supports(Die(5000), Die(6)) is False
