"""Where a distribution puts its mass, and whether p reaches all of it."""

import math

import pytest
import torch
import torch.distributions as dist
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    ExpTransform,
    Independent,
    Normal,
    SigmoidTransform,
    TanhTransform,
    TransformedDistribution,
    Uniform,
)
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical

from torch_klloss import AutoKL
from torch_klloss.distributions.densities import log_density
from torch_klloss.distributions.stated_supports import is_discrete, support_of
from torch_klloss.distributions.supports import (
    bounds_of,
    contained,
    has_moving_support,
)
from torch_klloss.methods import MonteCarlo, Quadrature

HALF = torch.tensor(0.5)


def transformed(base: dist.Distribution, *transforms: dist.Transform) -> TransformedDistribution:
    return TransformedDistribution(base, list(transforms))


BOUNDS = {
    "normal": (Normal(0.0, 1.0), -math.inf, math.inf),
    "gamma": (dist.Gamma(1.0, 1.0), 0.0, math.inf),
    "beta": (dist.Beta(1.0, 1.0), 0.0, 1.0),
    "uniform": (Uniform(-1.0, 2.0), -1.0, 2.0),
    "pareto": (dist.Pareto(2.0, 1.0), 2.0, math.inf),
    "vonmises": (dist.VonMises(0.0, 1.0), -math.pi, math.pi),
    "bernoulli": (dist.Bernoulli(HALF), 0.0, 1.0),
    "binomial": (dist.Binomial(5, HALF), 0.0, 5.0),
    "categorical": (dist.Categorical(torch.ones(4)), 0.0, 3.0),
    "poisson": (dist.Poisson(1.0), 0.0, math.inf),
    "independent": (Independent(Uniform(torch.zeros(2), 1.0), 1), 0.0, 1.0),
    "lognormal": (dist.LogNormal(0.0, 1.0), 0.0, math.inf),
    "exp_of_uniform": (transformed(Uniform(0.0, 1.0), ExpTransform()), 1.0, math.e),
    "logistic": (
        transformed(Uniform(torch.zeros(2), torch.ones(2)), SigmoidTransform().inv, AffineTransform(1.0, 2.0)),
        -math.inf,
        math.inf,
    ),
    "minus_exp": (transformed(Normal(0.0, 1.0), ExpTransform(), AffineTransform(3.0, -1.0)), -math.inf, 3.0),
    "squashed": (transformed(Normal(0.0, 1.0), TanhTransform(), AffineTransform(0.0, 2.0)), -2.0, 2.0),
    "shifted": (transformed(dist.Gamma(1.0, 1.0), AffineTransform(1.0, 2.0)), 1.0, math.inf),
    "mixture of angles": (
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.VonMises(torch.zeros(2), 1.0)),
        -math.pi,
        math.pi,
    ),
    "mixture": (
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), Normal(torch.zeros(2), 1.0)),
        -math.inf,
        math.inf,
    ),
}


@pytest.mark.parametrize(("d", "lower", "upper"), BOUNDS.values(), ids=BOUNDS)
def test_the_ends_of_a_support_are_known(d, lower, upper):
    bounds = bounds_of(d)
    for end, expected in ((bounds.lower, lower), (bounds.upper, upper)):
        torch.testing.assert_close(
            torch.as_tensor(end, dtype=torch.float32).unique(), torch.tensor([expected]).float(), rtol=1e-6, atol=1e-6
        )


UNBOUNDED = {
    "dirichlet": dist.Dirichlet(torch.ones(3)),
    "multinomial": dist.Multinomial(3, torch.ones(3)),
    "wishart": dist.Wishart(torch.tensor(4.0), torch.eye(3)),
    "abs": transformed(Normal(0.0, 1.0), dist.AbsTransform()),
    "gaps": dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), Uniform(torch.tensor([0.0, 2.0]), 3.0)),
}


@pytest.mark.parametrize("d", UNBOUNDED.values(), ids=UNBOUNDED)
def test_a_support_that_is_no_interval_has_no_ends(d):
    assert bounds_of(d) is None


