"""Points of every reparameterised family from uniform numbers: their law, and their gradient."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributions as td
from scipy import stats
from torch import Tensor
from torch.distributions import AffineTransform, ExpTransform, Independent, Normal, TransformedDistribution

from tests.families import FAMILIES, Line
from torch_klloss.samplers import Sobol
from torch_klloss.samplers.transport import num_uniforms, register_transport, transport

F64 = torch.float64


def t(*values: float) -> Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=F64)


CORRELATED = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.8, 0.0], [-0.3, 0.2, 0.6]], dtype=F64)

# Single numbers, by a law of scipy's.
SCALARS = {
    "Normal": (td.Normal(t(1.0), t(0.5)), stats.norm(1, 0.5)),
    "Laplace": (td.Laplace(t(1.0), t(0.5)), stats.laplace(1, 0.5)),
    "Cauchy": (td.Cauchy(t(1.0), t(0.5)), stats.cauchy(1, 0.5)),
    "Uniform": (td.Uniform(t(1.0), t(3.0)), stats.uniform(1, 2)),
    "Exponential": (td.Exponential(t(2.0)), stats.expon(scale=0.5)),
    "HalfNormal": (td.HalfNormal(t(2.0)), stats.halfnorm(scale=2)),
    "HalfCauchy": (td.HalfCauchy(t(2.0)), stats.halfcauchy(scale=2)),
    "LogNormal": (td.LogNormal(t(0.5), t(0.7)), stats.lognorm(0.7, scale=math.exp(0.5))),
    "Gumbel": (td.Gumbel(t(1.0), t(2.0)), stats.gumbel_r(1, 2)),
    "Weibull": (td.Weibull(t(2.0), t(1.5)), stats.weibull_min(1.5, scale=2)),
    "Pareto": (td.Pareto(t(2.0), t(3.0)), stats.pareto(3, scale=2)),
    "GeneralizedPareto": (td.GeneralizedPareto(t(1.0), t(2.0), t(0.2)), stats.genpareto(0.2, 1, 2)),
    "Kumaraswamy, a power of a uniform": (td.Kumaraswamy(t(2.5), t(1.0)), stats.beta(2.5, 1)),
    "Kumaraswamy, mirrored": (td.Kumaraswamy(t(1.0), t(3.0)), stats.beta(1, 3)),
    "Gamma": (td.Gamma(t(2.0), t(1.5)), stats.gamma(2, scale=1 / 1.5)),
    "Gamma, a peak at zero": (td.Gamma(t(0.3), t(1.5)), stats.gamma(0.3, scale=1 / 1.5)),
    "Gamma, a million": (td.Gamma(t(1e6), t(1.0)), stats.gamma(1e6)),
    "Chi2": (td.Chi2(t(3.0)), stats.chi2(3)),
    "InverseGamma": (td.InverseGamma(t(3.0), t(2.0)), stats.invgamma(3, scale=2)),
    "Beta": (td.Beta(t(2.0), t(3.0)), stats.beta(2, 3)),
    "Beta, peaks at both ends": (td.Beta(t(0.4), t(0.7)), stats.beta(0.4, 0.7)),
    "Beta, narrow": (td.Beta(t(2e4), t(3e4)), stats.beta(2e4, 3e4)),
    "StudentT": (td.StudentT(t(4.0), t(1.0), t(0.5)), stats.t(4, 1, 0.5)),
    "StudentT, of one degree": (td.StudentT(t(1.0)), stats.t(1)),
    "FisherSnedecor": (td.FisherSnedecor(t(3.0), t(5.0)), stats.f(3, 5)),
    "ContinuousBernoulli": (
        td.ContinuousBernoulli(t(0.3)),
        SimpleNamespace(cdf=lambda x: (0.3**x * 0.7 ** (1 - x) - 0.7) / -0.4),
    ),
    "VonMises": (td.VonMises(t(0.0), t(2.0)), stats.vonmises(2)),
    "VonMises, narrow": (td.VonMises(t(0.0), t(40.0)), stats.vonmises(40)),
    "transformed": (
        TransformedDistribution(td.Gamma(t(2.0), t(1.0)), [AffineTransform(t(1.0), t(-2.0))]),
        None,
    ),
}
LEVELS = torch.tensor([1e-6, 1e-3, 0.1, 0.3, 0.5, 0.8, 0.97, 1 - 1e-4], dtype=F64)


def parameters_of(q: td.Distribution) -> list[Tensor]:
    """Return what the constructor was given, in its order."""
    code = type(q).__init__.__code__
    return [getattr(q, k) for k in code.co_varnames[1 : code.co_argcount] if k in q.arg_constraints and k != "logits"]


def quantiles(q: td.Distribution) -> Tensor:
    return transport(q, LEVELS.unsqueeze(-1), differentiable=False)


@pytest.mark.parametrize("name", [name for name, (_, law) in SCALARS.items() if law is not None])
def test_points_are_the_quantiles_of_the_law(name):
    q, law = SCALARS[name]
    levels = torch.from_numpy(law.cdf(quantiles(q).numpy()))
    # What the table of quantiles.py promises of the level; the others are exact but for rounding.
    torch.testing.assert_close(levels, LEVELS, rtol=2e-9, atol=2e-11)


def test_a_transform_that_falls_turns_the_quantiles_round():
    expected = 1 - 2 * torch.from_numpy(stats.gamma(2).ppf(LEVELS.numpy()))
    torch.testing.assert_close(quantiles(SCALARS["transformed"][0]), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", SCALARS)
def test_the_outermost_cells_give_finite_points_inside_the_support(name, dtype):
    q, _ = SCALARS[name]
    if name != "transformed":
        q = type(q)(*(v.to(dtype) for v in parameters_of(q)))
    half = 2.0 ** (-24 if dtype == torch.float32 else -53)
    u = torch.tensor([half, 1 - half], dtype=dtype).unsqueeze(-1)
    x = transport(q, u, differentiable=False)
    assert x.isfinite().all()
    if name != "GeneralizedPareto" or dtype == torch.float32:  # whose log_prob in torch takes no float64 scalars
        assert q.log_prob(x).isfinite().all()


# The broad VonMises turns from π to -π between two differences.
GRADIENTS = [name for name in SCALARS if name not in ("Gamma, a million", "Beta, narrow", "transformed", "VonMises")]


@pytest.mark.parametrize("name", GRADIENTS)
def test_the_gradient_is_that_of_the_quantiles(name):
    q, _ = SCALARS[name]
    values = [v.clone().requires_grad_() for v in parameters_of(q)]
    x = transport(type(q)(*values), LEVELS.unsqueeze(-1), differentiable=True)
    found = [torch.autograd.grad(x[i], values, retain_graph=True, allow_unused=True) for i in range(len(LEVELS))]
    for j, value in enumerate(values):
        step = 1e-4 * max(1.0, abs(value.item()))
        around = []
        for sign in (-2, -1, 1, 2):  # a difference of fourth order
            moved = [v.detach() + (sign * step if i == j else 0) for i, v in enumerate(values)]
            around.append(transport(type(q)(*moved), LEVELS.unsqueeze(-1), differentiable=False))
        expected = (around[0] - 8 * around[1] + 8 * around[2] - around[3]) / (12 * step)
        actual = torch.stack([torch.zeros(()).double() if row[j] is None else row[j] for row in found])
        rounding = 1e-15 * x.detach().abs() / step
        assert ((actual - expected).abs() < 1e-6 * expected.abs() + 1e-7 + rounding).all()


VECTORS = {
    "MultivariateNormal": td.MultivariateNormal(t(1.0, 2.0, 3.0), scale_tril=CORRELATED),
    "LowRankMultivariateNormal": td.LowRankMultivariateNormal(
        t(1.0, 2.0, 3.0), CORRELATED[:, :2].contiguous(), t(0.3, 0.5, 0.7)
    ),
    "Dirichlet": td.Dirichlet(t(0.7, 2.0, 3.5, 1.0)),
    "LogisticNormal": td.LogisticNormal(t(0.3, -0.5), t(0.6, 0.4)),
    "RelaxedOneHotCategorical": td.RelaxedOneHotCategorical(t(0.7), probs=t(0.2, 0.3, 0.5)),
    "RelaxedBernoulli": td.RelaxedBernoulli(t(0.7), probs=t(0.3)),
    "Wishart": td.Wishart(t(5.0), scale_tril=CORRELATED),
    "Independent": Independent(td.Gamma(t(2.0, 3.0), t(1.0, 0.5)), 1),
    "OneHotCategoricalStraightThrough": None,
    "TransformedDistribution": TransformedDistribution(
        Independent(td.Normal(t(0.0, 1.0), t(1.0, 0.3)), 1), [ExpTransform()]
    ),
}


@pytest.mark.filterwarnings("ignore:Singular sample detected:UserWarning")  # torch's Wishart, of its own rounding
@pytest.mark.parametrize("name", [name for name, q in VECTORS.items() if q is not None])
def test_moments_of_vectors_are_those_of_independent_draws(name):
    torch.manual_seed(0)
    q = VECTORS[name]
    points, draws = Sobol(16).draw(q, 16 * 256, differentiable=False).x, q.sample((40_000,))
    assert points.shape == (4096, *q.event_shape)
    for statistic in (lambda x: x, lambda x: x**2, lambda x: x.reshape(len(x), -1).prod(-1)):
        f, g = statistic(points), statistic(draws)
        nets = f.unflatten(0, (16, 256)).mean(1)
        error = (nets.var(0) / 16 + g.var(0) / 40_000).sqrt()
        assert ((f.mean(0) - g.mean(0)).abs() < 6 * error).all()


def test_every_reparameterised_family_of_torch_has_a_transport():
    tested = {f.type.__name__ for f in FAMILIES if isinstance(f.kl, Line)} | set(VECTORS)  # the former in test_laws.py
    families = (getattr(td, name) for name in td.__all__)
    reparameterised = {d.__name__ for d in families if isinstance(d, type) and getattr(d, "has_rsample", False)}
    assert reparameterised - tested == set()


def test_one_uniform_makes_a_number_and_as_many_as_it_takes_an_event():
    counts = {name: num_uniforms(q) for name, q in VECTORS.items() if q is not None}
    assert counts["MultivariateNormal"] == 3
    assert counts["LowRankMultivariateNormal"] == 5
    assert counts["Dirichlet"] == 3
    assert counts["Wishart"] == 6
    assert counts["Independent"] == 2


def test_the_gradient_of_a_dirichlet_is_that_of_its_expectations():
    a = t(0.7, 2.0, 3.5).requires_grad_()
    x = Sobol().draw(td.Dirichlet(a), 2**12, differentiable=True).x
    assert torch.allclose(x.sum(-1), torch.ones(2**12, dtype=F64))
    (found,) = torch.autograd.grad(x.log().mean(0)[1], a)
    polygamma = torch.polygamma(1, a.detach())
    expected = torch.tensor([0.0, 1.0, 0.0], dtype=F64) * polygamma - torch.polygamma(1, a.detach().sum())
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)  # thirty standard errors of one net


def test_a_mixture_is_drawn_from_by_a_uniform_number_for_its_component():
    q = td.MixtureSameFamily(td.Categorical(t(0.25, 0.75)), td.Normal(t(-9.0, 9.0), t(1.0, 1.0)))
    x = Sobol().draw(q, 64, differentiable=False).x
    assert (x < 0).sum() == 16
    with pytest.raises(NotImplementedError, match="carry no gradient"):
        Sobol().draw(q, 64, differentiable=True)


@pytest.mark.parametrize("q", [td.Bernoulli(t(0.25)), td.Geometric(t(0.25)), td.Categorical(t(0.75, 0.25))])
def test_discrete_points_have_their_probabilities(q):
    x = Sobol().draw(q, 4096, differentiable=False).x
    mean = torch.tensor(0.25, dtype=F64) if isinstance(q, td.Categorical) else q.mean
    assert abs(x.double().mean() - mean) < 0.01
    with pytest.raises(NotImplementedError, match="carry no gradient"):
        transport(q, t(0.5).reshape(1, 1), differentiable=True)


def test_a_family_without_quantiles_is_refused_with_the_way_out():
    with pytest.raises(NotImplementedError, match=r"Poisson has neither an icdf nor a transport .*register_transport"):
        Sobol().draw(td.Poisson(3.0), 8, differentiable=False)


def test_a_subclass_with_a_law_of_its_own_does_not_inherit_the_transport():
    class Odd(td.Gamma):
        def log_prob(self, value):
            return super().log_prob(value) + 1

    with pytest.raises(NotImplementedError, match="Odd has neither an icdf nor a transport"):
        num_uniforms(Odd(2.0, 1.0))


def test_a_family_of_ones_own_is_registered_in_three_lines():
    class Square(td.Distribution):
        arg_constraints, has_rsample = {}, True

    @register_transport(Square)
    def square(q, u):
        return u**2

    x = Sobol().draw(Square(torch.Size([3]), validate_args=False), 64, differentiable=True).x
    assert torch.allclose(x.mean(0), torch.full((3,), 1 / 3), atol=0.01)


def test_normal_points_are_exact_functions_of_their_parameters():
    loc, scale = t(1.0).requires_grad_(), t(2.0).requires_grad_()
    x = transport(Normal(loc, scale), LEVELS.unsqueeze(-1), differentiable=True)
    d_loc, d_scale = torch.autograd.grad(x.sum(), (loc, scale))
    assert d_loc == len(LEVELS)
    torch.testing.assert_close(d_scale, ((x - loc) / scale).sum().detach())
