"""Sampled KLs of pairs whose points round to the ends of their support, in value and gradient."""

import math
import warnings

import pytest
import torch
import torch.distributions as dist
from torch.distributions import (
    Independent,
    Normal,
    TanhTransform,
    TransformedDistribution,
    constraints,
)

from tests.methods.monte_carlo.outer_space import CASES
from torch_klloss import AutoKL, MonteCarloKL, kl_divergence
from torch_klloss.methods import MonteCarlo, Quadrature
from torch_klloss.methods.monte_carlo.rounded_draws import RoundedDrawsWarning
from torch_klloss.samplers import Antithetic, Points, Sobol

REPEATS, DRAWS = 8, 512
CLOSE = 7.0  # in errors with seven degrees of freedom, of fixed seeds


def parameters(case, dtype=torch.float64):
    return [torch.tensor(value, dtype=dtype, requires_grad=True) for value in case.at]


def grads_of(value, wrt):
    return torch.autograd.grad(value.sum(), wrt, allow_unused=True, materialize_grads=True)


def assert_agrees(samples, expected, rounding):
    samples, expected = torch.tensor(samples).double(), expected.item()
    error = samples.std().item() / len(samples) ** 0.5
    assert abs(samples.mean().item() - expected) < CLOSE * error + rounding * max(1.0, abs(expected))


def check(case, method, dtype):
    a, b = parameters(case)
    expected = case.kl(a, b)
    expected = (expected, *grads_of(expected, (a, b)))
    found = []
    torch.manual_seed(1)
    for _ in range(REPEATS):
        a, b = parameters(case, dtype)
        estimate = method.estimate(*case.pair(a, b))
        assert estimate.std_error.isfinite().all()
        found.append([t.sum().item() for t in (estimate.value, *grads_of(estimate.value, (a, b)))])
    for samples, value in zip(zip(*found, strict=True), expected, strict=True):
        assert_agrees(samples, value, 1e-4 if dtype == torch.float32 else 1e-7)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_pathwise_estimate_is_right_where_draws_round_to_an_end(case):
    check(case, MonteCarlo(DRAWS), torch.float32)


@pytest.mark.parametrize(
    "method",
    [
        MonteCarlo(DRAWS, gradient="sticking_the_landing"),
        MonteCarlo(DRAWS, gradient="score_function"),
        MonteCarlo(DRAWS, gradient="mixed"),
        MonteCarlo(DRAWS, chunk_size=100),
        MonteCarlo(DRAWS, sampler=Sobol(16)),
        MonteCarlo(DRAWS, sampler=Antithetic()),
        MonteCarlo(DRAWS, value="entropy"),
    ],
    ids=["landing", "score_function", "mixed", "chunks", "sobol", "antithetic", "entropy"],
)
@pytest.mark.parametrize("name", ["tanh_8.0_uniform_cache_0", "relaxed_bernoulli_0.05", "beta_logit_normal"])
def test_every_estimator_is_right_where_draws_round_to_an_end(name, method):
    (case,) = (each for each in CASES if each.name == name)
    q, p = case.pair(*parameters(case))
    if method.supports(q, p) is False:
        pytest.skip("refused for this q")
    check(case, method, torch.float32)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gradient", ["pathwise", "sticking_the_landing", "score_function", "mixed"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_gradient_is_right_for_every_case(case, gradient, dtype):
    method = MonteCarlo(DRAWS, gradient=gradient)
    if method.supports(*case.pair(*parameters(case))) is False:
        pytest.skip("refused for this q")
    check(case, method, dtype)


def policy(mean, cache=1, dims=2):
    base = Normal(torch.full((16, dims), mean), 1.0)
    return Independent(TransformedDistribution(base, [TanhTransform(cache_size=cache)]), 1)


@pytest.mark.parametrize(("mean", "expected"), [(3.0, 7.83855), (8.0, 27.7758)])
@pytest.mark.parametrize(
    "loss",
    [AutoKL(fallback=MonteCarlo(256)), AutoKL(fallback=[Quadrature(), MonteCarlo(256)]), MonteCarloKL(256)],
    ids=["auto", "quadrature_first", "monte_carlo"],
)
def test_losses_of_a_saturated_policy_agree_with_the_integral(loss, mean, expected):
    torch.manual_seed(0)
    value = loss(policy(mean), Independent(dist.Uniform(-torch.ones(2), torch.ones(2)), 1))
    assert value.item() == pytest.approx(expected, rel=0.01)


