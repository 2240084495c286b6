"""Integer and bool parameters, with which torch lets one build most families: computed in the default dtype."""

import pytest
import torch
import torch.distributions as dist
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss import AnalyticKL, AutoKL, KLLoss, MonteCarloKL, has_closed_form, kl_divergence
from torch_klloss.distributions.precision import in_floating_point, in_full_precision
from torch_klloss.distributions.stated_supports import is_discrete
from torch_klloss.methods import ClosedForm, Enumeration, MonteCarlo, Quadrature

tensor = torch.tensor


def pair(*parameters):
    return tuple(map(tensor, parameters))


# The families, and whole numbers that their parameters may be.
BUILT = {
    "Normal": (dist.Normal, pair([1, 2], [1, 3])),
    "Laplace": (dist.Laplace, pair([1, 2], [1, 3])),
    "Cauchy": (dist.Cauchy, pair([1, 2], [1, 3])),
    "Exponential": (dist.Exponential, pair([1, 2])),
    "Gamma": (dist.Gamma, pair([1, 2], [1, 3])),
    "Beta": (dist.Beta, pair([1, 2], [1, 3])),
    "Chi2": (dist.Chi2, pair([1, 2])),
    "StudentT": (dist.StudentT, pair([3, 4], [0, 1], [1, 2])),
    "HalfNormal": (dist.HalfNormal, pair([1, 2])),
    "HalfCauchy": (dist.HalfCauchy, pair([1, 2])),
    "LogNormal": (dist.LogNormal, pair([0, 1], [1, 2])),
    "InverseGamma": (dist.InverseGamma, pair([3, 4], [1, 2])),
    "Weibull": (dist.Weibull, pair([1, 2], [1, 3])),
    "Pareto": (dist.Pareto, pair([1, 2], [3, 2])),
    "Uniform": (dist.Uniform, pair([0, 1], [2, 3])),
    "Kumaraswamy": (dist.Kumaraswamy, pair([1, 2], [1, 3])),
    "FisherSnedecor": (dist.FisherSnedecor, pair([3, 4], [5, 6])),
    "VonMises": (dist.VonMises, pair([0, 1], [1, 2])),
    "RelaxedBernoulli": (lambda t, x: dist.RelaxedBernoulli(t, logits=x), pair(2, [0, 1])),
    "Bernoulli": (dist.Bernoulli, pair([0, 1])),
    "Bernoulli(bool)": (dist.Bernoulli, pair([False, True])),
    "Bernoulli(logits)": (lambda x: dist.Bernoulli(logits=x), pair([0, 1])),
    "Binomial": (lambda n, x: dist.Binomial(n, logits=x), pair([3, 3], [0, 1])),
    "Geometric": (lambda x: dist.Geometric(logits=x), pair([0, 1])),
    "NegativeBinomial": (lambda r, x: dist.NegativeBinomial(r, logits=x), pair([3, 4], [0, -1])),
    "Poisson": (dist.Poisson, pair([1, 2])),
    "Categorical": (dist.Categorical, pair([[1, 2, 1], [1, 1, 3]])),
    "Categorical(logits)": (lambda x: dist.Categorical(logits=x), pair([[1, 2, 1], [1, 1, 3]])),
    "OneHotCategorical": (lambda x: dist.OneHotCategorical(logits=x), pair([[1, 2, 1], [1, 1, 3]])),
    "Dirichlet": (dist.Dirichlet, pair([[1, 2, 1], [1, 1, 3]])),
    "MultivariateNormal": (
        lambda m, L: dist.MultivariateNormal(m, scale_tril=L),
        pair([[0, 1, 2], [1, 1, 1]], [[1, 0, 0], [1, 2, 0], [0, 0, 1]]),
    ),
    "Independent": (lambda m, s: dist.Independent(dist.Normal(m, s), 1), pair([[0, 1, 2]] * 2, [[1, 2, 1]] * 2)),
    "MixtureSameFamily": (
        lambda m, s: dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros(2)), dist.Normal(m, s)),
        pair([[0, 1], [2, 3]], [[1, 2], [1, 1]]),
    ),
}
METHODS = [ClosedForm(), Enumeration(), MonteCarlo(4), MonteCarlo(4, gradient="score_function")]


