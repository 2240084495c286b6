"""Probabilities of the points of a discrete distribution."""

import itertools
import math

import mpmath
import pytest
import torch
from torch.distributions import (
    AffineTransform,
    Bernoulli,
    Binomial,
    Categorical,
    Geometric,
    Independent,
    MixtureSameFamily,
    Multinomial,
    NegativeBinomial,
    OneHotCategorical,
    Poisson,
    TransformedDistribution,
)

from tests.methods.monte_carlo.exact_sums import (
    BERNOULLI,
    BINOMIAL_7,
    BINOMIAL_4000,
    DIGITS,
    GEOMETRIC,
    GEOMETRIC_LOGITS,
    NEGATIVE_BINOMIAL,
    POISSON,
    leaves,
)
from torch_klloss.methods.enumeration.masses import masses

EPS = torch.finfo(torch.float64).eps
PROBS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)

LAWS = {
    "Poisson": (POISSON, [(1e-8,), (0.3,), (5.0,), (1e3,), (1e6,)], (0, 1, 2, 9, 10, 11, 30, 1200, 999_000, 1_600_000)),
    "Binomial(7)": (BINOMIAL_7, [(1e-9,), (0.2,), (1 - 1e-9,)], range(8)),
    "Binomial(4000)": (BINOMIAL_4000, [(1e-9,), (0.37,), (0.999,)], (0, 1, 400, 1480, 2000, 3999, 4000)),
    "Bernoulli": (BERNOULLI, [(-750.0,), (-3.0,), (40.0,)], (0, 1)),
    "Geometric": (GEOMETRIC, [(1e-9,), (0.3,), (1 - 1e-9,)], (0, 1, 10, 1000)),
    "Geometric(logits)": (GEOMETRIC_LOGITS, [(-20.0,), (0.5,), (30.0,)], (0, 1, 10, 1000)),
    "NegativeBinomial": (
        NEGATIVE_BINOMIAL,
        [(1e-8, 0.999), (0.01, 0.3), (1.0, 0.3), (4.5, 0.9), (1e5, 0.5)],
        (0, 1, 2, 10, 100, 1000, 100_000),
    ),
}


@pytest.mark.parametrize(("law", "parameters", "points"), LAWS.values(), ids=LAWS)
def test_a_log_probability_is_good_to_a_few_eps_of_itself(law, parameters, points):
    x = torch.tensor(list(points), dtype=torch.float64)
    for each in parameters:
        given = leaves(each)
        logs = masses(law(*given), x).log
        with mpmath.workdps(DIGITS):
            exact = [law.log_mass(mpmath.mpf(k), *(mpmath.mpf(t.item()) for t in given)) for k in points]
        for computed, truth in zip(logs.tolist(), exact, strict=True):
            assert abs(computed - truth) <= 8 * EPS * (1 + abs(truth))


@pytest.mark.parametrize(("law", "parameters", "points"), LAWS.values(), ids=LAWS)
def test_its_derivatives_are_as_good(law, parameters, points):
    for each, k in itertools.product(parameters, points):
        given = leaves(each)
        computed = torch.autograd.grad(masses(law(*given), torch.tensor([float(k)], dtype=torch.float64)).log, given)
        with mpmath.workdps(DIGITS):
            at = [mpmath.mpf(t.item()) for t in given]
            for i, c in enumerate(computed):
                step = at[i] * mpmath.mpf(10) ** -20
                up, down = (law.log_mass(mpmath.mpf(k), *at[:i], at[i] + s * step, *at[i + 1 :]) for s in (1, -1))
                exact = (up - down) / (2 * step)
                # The derivative is a difference of x/θ and its like: it is as good as those are.
                size = 1 + abs(exact) + k / max(abs(at[i]), 1) + abs(1 / at[i])
                assert abs(c.item() - exact) <= 64 * EPS * size


def test_torchs_own_log_probability_would_be_rejected():
    rate, x = torch.tensor(1e6, dtype=torch.float64), torch.tensor(1_001_000.0, dtype=torch.float64)
    with mpmath.workdps(DIGITS):
        exact = POISSON.log_mass(mpmath.mpf(1_001_000), mpmath.mpf(10) ** 6)
    assert abs(Poisson(rate).log_prob(x).item() - exact) > 1000 * EPS * abs(exact)
    clamped = Bernoulli(torch.tensor(1e-30, dtype=torch.float64)).log_prob(torch.tensor(1.0))
    assert clamped > math.log(1e-20)


FIRST_ORDER = {
    "Poisson": (lambda t: Poisson(t), [-1.0, 1.0, 0.0, 0.0]),
    "Binomial(p=0)": (lambda t: Binomial(3, t), [-3.0, 3.0, 0.0, 0.0]),
    "Binomial(p=1)": (lambda t: Binomial(3, 1 - t), [0.0, 0.0, 3.0, -3.0]),
    "Geometric(p=1)": (lambda t: Geometric(1 - t), [-1.0, 1.0, 0.0, 0.0]),
    "NegativeBinomial": (lambda t: NegativeBinomial(2.5, t), [-2.5, 2.5, 0.0, 0.0]),
    "Categorical": (lambda t: Categorical(torch.stack([1 - t, t, 0 * t, 0 * t])), [-1.0, 1.0, 0.0, 0.0]),
}