def test_a_mixture_of_saturated_policies_is_right():
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), policy_of_components())
    torch.manual_seed(0)
    estimate = MonteCarlo(2048).estimate(mixture, Independent(dist.Uniform(-torch.ones(1), 1.0), 1))
    expected = 2 * 30 - math.log(2) - 0.5 * math.log(2 * math.pi * math.e) - math.log(2)
    assert abs(estimate.value.item() - expected) < 5 * estimate.std_error.item()


def policy_of_components():
    base = Normal(torch.tensor([[-30.0], [30.0]]), 1.0)
    return Independent(TransformedDistribution(base, [TanhTransform()]), 1)


def test_a_dirichlet_of_tiny_concentrations_agrees_with_the_closed_form():
    q, p = dist.Dirichlet(torch.full((4,), 0.01)), dist.Dirichlet(torch.full((4,), 2.0))
    torch.manual_seed(0)
    estimate = MonteCarlo(4096).estimate(q, p)
    assert abs(estimate.value - kl_divergence(q, p)) < 5 * estimate.std_error


class OwnDraws:
    """A sampler that knows nothing of the space in which q is drawn."""

    def draw(self, q, num_samples, *, differentiable):
        x = q.rsample(torch.Size((num_samples,))) if differentiable else q.sample(torch.Size((num_samples,)))
        return Points(x, torch.full((num_samples,), 1 / num_samples), num_samples)


class OwnLogitNormal(dist.Distribution):
    """A third party's distribution, which draws and is evaluated in the interval."""

    arg_constraints, has_rsample, support = {}, True, constraints.unit_interval

    def __init__(self, mean):
        self.mean_of_logit = mean
        super().__init__(mean.shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return OwnLogitNormal(self.mean_of_logit.expand(batch_shape))

    def rsample(self, sample_shape=()):
        return (self.mean_of_logit + torch.randn(*sample_shape, *self.batch_shape)).sigmoid()

    def log_prob(self, x):
        return Normal(self.mean_of_logit, 1.0).log_prob(x.logit()) - x.log() - (1 - x).log()


LOST = {
    "gamma": (dist.Gamma(torch.tensor([0.01]), 1.0), dist.LogNormal(0.0, 50.0), OwnDraws()),
    "dirichlet": (dist.Dirichlet(torch.full((4,), 0.01)), dist.Dirichlet(torch.full((4,), 2.0)), OwnDraws()),
    "own": (OwnLogitNormal(torch.tensor([16.0])), dist.Beta(2.0, 2.0), None),
}


@pytest.mark.parametrize("name", LOST)
def test_draws_that_were_rounded_away_are_told(name):
    q, p, sampler = LOST[name]
    method = MonteCarlo(256) if sampler is None else MonteCarlo(256, sampler=sampler)
    torch.manual_seed(0)
    with pytest.warns(RoundedDrawsWarning, match=r"0\.\d+ of the draws"):
        estimate = method.estimate(q, p)
    assert estimate.std_error.isnan().all()


def test_only_the_elements_that_lost_draws_lose_their_standard_error():
    torch.manual_seed(0)
    with pytest.warns(RoundedDrawsWarning):
        estimate = MonteCarlo(256).estimate(OwnLogitNormal(torch.tensor([16.0, 0.0])), dist.Beta(2.0, 2.0))
    assert estimate.std_error.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    "q",
    [
        dist.Beta(torch.tensor([2.0, 0.01]), 3.0),
        dist.Gamma(torch.tensor([2.0, 0.01]), 3.0),
        dist.Uniform(torch.zeros(2), 1.0),
        dist.Exponential(torch.ones(2)),
        dist.LogNormal(torch.tensor([-200.0, 200.0]), 1.0),
        dist.HalfNormal(torch.ones(2)),
    ],
    ids=lambda q: type(q).__name__,
)
def test_draws_that_keep_their_numbers_raise_no_warning(q):
    p = dist.Uniform(-1e30, 1e38) if isinstance(q, dist.LogNormal) else q
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RoundedDrawsWarning)
        MonteCarlo(4096).estimate(q, p)
