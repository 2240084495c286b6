"""Sums over all counts, and the bound of the terms beyond the last."""

import math
from typing import ClassVar

import mpmath
import pytest
import torch
from torch.distributions import (
    AffineTransform,
    Binomial,
    Categorical,
    Distribution,
    Geometric,
    Independent,
    MixtureSameFamily,
    NegativeBinomial,
    Poisson,
    TransformedDistribution,
    constraints,
    kl_divergence,
)

from tests.methods.monte_carlo.exact_sums import (
    GEOMETRIC,
    GEOMETRIC_LOGITS,
    NEGATIVE_BINOMIAL,
    POISSON,
    check,
    exact_kl,
    leaves,
)
from torch_klloss.methods import Enumeration, NotCertifiedError
from torch_klloss.methods.enumeration import counts
from torch_klloss.methods.enumeration.counts import Window, sum_over_counts

EPS = torch.finfo(torch.float64).eps

# q, p, their parameters, and the number of points that hold all of q but 1e-30.
PAIRS = {
    "Poisson‖Geometric": (POISSON, GEOMETRIC, (3.0,), (0.2,), 90),
    "Poisson‖NegativeBinomial": (POISSON, NEGATIVE_BINOMIAL, (7.0,), (4.5, 0.5), 110),
    "Poisson‖far Poisson": (POISSON, POISSON, (3.0,), (300.0,), 90),
    "Geometric‖Poisson": (GEOMETRIC, POISSON, (0.3,), (2.0,), 330),
    "Geometric(logits)‖Poisson": (GEOMETRIC_LOGITS, POISSON, (0.5,), (2.0,), 150),
    "Geometric‖NegativeBinomial": (GEOMETRIC, NEGATIVE_BINOMIAL, (0.4,), (0.3, 0.6), 230),
    "NegativeBinomial‖Poisson": (NEGATIVE_BINOMIAL, POISSON, (2.5, 0.6), (2.0,), 250),
    "NegativeBinomial(r < 1)‖Geometric": (NEGATIVE_BINOMIAL, GEOMETRIC, (0.3, 0.6), (0.2,), 230),
    "NegativeBinomial‖another": (NEGATIVE_BINOMIAL, NEGATIVE_BINOMIAL, (4.0, 0.5), (3.0, 0.7), 180),
}
every_pair = pytest.mark.parametrize(("q", "p", "of_q", "of_p", "num_points"), PAIRS.values(), ids=PAIRS)


@every_pair
def test_value_and_gradient_are_those_of_the_sum_at_fifty_digits(q, p, of_q, of_p, num_points):
    of_q, of_p = leaves(of_q), leaves(of_p)
    estimate = Enumeration().estimate(q(*of_q), p(*of_p))
    # A term is good to some eps of its logarithms, which are below 100 where q has mass.
    check(estimate.value, of_q + of_p, exact_kl(q, p, of_q, of_p, num_points), 100 * EPS, 1000 * EPS)
    assert not estimate.exact
    assert estimate.method == "enumeration"
    assert estimate.error_bound <= 1e-12 * estimate.value


@every_pair
def test_single_precision_is_computed_in_double(q, p, of_q, of_p, num_points):
    of_q, of_p = leaves(of_q, torch.float32), leaves(of_p, torch.float32)
    value = Enumeration().estimate(q(*of_q), p(*of_p)).value
    assert value.dtype == torch.float32
    eps = torch.finfo(torch.float32).eps
    check(value, of_q + of_p, exact_kl(q, p, of_q, of_p, num_points), eps, 2 * eps)


NEAR = {
    "Poisson": (POISSON, POISSON, (3.0,), (3.0 * (1 + 1e-8),), 90),
    "Geometric": (GEOMETRIC, GEOMETRIC, (0.3,), (0.3 * (1 - 1e-8),), 330),
    "NegativeBinomial": (NEGATIVE_BINOMIAL, NEGATIVE_BINOMIAL, (4.0, 0.5), (4.0 * (1 + 1e-8), 0.5), 180),
    "NegativeBinomial, almost Poisson": (POISSON, NEGATIVE_BINOMIAL, (3.0,), (3e8, 1e-8), 90),
}