def built(name: str, dtype: torch.dtype | None = None) -> Distribution:
    build, parameters = BUILT[name]
    return build(*(t if dtype is None else t.to(dtype) for t in parameters))


def outcome(method, q: Distribution, p: Distribution) -> Tensor | type[Exception]:
    torch.manual_seed(0)
    try:
        return method.estimate(q, p).value
    except (NotImplementedError, ValueError) as error:
        return type(error)


def assert_alike(found, expected):
    if isinstance(expected, type):
        assert found is expected
    else:
        torch.testing.assert_close(found, expected, equal_nan=True)
        assert found.dtype == expected.dtype == torch.get_default_dtype()


@pytest.mark.parametrize("name", BUILT)
def test_every_method_computes_whole_numbers_as_floating_point_numbers(name):
    q, as_float = built(name), built(name, torch.float32)
    alike = [b for b in BUILT if built(b).event_shape == q.event_shape and is_discrete(built(b)) == is_discrete(q)]
    for other in (name, *alike[::7]):
        p, p_as_float = built(other), built(other, torch.float32)
        for method in METHODS:
            expected = outcome(method, as_float, p_as_float)
            for pair in ((q, p), (q, p_as_float), (as_float, p)):
                assert_alike(outcome(method, *pair), expected)
        assert has_closed_form(q, p) == has_closed_form(as_float, p_as_float)
        assert AutoKL().route(q, p) == AutoKL().route(as_float, p_as_float)


@pytest.mark.parametrize("name", ["Normal", "Gamma", "Weibull", "StudentT"])
def test_quadrature_takes_whole_numbers(name):
    values = [Quadrature().estimate(built(name, t), built(name, t)).value for t in (None, torch.float32)]
    assert_alike(*values)


def test_a_kl_of_integers_is_no_integer():
    q = dist.Normal(tensor([1, 2]), tensor([1, 3]))
    p = dist.Normal(tensor([0, 1]), tensor([2, 2]))
    expected = tensor([0.4431471805599453, 0.3445348918918356])  # log(σp/σq) + (σq² + (μq - μp)²)/(2σp²) - ½
    torch.testing.assert_close(kl_divergence(q, p), expected)
    for loss in (AnalyticKL(), AutoKL(), KLLoss(Quadrature())):
        torch.testing.assert_close(loss(q, p), expected.mean())
    assert MonteCarloKL(4)(q, p).dtype == torch.float32


def test_a_whole_parameter_takes_the_dtype_of_the_others():
    d = in_floating_point(dist.Normal(tensor([1, 2]), tensor([1.0, 3.0], dtype=torch.float64)))
    assert d.loc.dtype == torch.float64
    half = dist.Normal(tensor([1, 2]), tensor([1.0, 3.0], dtype=torch.float16))
    assert in_floating_point(half).loc.dtype == torch.float16
    assert in_full_precision(half).loc.dtype == in_full_precision(half).scale.dtype == torch.float32


def test_indices_stay_whole():
    class Chosen(dist.Normal):
        def __init__(self, loc, index):
            self.index = index
            super().__init__(loc, torch.ones_like(loc))

    d = in_full_precision(Chosen(tensor([1, 2]), tensor([0, 1])))
    assert d.index.dtype == torch.int64
    assert d.loc.dtype == torch.float32


@pytest.mark.parametrize("name", ["Normal", "Bernoulli(bool)"])
def test_an_object_of_the_user_stays_as_it_is(name):
    q = built(name)
    before = {key: value for key, value in q.__dict__.items() if isinstance(value, Tensor)}
    kl_divergence(q, q)
    assert all(q.__dict__[key] is value for key, value in before.items())
