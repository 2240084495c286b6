"""Do q and p fit together, and what is the simplest pair behind them?"""

import pytest
import torch
from torch.distributions import (
    AbsTransform,
    AffineTransform,
    Bernoulli,
    Beta,
    Categorical,
    ComposeTransform,
    Dirichlet,
    Exponential,
    ExpTransform,
    Gamma,
    Gumbel,
    HalfNormal,
    Independent,
    InverseGamma,
    LogNormal,
    MultivariateNormal,
    Normal,
    Poisson,
    SigmoidTransform,
    StickBreakingTransform,
    StudentT,
    TanhTransform,
    TransformedDistribution,
    Uniform,
    Weibull,
)

from tests.expectations import integrate, log_density
from torch_klloss import AutoKL, MonteCarloKL, has_closed_form, kl_divergence
from torch_klloss.distributions.checks import check_common_measure, check_pair, type_name
from torch_klloss.distributions.logistic import Logistic
from torch_klloss.distributions.simplify import peel, simplify
from torch_klloss.distributions.supports import bounds_of
from torch_klloss.distributions.tensors import unvalidated
from torch_klloss.methods import ClosedForm, Enumeration, MonteCarlo

ENTRIES = {
    "kl_divergence": kl_divergence,
    "has_closed_form": has_closed_form,
    "AutoKL": AutoKL(),
    "AutoKL.estimate": AutoKL().estimate,
    "AutoKL.route": AutoKL().route,
    "MonteCarloKL": MonteCarloKL(),
    "ClosedForm": ClosedForm().estimate,
    "Enumeration": Enumeration().estimate,
    "MonteCarlo": MonteCarlo().estimate,
}
every_entry = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)


def normal(*shape: int, event_dims: int = 0) -> Normal | Independent:
    base = Normal(torch.zeros(shape), 1.0)
    return Independent(base, event_dims) if event_dims else base


@pytest.mark.parametrize(
    ("q_shape", "p_shape", "expected"),
    [
        ((), (), ()),
        ((3,), (), (3,)),
        ((), (3,), (3,)),
        ((2, 1), (3,), (2, 3)),
        ((0,), (1,), (0,)),
        ((4, 3), (3,), (4, 3)),
    ],
)
def test_batch_shapes_broadcast(q_shape, p_shape, expected):
    assert check_pair(normal(*q_shape), normal(*p_shape)) == expected
    assert check_pair(normal(*q_shape, 5, event_dims=1), normal(*p_shape, 5, event_dims=1)) == expected


@every_entry
def test_batch_shapes_that_do_not_broadcast_are_an_error_that_names_both(entry):
    with pytest.raises(ValueError, match=r"batch shapes that broadcast, got \(3,\) and \(2,\).*Independent"):
        entry(normal(3), normal(2))


@every_entry
def test_event_shapes_that_differ_are_an_error_that_suggests_independent(entry):
    with pytest.raises(
        ValueError, match=r"share an event shape, got \(3,\) and \(\): did you mean Independent\(p, 1\)\?"
    ):
        entry(normal(4, 3, event_dims=1), normal(4, 3))
    with pytest.raises(ValueError, match=r"got \(\) and \(2, 3\): did you mean Independent\(q, 2\)\?"):
        entry(normal(2, 3), normal(2, 3, event_dims=2))
    with pytest.raises(ValueError, match=r"Independent\(p, 1\)\? Its batch shape \(\) needs \.expand\(\) first"):
        entry(normal(4, 3, event_dims=1), normal())


@every_entry
@pytest.mark.parametrize(
    ("q", "p"),
    [
        (Dirichlet(torch.ones(3)), Dirichlet(torch.ones(1))),
        (normal(3, event_dims=1), normal(1, event_dims=1)),
        (MultivariateNormal(torch.zeros(3), torch.eye(3)), normal(1, event_dims=1)),
    ],
    ids=["dirichlet", "independent", "mixed"],
)
def test_events_of_unlike_size_do_not_broadcast_in_silence(entry, q, p):
    with pytest.raises(ValueError, match=r"got \(3,\) and \(1,\): they would broadcast silently"):
        entry(q, p)


@every_entry
@pytest.mark.parametrize("wrong", [torch.zeros(3), 0.5, None, Normal, "Normal(0, 1)"], ids=lambda w: type(w).__name__)
def test_what_is_no_distribution_is_a_type_error_that_says_what_came(entry, wrong):
    kind = type(wrong).__name__
    with pytest.raises(TypeError, match=f"q must be a torch.distributions.Distribution, got {kind}.*kl_from_log_probs"):
        entry(wrong, normal())
    with pytest.raises(TypeError, match=f"p must be a torch.distributions.Distribution, got {kind}.*diagonal_normal"):
        entry(normal(), wrong)