@pytest.mark.parametrize(("q", "p", "of_q", "of_p", "num_points"), NEAR.values(), ids=NEAR)
def test_near_equality_the_digits_are_kept_where_the_plain_sum_has_none(q, p, of_q, of_p, num_points):
    of_q, of_p = leaves(of_q), leaves(of_p)
    exact, _ = exact_kl(q, p, of_q, of_p, num_points)
    built_q, built_p = q(*of_q), p(*of_p)
    value = Enumeration().estimate(built_q, built_p).value
    assert 0 < exact < 1e-15
    assert abs(value.item() - exact) <= 1e-6 * exact
    x = torch.arange(num_points, dtype=torch.float64)
    log_q = built_q.log_prob(x)
    plain = (log_q.exp() * (log_q - built_p.log_prob(x))).sum().item()
    assert abs(plain - exact) > 0.05 * exact


@pytest.mark.parametrize("d", [Poisson(3.3), Geometric(torch.tensor(0.3)), NegativeBinomial(2.5, torch.tensor(0.3))])
def test_the_kl_to_itself_is_zero(d):
    estimate = Enumeration().estimate(d, d)
    assert estimate.value == 0
    assert estimate.error_bound < 1e-25


@pytest.mark.parametrize(("q", "p"), [(1e6, 1.001e6), (1e6, 1e6 + 1), (2e7, 2.1e7)])
def test_a_large_mean_is_summed_around_itself(q, p):
    q, p = (torch.tensor(rate, dtype=torch.float64) for rate in (q, p))
    estimate = Enumeration().estimate(Poisson(q), Poisson(p))
    with mpmath.workdps(40):
        exact_q, exact_p = mpmath.mpf(q.item()), mpmath.mpf(p.item())
        exact = exact_q * mpmath.log(exact_q / exact_p) - exact_q + exact_p
    assert abs(estimate.value.item() - exact) <= 1e-9 * exact
    assert estimate.num_evaluations < 30 * q**0.5


@every_pair
def test_the_bound_holds_for_a_window_that_is_too_small(monkeypatch, q, p, of_q, of_p, num_points):
    of_q, of_p = leaves(of_q), leaves(of_p)
    exact = float(exact_kl(q, p, of_q, of_p, num_points)[0])
    monkeypatch.setattr(counts, "_RTOL", math.inf)
    for upper in (20, 30, 45):
        window = Window(torch.tensor(0.0, dtype=torch.float64), torch.tensor(float(upper), dtype=torch.float64))
        monkeypatch.setattr(counts, "_window", lambda q, max_terms, window=window: window)
        value, bound, num_terms = sum_over_counts(q(*of_q), p(*of_p), 10**6)
        assert num_terms == upper
        assert abs(value.item() - exact) <= bound.item() + 100 * EPS * exact
        if upper == 20:  # and it is tight enough to notice the truncation
            assert abs(value.item() - exact) > 1e-16
            assert bound < 1e6 * abs(value.item() - exact) + 1e-9


def test_the_bound_holds_where_the_lower_counts_are_left_out(monkeypatch):
    monkeypatch.setattr(counts, "_RTOL", math.inf)
    q, p = Poisson(torch.tensor(400.0, dtype=torch.float64)), Geometric(torch.tensor(0.01, dtype=torch.float64))
    exact = Enumeration().estimate(q, p).value
    window = Window(*(torch.tensor(end, dtype=torch.float64) for end in (310.0, 700.0)))
    monkeypatch.setattr(counts, "_window", lambda q, max_terms: window)
    value, bound, _ = sum_over_counts(q, p, 10**6)
    assert 1e-8 < (value - exact).abs() <= bound < 1e-2


def test_a_truncation_that_matters_is_not_certified(monkeypatch):
    window = Window(*(torch.tensor(end, dtype=torch.float64) for end in (0.0, 20.0)))
    monkeypatch.setattr(counts, "_window", lambda q, max_terms: window)
    with pytest.raises(NotCertifiedError, match=r"The tail of the sum for KL\(Poisson‖Geometric\) cannot be bounded"):
        Enumeration().estimate(Poisson(7.0), Geometric(0.2))