@pytest.mark.parametrize(("build", "expected"), FIRST_ORDER.values(), ids=FIRST_ORDER)
def test_a_probability_of_zero_has_its_derivative(build, expected):
    t = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    value, log = masses(build(t), torch.arange(4, dtype=torch.float64))
    assert sorted(value.tolist()) == [0.0, 0.0, 0.0, 1.0]
    assert ((value == 0) == (log == -math.inf)).all()
    slopes = [torch.autograd.grad(v, t, retain_graph=True)[0].item() for v in value]
    assert slopes == pytest.approx(expected, abs=1e-15)


def test_infinite_logits_leave_no_nan_in_a_gradient():
    logits = torch.tensor([0.3, -math.inf, 1.0], dtype=torch.float64, requires_grad=True)
    odds = torch.tensor([-math.inf, 0.5, math.inf], dtype=torch.float64, requires_grad=True)
    x = torch.arange(3, dtype=torch.float64)
    for d, at, given in (
        (Categorical(logits=logits), x, logits),
        (Binomial(2, logits=odds), x.unsqueeze(-1), odds),
        (Bernoulli(logits=odds), x[:2].unsqueeze(-1), odds),
    ):
        value, log = masses(d, at)
        kept = torch.where(log > -math.inf, log, 0.0)
        assert all(
            torch.autograd.grad(part.sum(), given, retain_graph=True)[0].isfinite().all() for part in (value, kept)
        )


@pytest.mark.parametrize(
    "d", [Poisson(2.0), Binomial(3, torch.tensor(0.5)), Geometric(0.3), NegativeBinomial(2.0, torch.tensor(0.5))]
)
def test_points_beside_the_support_have_no_mass(d):
    value, log = masses(d, torch.tensor([-1.0, 0.5, 1.0], dtype=torch.float64))
    assert (value > 0).tolist() == (log > -math.inf).tolist() == [False, False, True]
    assert masses(
        OneHotCategorical(PROBS), torch.tensor([[1.0, 1.0, 0.0], [0.5, 0.5, 0.0]]).double()
    ).value.tolist() == [
        0.0,
        0.0,
    ]


def every(n: int, k: int) -> torch.Tensor:
    return torch.tensor([x for x in itertools.product(range(n + 1), repeat=k) if sum(x) == n], dtype=torch.float64)


def test_a_multinomial_is_what_torch_says_in_the_interior_and_sums_to_one():
    x = every(5, 3)
    value, log = masses(Multinomial(5, PROBS), x)
    torch.testing.assert_close(log, Multinomial(5, PROBS).log_prob(x), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(value.sum(), torch.ones((), dtype=torch.float64), rtol=0, atol=8 * EPS)
    assert masses(Multinomial(5, PROBS), x + 1).value.sum() == 0


def test_composed_laws_are_made_of_their_parts():
    x = torch.arange(4, dtype=torch.float64)
    mixture = MixtureSameFamily(Categorical(PROBS[:2]), Poisson(torch.tensor([1.0, 3.0], dtype=torch.float64)))
    torch.testing.assert_close(masses(mixture, x).log, mixture.log_prob(x), rtol=1e-14, atol=0)
    product = Independent(Binomial(3, PROBS), 1)
    pairs = x.unsqueeze(-1).expand(-1, 3)
    torch.testing.assert_close(masses(product, pairs).log, product.log_prob(pairs), rtol=1e-14, atol=0)
    moved = TransformedDistribution(Poisson(PROBS[0]), [AffineTransform(0.1, 3.0)])
    torch.testing.assert_close(masses(moved, 0.1 + 3 * x).log, masses(Poisson(PROBS[0]), x).log, rtol=0, atol=0)
    assert masses(moved, 0.1 + 3 * x + 1e-3).value.sum() == 0


def test_a_component_that_cannot_reach_a_point_does_not_spoil_the_mixture():
    logits = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]], dtype=torch.float64, requires_grad=True)
    q = MixtureSameFamily(Categorical(torch.ones(2, dtype=torch.float64)), Bernoulli(logits=logits[:, 1]))
    value, log = masses(q, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert torch.autograd.grad(log.sum(), logits)[0].isfinite().all()
    torch.testing.assert_close(value.sum(), torch.ones((), dtype=torch.float64))


def test_a_subclass_with_a_density_of_its_own_is_asked():
    class Tilted(Poisson):
        def log_prob(self, value):
            return super().log_prob(value) - 1.0

    x = torch.arange(3, dtype=torch.float64)
    torch.testing.assert_close(masses(Tilted(2.0), x).log, masses(Poisson(2.0), x).log - 1, rtol=1e-6, atol=1e-6)


def test_nan_parameters_have_nan_probabilities():
    x = torch.arange(3, dtype=torch.float64)
    for d in (
        Poisson(math.nan, validate_args=False),
        Binomial(3, torch.tensor(math.nan), validate_args=False),
        Geometric(math.nan, validate_args=False),
        NegativeBinomial(3.0, torch.tensor(math.nan), validate_args=False),
        Categorical(logits=torch.tensor([0.0, 0.0, math.nan]), validate_args=False),
    ):
        assert masses(d, x).value.isnan().all()