CONTAINED = {
    "same line": (Normal(0.0, 1.0), Normal(1.0, 2.0), True),
    "line in half-line": (Normal(0.0, 1.0), dist.Gamma(1.0, 1.0), False),
    "half-line in line": (dist.Gamma(1.0, 1.0), Normal(0.0, 1.0), True),
    "interval in half-line": (dist.Beta(1.0, 1.0), dist.Exponential(1.0), True),
    "interval in circle": (dist.Beta(1.0, 1.0), dist.VonMises(0.0, 1.0), True),
    "line in circle": (Normal(0.0, 1.0), dist.VonMises(0.0, 1.0), False),
    "circle in line": (dist.VonMises(0.0, 1.0), Normal(0.0, 1.0), True),
    "circle in circle": (dist.VonMises(0.0, 1.0), dist.VonMises(1.0, 1.0), True),
    "counts": (dist.Binomial(3, HALF), dist.Poisson(1.0), True),
    "more counts": (dist.Poisson(1.0), dist.Binomial(3, HALF), False),
    "simplex": (dist.Dirichlet(torch.ones(3)), dist.Dirichlet(torch.ones(3)), True),
    "squashed in its interval": (transformed(Normal(0.0, 1.0), SigmoidTransform()), Uniform(0.0, 1.0), True),
    "line in a shifted half-line": (
        Normal(0.0, 1.0),
        transformed(dist.Gamma(1.0, 1.0), AffineTransform(1.0, 2.0)),
        False,
    ),
    "shifted half-line in line": (
        transformed(dist.Gamma(1.0, 1.0), AffineTransform(1.0, 2.0)),
        Normal(0.0, 1.0),
        True,
    ),
    "line in the logarithms of an interval": (
        Normal(0.0, 1.0),
        transformed(Uniform(0.5, 1.0), ExpTransform().inv),
        False,
    ),
    "independent": (Independent(Normal(torch.zeros(2), 1.0), 1), dist.Dirichlet(torch.ones(2)), False),
    "simplex in space": (dist.Dirichlet(torch.ones(2)), dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), False),
}


@pytest.mark.parametrize(("q", "p", "expected"), CONTAINED.values(), ids=CONTAINED)
def test_containment_is_decided_where_it_can_be(q, p, expected):
    answer = contained(q, p)
    if isinstance(answer, Tensor):
        assert answer.unique().tolist() == [expected]
    else:
        assert answer is expected


def vectors() -> dict[str, dist.Distribution]:
    """Return laws of three numbers, by the surface that they lie on."""
    base = Independent(Normal(torch.zeros(2), 1.0), 1)
    return {
        "space": Independent(Normal(torch.zeros(3), 1.0), 1),
        "Gaussian": dist.MultivariateNormal(torch.zeros(3), torch.eye(3)),
        "mixture": dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2)), dist.MultivariateNormal(torch.zeros(2, 3), torch.eye(3))
        ),
        "flow": transformed(
            dist.MultivariateNormal(torch.zeros(3), torch.eye(3)), AffineTransform(1.0, 2.0, event_dim=1)
        ),
        "simplex": dist.Dirichlet(torch.ones(3)),
        "relaxed": dist.RelaxedOneHotCategorical(HALF, logits=torch.zeros(3)),
        "sticks": transformed(base, dist.StickBreakingTransform()),
        "log-simplex": ExpRelaxedCategorical(HALF, logits=torch.zeros(3)),
        "log-simplexes": dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2)), ExpRelaxedCategorical(HALF, logits=torch.zeros(2, 3))
        ),
    }


def matrices() -> dict[str, dist.Distribution]:
    """Return laws of 3 x 3 matrices."""
    return {
        "space": Independent(Normal(torch.zeros(3, 3), 1.0), 2),
        "correlation": dist.LKJCholesky(3, 1.0),
        "symmetric": dist.Wishart(torch.tensor(12.0), torch.eye(3)),
        "simplexes": Independent(dist.Dirichlet(torch.ones(3, 3)), 1),
        "log-simplexes": Independent(ExpRelaxedCategorical(HALF, logits=torch.zeros(3, 3)), 1),
    }


SURFACE = {name: name for name in ("log-simplex", "correlation", "symmetric")} | {
    "space": "space", "Gaussian": "space", "mixture": "space", "flow": "space",
    "simplex": "simplex", "relaxed": "simplex", "sticks": "simplex", "simplexes": "simplex",
    "log-simplexes": "log-simplex",
}  # fmt: skip
PAIRS_OF_SURFACES = [(group, a, b) for group in (vectors, matrices) for a in group() for b in group()]