@pytest.mark.parametrize(
    "entry",
    [e for n, e in ENTRIES.items() if n != "has_closed_form"],
    ids=[n for n in ENTRIES if n != "has_closed_form"],
)
def test_a_discrete_q_against_a_continuous_p_is_an_error_that_says_why(entry):
    with pytest.raises(
        ValueError, match=r"KL\(Poisson‖Normal\).*q is discrete and p is continuous.*different measures"
    ):
        entry(Poisson(torch.ones(3)), normal(3))
    with pytest.raises(ValueError, match=r"KL\(Normal‖Bernoulli\).*q is continuous and p is discrete"):
        entry(normal(3), Bernoulli(torch.full((3,), 0.5)))


def test_kinds_that_agree_or_are_unknown_pass():
    check_common_measure(Poisson(1.0), Categorical(torch.ones(3)))
    check_common_measure(normal(), normal())

    class Unknown(torch.distributions.Distribution):
        pass

    check_common_measure(Unknown(validate_args=False), Poisson(1.0))


def independent(d, *dims: int):
    for n in dims:
        d = Independent(d, n)
    return d


@pytest.mark.parametrize(
    ("q_dims", "p_dims", "left_q", "left_p", "peeled"),
    [
        ((1,), (1,), 0, 0, 1),
        ((1, 1), (2,), 0, 0, 2),
        ((2,), (1, 1), 0, 0, 2),
        ((2,), (1,), 1, 0, 1),
        ((1,), (1, 1, 1), 0, 2, 1),
    ],
)
def test_what_both_share_is_peeled(q_dims, p_dims, left_q, left_p, peeled):
    q, p, dims = peel(independent(normal(2, 3, 4, 5), *q_dims), independent(normal(2, 3, 4, 5), *p_dims))
    assert dims == peeled
    assert [len(d.event_shape) for d in (q, p)] == [left_q, left_p]
    assert type(q) is (Independent if left_q else Normal)


def test_what_only_one_of_them_has_is_not_peeled():
    q, p = normal(2, 3, event_dims=1), MultivariateNormal(torch.zeros(3), torch.eye(3))
    assert peel(q, p) == (q, p, 0)
    assert peel(p, q) == (p, q, 0)


def test_independent_is_told_by_isinstance():
    class Mine(Independent):
        pass

    q, p, dims = peel(Mine(normal(2, 3), 1), normal(2, 3, event_dims=1))
    assert (type(q), type(p), dims) == (Normal, Normal, 1)


def test_a_pair_is_named_as_one_would_write_it():
    assert type_name(normal()) == "Normal"
    assert type_name(independent(normal(2, 3), 1, 1)) == "Independent(Independent(Normal, 1), 1)"


def moved(d, *transforms):
    return TransformedDistribution(d, list(transforms))


ONE, TWO, HALF = (torch.tensor(x, dtype=torch.float64) for x in (1.0, 2.0, 0.5))
ZERO, EXP, LOGIT = torch.zeros_like(ONE), ExpTransform(), SigmoidTransform().inv
SIMPLIFIED = {
    "affine": (moved(Normal(ONE, ONE), AffineTransform(1.0, 2.0)), StudentT(TWO), Normal, StudentT),
    "affine of both": (
        moved(Gamma(TWO, ONE), AffineTransform(1.0, 2.0)),
        moved(Exponential(ONE), AffineTransform(1.0, 3.0)),
        Gamma,
        Exponential,
    ),
    "reflected": (
        moved(Gamma(TWO, ONE), AffineTransform(1.0, -2.0)),
        moved(Exponential(ONE), AffineTransform(1.0, -3.0)),
        Gamma,
        Exponential,
    ),
    "named": (LogNormal(ZERO, HALF), moved(Gumbel(ONE, ONE), EXP), Normal, Gumbel),
    "unnamed": (moved(Normal(ZERO, HALF), EXP), Gamma(TWO, TWO), LogNormal, Gamma),
    "a chain": (
        moved(Normal(ZERO, ONE), AffineTransform(0.1, 0.5), EXP, AffineTransform(0.0, 2.0)),
        Gamma(TWO, TWO),
        LogNormal,
        Gamma,
    ),
    "composed": (moved(Normal(ZERO, ONE), ComposeTransform([EXP, EXP.inv])), StudentT(TWO), Normal, StudentT),
    "undone on p": (moved(Gamma(TWO, ONE), EXP.inv), Normal(ZERO, ONE), Gamma, LogNormal),
    "undone on q": (Uniform(-ONE, ONE), moved(Beta(TWO, ONE), AffineTransform(-1.0, 2.0)), Uniform, Beta),
    "logistic": (moved(Uniform(ZERO, ONE), LOGIT, AffineTransform(1.0, 2.0)), Normal(ONE, TWO), Logistic, Normal),
    "inverse": (InverseGamma(TWO, ONE), InverseGamma(TWO, TWO), Gamma, Gamma),
    "equal weibulls": (Weibull(ONE, TWO), Weibull(ONE, TWO), Exponential, Exponential),
    "half of a chain": (
        moved(Weibull(TWO, TWO), AffineTransform(1.0, 2.0)),
        moved(Exponential(ONE), AffineTransform(1.0, 2.0)),
        Weibull,
        Exponential,
    ),
}