def test_chunks_add_up_to_the_whole_in_value_and_gradient(monkeypatch):
    def run():
        rate, probs = leaves((50.0, 0.02))
        value = Enumeration().estimate(Poisson(rate.expand(3)), Geometric(probs)).value.sum()
        return value, *torch.autograd.grad(value, (rate, probs))

    whole = run()
    monkeypatch.setattr(counts, "_CHUNK", 64)
    for a, b in zip(run(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


def test_batch_elements_of_unlike_scale_are_those_alone():
    rates, probs = torch.tensor([0.0, 1e-30, 2.0, 1e4]), torch.tensor([[0.2], [0.9]])
    together = Enumeration().estimate(Poisson(rates), Geometric(probs))
    assert together.value.shape == together.error_bound.shape == (2, 4)
    for i in range(2):
        for j in range(4):
            alone = Enumeration().estimate(Poisson(rates[j]), Geometric(probs[i, 0])).value
            torch.testing.assert_close(together.value[i, j], alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("q", [Poisson(torch.tensor(1e13)), Geometric(torch.tensor(1e-6))])
def test_a_spread_that_takes_too_many_terms_is_refused(q):
    with pytest.raises(NotImplementedError, match=r"at most max_terms=524288 counts.*Raise max_terms"):
        Enumeration().estimate(q, Poisson(1.0))
    with pytest.raises(ValueError, match="max_terms must be an integer of at least 0, got -1"):
        Enumeration(max_terms=-1)


def test_with_no_terms_counts_are_refused():
    assert Enumeration(max_terms=0).supports(Poisson(1.0), Geometric(0.5)) is False
    with pytest.raises(NotImplementedError, match="or known counts, got Poisson"):
        Enumeration(max_terms=0).estimate(Poisson(1.0), Geometric(0.5))


def test_a_p_that_lacks_a_count_far_below_the_window_makes_the_kl_infinite():
    q, p = Poisson(torch.tensor([1e4, 1e-3], dtype=torch.float64)), shifted(Poisson(torch.tensor(1e4).double()), 1.0)
    assert q.log_prob(torch.tensor(0.0)).exp()[0] == 0  # it underflows, and yet q reaches it
    assert Enumeration().estimate(q, p).value.tolist() == [math.inf, math.inf]
    assert Enumeration().estimate(q, shifted(p, -1.0)).value.isfinite().all()


def test_a_p_of_finite_support_makes_the_kl_infinite():
    assert Enumeration().estimate(Poisson(2.0), Binomial(50, torch.tensor(0.5))).value == math.inf
    assert Enumeration().estimate(Geometric(0.5), Categorical(torch.ones(400))).value == math.inf
    # A Poisson of rate 0 does not leave the support.
    value = Enumeration().estimate(Poisson(torch.tensor([0.0, 1.0])), Binomial(5, torch.tensor(0.2))).value
    assert value.tolist() == [pytest.approx(-5 * math.log(0.8), rel=1e-6), math.inf]


class FromLogMass(Distribution):
    """A user-defined law: only its log_prob is known."""

    support = constraints.nonnegative_integer
    arg_constraints: ClassVar = {}

    def __init__(self, log_mass):
        super().__init__(validate_args=False)
        self.log_mass = log_mass

    def log_prob(self, value):
        return self.log_mass(value)


def test_a_user_defined_p_is_evaluated_by_its_log_prob():
    zeta = FromLogMass(lambda x: -2.5 * torch.log(x + 1) - math.log(float(mpmath.zeta(2.5))))
    q = Poisson(torch.tensor(4.0, dtype=torch.float64))
    estimate = Enumeration().estimate(q, zeta)
    x = range(120)
    with mpmath.workdps(30):
        logs = [
            (POISSON.log_mass(k, mpmath.mpf(4)), -2.5 * mpmath.log(k + 1) - mpmath.log(mpmath.zeta(2.5))) for k in x
        ]
        exact = mpmath.fsum(mpmath.exp(a) * (a - b) for a, b in logs)
    assert abs(estimate.value.item() - exact) < 1e-13 * exact
    assert Enumeration().supports(q, zeta) is None


def test_a_p_whose_tail_is_too_thin_makes_the_kl_infinite():
    # -log p grows like 4^x where q falls like 2^-x.
    doubly_exponential = FromLogMass(lambda x: -(4.0 ** x.clamp(max=500)) - 0.02)
    assert Enumeration().estimate(Geometric(0.5), doubly_exponential).value == math.inf
    assert Enumeration().estimate(Poisson(2.0), FromLogMass(lambda x: -(x**3))).value.isfinite()


@pytest.mark.parametrize("rate", [1e-9, 5.0])
def test_a_p_that_may_have_underflowed_in_the_tail_is_not_certified(rate):
    q = Poisson(torch.tensor(rate, dtype=torch.float64))
    p = FromLogMass(lambda x: torch.where(x > 120, -math.inf, -x))
    with pytest.raises(NotCertifiedError, match=r"as large as inf\. Use MonteCarloKL"):
        Enumeration().estimate(q, p)
    assert Enumeration().estimate(q, FromLogMass(lambda x: -x)).value.isfinite()


def test_a_q_of_unknown_tail_is_refused():
    with pytest.raises(NotImplementedError, match="or known counts, got FromLogMass; use MonteCarloKL or AutoKL"):
        Enumeration().estimate(FromLogMass(lambda x: -x), Poisson(1.0))


def test_nan_parameters_give_nan_in_their_own_element():
    rates = torch.tensor([2.0, math.nan])
    value = Enumeration().estimate(Poisson(rates, validate_args=False), Geometric(0.3)).value
    assert value.isnan().tolist() == [False, True]
    assert Enumeration().estimate(Poisson(2.0), Geometric(torch.tensor(math.nan), validate_args=False)).value.isnan()


def shifted(d: Distribution, by: float) -> TransformedDistribution:
    return TransformedDistribution(d, [AffineTransform(by, 1.0)])


def test_moved_counts_keep_their_kl():
    q, p = Poisson(torch.tensor([2.0, 5.0])), Poisson(3.0)
    torch.testing.assert_close(Enumeration().estimate(shifted(q, 1.5), shifted(p, 1.5)).value, kl_divergence(q, p))
    doubled = [TransformedDistribution(d, [AffineTransform(0.0, 2.0)]) for d in (q, p)]
    torch.testing.assert_close(Enumeration().estimate(*doubled).value, kl_divergence(q, p))


def test_moved_counts_meet_those_of_another_law_point_by_point():
    q, p = Poisson(torch.tensor(2.0, dtype=torch.float64)), Geometric(torch.tensor(0.3, dtype=torch.float64))
    x = torch.arange(80, dtype=torch.float64)
    log_q = q.log_prob(x)
    exact = (log_q.exp() * (log_q - p.log_prob(x + 1))).sum()
    torch.testing.assert_close(Enumeration().estimate(shifted(q, 1.0), p).value, exact, rtol=1e-13, atol=0)
    assert Enumeration().estimate(q, shifted(p, 1.0)).value == math.inf
    assert Enumeration().estimate(shifted(q, 0.5), p).value == math.inf


def test_a_mixture_of_counts_is_summed_like_any_other():
    logits, rates = torch.tensor([0.3, -0.4], dtype=torch.float64), torch.tensor([2.0, 40.0], dtype=torch.float64)
    logits.requires_grad_(), rates.requires_grad_()
    q = MixtureSameFamily(Categorical(logits=logits), Poisson(rates))
    p = Geometric(torch.tensor(0.1, dtype=torch.float64))
    x = torch.arange(160, dtype=torch.float64)
    log_q = q.log_prob(x)
    exact = (log_q.exp() * (log_q - p.log_prob(x))).sum()
    value = Enumeration().estimate(q, p).value
    torch.testing.assert_close(value, exact, rtol=1e-12, atol=0)
    actual, expected = (torch.autograd.grad(each, (logits, rates), retain_graph=True) for each in (value, exact))
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def test_independent_counts_are_peeled_and_summed():
    q, p = Poisson(torch.tensor([[2.0, 5.0, 9.0], [1.0, 3.0, 4.0]])), Geometric(torch.tensor([0.2, 0.3, 0.4]))
    joint, single = (Enumeration().estimate(*pair) for pair in ((Independent(q, 1), Independent(p, 1)), (q, p)))
    torch.testing.assert_close(joint.value, single.value.sum(-1))
    torch.testing.assert_close(joint.error_bound, single.error_bound.sum(-1))