@pytest.mark.filterwarnings("ignore:Singular sample")  # of torch's Wishart
@pytest.mark.parametrize(("group", "a", "b"), PAIRS_OF_SURFACES)
def test_a_surface_without_volume_in_the_others_space_makes_the_kl_infinite(group, a, b):
    q, p = group()[a], group()[b]
    if SURFACE[a] == SURFACE[b]:
        assert contained(q, p) is not False
        return
    assert contained(q, p) is False
    for method in (MonteCarlo(4), MonteCarlo(4, gradient="none"), AutoKL(fallback=[Quadrature(), MonteCarlo(2)])):
        assert method.estimate(q, p).value == math.inf


def test_images_of_a_surface_are_not_told_apart():
    shifted = [transformed(dist.Dirichlet(torch.ones(3)), AffineTransform(loc, 2.0, event_dim=1)) for loc in (0.0, 0.0)]
    assert contained(*shifted) is None
    assert contained(shifted[0], Independent(Normal(torch.zeros(3), 1.0), 1)) is False


def test_containment_is_decided_for_every_batch_element():
    q = Uniform(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 3.0]))
    assert contained(q, Uniform(0.0, torch.tensor([[2.0], [4.0]]))).tolist() == [[True, False], [True, True]]
    joint = Independent(q, 1)
    assert contained(joint, Independent(Uniform(torch.zeros(2, 2), torch.tensor([[2.0], [4.0]])), 1)).tolist() == [
        False,
        True,
    ]


def test_discrete_and_continuous_are_told_apart():
    assert is_discrete(dist.Poisson(1.0)) is True
    assert is_discrete(Independent(dist.Bernoulli(HALF.expand(2)), 1)) is True
    assert is_discrete(dist.OneHotCategorical(torch.ones(3))) is True
    assert is_discrete(dist.Multinomial(3, torch.ones(3))) is True
    assert is_discrete(dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Poisson(torch.ones(2)))) is True
    assert is_discrete(transformed(dist.Poisson(1.0), AffineTransform(1.0, 1.0))) is True
    assert is_discrete(transformed(Normal(0.0, 1.0), ExpTransform())) is False
    assert is_discrete(Normal(0.0, 1.0)) is False
    assert is_discrete(dist.Wishart(torch.tensor(4.0), torch.eye(3))) is False

    class Undeclared(dist.Distribution):
        pass

    assert is_discrete(Undeclared(validate_args=False)) is None
    assert support_of(Undeclared(validate_args=False)) is None


@pytest.mark.parametrize(
    ("p", "x", "expected"),
    [
        (dist.Gamma(1.0, 1.0), [-1.0, 2.0], [-math.inf, -2.0]),
        (Uniform(0.0, 2.0), [-1.0, 1.0, 3.0], [-math.inf, -math.log(2), -math.inf]),
        (dist.Pareto(1.0, 1.0), [0.5, 1.0], [-math.inf, 0.0]),
        (dist.Exponential(2.0), [-3.0, 0.5], [-math.inf, math.log(2) - 1]),
        (dist.Bernoulli(HALF), [0.0, 0.5, 2.0], [-math.log(2), -math.inf, -math.inf]),
        (dist.VonMises(0.0, 1e-4), [4.0], [-math.inf]),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, dist.Distribution) else "",
)
def test_points_outside_have_zero_density(p, x, expected):
    torch.testing.assert_close(log_density(p, torch.tensor(x), None), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert p._validate_args


def test_points_outside_leave_no_nan_in_a_gradient():
    x = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)
    concentration = torch.tensor(2.5, requires_grad=True)
    log_prob = log_density(dist.Beta(concentration, 1.5), x, None)
    assert log_prob.isfinite().tolist() == [False, True, False]
    grads = torch.autograd.grad(log_prob[1], (x, concentration))
    assert all(g.isfinite().all() for g in grads)
    whole = torch.autograd.grad(log_density(dist.Beta(concentration, 1.5), x, None).sum(), (x, concentration))
    assert all(g.isfinite().all() for g in whole)


def test_an_event_counts_as_outside_where_one_component_is():
    p = Independent(Uniform(torch.zeros(2), 1.0), 1)
    x = torch.tensor([[0.5, 0.5], [0.5, 1.5]])
    assert log_density(p, x, None).tolist() == [0.0, -math.inf]


def test_a_support_moves_where_a_gradient_flows_into_its_ends():
    theta = torch.tensor(1.0, requires_grad=True)
    assert has_moving_support(Uniform(torch.zeros(()), theta))
    assert not has_moving_support(Uniform(torch.zeros(()), theta.detach()))
    assert not has_moving_support(Normal(theta, theta))
    assert not has_moving_support(dist.Gamma(theta, theta))