def by_quadrature(q, p, ends):
    found = integrate(unvalidated(q), unvalidated(p), ends, log_density, log_density)
    assert found.error < 1e-9
    return found.value


def ends_of(d):
    bounds = bounds_of(d)
    middle = [ZERO] if bounds.lower < 0 < bounds.upper else []
    return [float(bounds.lower), *middle, float(bounds.upper)]


@pytest.mark.parametrize(("q", "p", "type_q", "type_p"), SIMPLIFIED.values(), ids=SIMPLIFIED)
def test_the_simplified_pair_has_the_types_and_the_kl_that_it_should(q, p, type_q, type_p):
    simple_q, simple_p, dims = simplify(q, p)
    assert (type(simple_q), type(simple_p), dims) == (type_q, type_p, 0)
    expected = by_quadrature(q, p, ends_of(q))
    torch.testing.assert_close(by_quadrature(simple_q, simple_p, ends_of(simple_q)), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("q", "p", "type_q", "type_p"), SIMPLIFIED.values(), ids=SIMPLIFIED)
def test_what_is_simple_stays_the_same_object(q, p, type_q, type_p):
    simple_q, simple_p, _ = simplify(q, p)
    again = simplify(simple_q, simple_p)
    assert again[0] is simple_q
    assert again[1] is simple_p


@pytest.mark.parametrize(
    ("q", "p"),
    [
        (moved(Normal(ONE, ONE), AbsTransform()), moved(Normal(-ONE, ONE), AbsTransform())),
        (HalfNormal(ONE), HalfNormal(ONE)),
        (Weibull(ONE, TWO), Weibull(ONE, HALF)),
        (moved(Normal(ONE, ONE), TanhTransform()), Uniform(-ONE, ONE)),
        (Independent(Normal(torch.zeros(3), 1.0), 1), MultivariateNormal(torch.zeros(3), torch.eye(3))),
    ],
    ids=["abs", "half normals", "weibulls", "tanh", "covariance"],
)
def test_what_cannot_be_simplified_comes_back_as_it_is(q, p):
    assert simplify(q, p) == (q, p, 0)


def test_independence_inside_of_a_transform_is_peeled():
    q = moved(Independent(Normal(torch.zeros(2, 3), 1.0), 1), AffineTransform(0.0, torch.ones(3), event_dim=1), EXP)
    p = Independent(LogNormal(torch.zeros(3), 1.0), 1)
    simple_q, simple_p, dims = simplify(q, p)
    assert (type(simple_q), type(simple_p), dims) == (Normal, Normal, 1)
    assert (simple_q.batch_shape, simple_p.batch_shape) == ((2, 3), (3,))
    nested = Independent(moved(Independent(Normal(torch.zeros(2, 3), 1.0), 1), EXP), 1)
    assert simplify(nested, Independent(LogNormal(torch.zeros(2, 3), 1.0), 2))[2] == 2


def test_a_transform_of_components_is_peeled_and_one_that_mixes_them_shared():
    q, p = (moved(Independent(Normal(torch.full((2,), x), 1.0), 1), StickBreakingTransform()) for x in (0.0, 1.0))
    assert [type(d) for d in simplify(q, p)[:2]] == [Normal, Normal]
    simplex = Dirichlet(torch.ones(3))
    assert simplify(q, simplex) == (q, simplex, 0)


def test_a_gaussian_of_one_dimension_is_a_normal():
    q = MultivariateNormal(torch.zeros(4, 1), torch.full((1, 1), 4.0))
    simple_q, simple_p, dims = simplify(q, Independent(StudentT(torch.ones(1)), 1))
    assert (type(simple_q), type(simple_p), dims) == (Normal, StudentT, 1)
    assert simple_q.scale.unique().tolist() == [2.0]


def test_a_gaussian_stays_one_where_its_components_are_stretched():
    q = moved(MultivariateNormal(torch.zeros(3), torch.eye(3)), AffineTransform(1.0, torch.full((3,), -2.0)))
    simple_q, simple_p, dims = simplify(q, MultivariateNormal(torch.ones(3), 4 * torch.eye(3)))
    assert (type(simple_q), type(simple_p), dims) == (MultivariateNormal, MultivariateNormal, 0)
    assert kl_divergence(q, simple_p) == 0
    kept = moved(MultivariateNormal(torch.zeros(3), torch.eye(3)), TanhTransform())
    assert simplify(kept, simple_p) == (kept, simple_p, 0)


def test_a_class_with_a_density_of_its_own_is_not_opened():
    class Mine(LogNormal):
        def log_prob(self, value):
            return 2 * super().log_prob(value)

    q, p = Mine(0.0, 1.0), moved(Normal(0.0, 1.0), EXP)
    assert simplify(q, p)[0] is q
