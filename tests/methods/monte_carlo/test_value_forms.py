"""The forms of the value: what they need, what they cost, and when they report no error."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Beta,
    Categorical,
    Distribution,
    Independent,
    LogNormal,
    MixtureSameFamily,
    Normal,
    StudentT,
    Uniform,
    VonMises,
    constraints,
)

from torch_klloss import diagonal_normal, kl_divergence, standard_normal_like
from torch_klloss.methods import MonteCarlo
from torch_klloss.methods.monte_carlo.tail_diagnostics import HeavyTailWarning
from torch_klloss.samplers import IID, Antithetic, Sobol, Stratified

STANDARD = Normal(0.0, 1.0)
SAMPLERS = [IID(), Antithetic(), Stratified(), Sobol(), Sobol(replicates=2)]


class Counted(Distribution):
    """A curved log-density that counts how often it is evaluated, and how often differentiated."""

    arg_constraints = {}  # noqa: RUF012
    support = constraints.real_vector

    def __init__(self, weight: Tensor) -> None:
        super().__init__(torch.Size(), weight.shape[-1:], validate_args=False)
        self.weight, self.counts = weight, {"evaluated": 0, "differentiated": 0}

    def log_prob(self, x: Tensor) -> Tensor:
        self.counts["evaluated"] += 1
        y = x @ self.weight.T
        if y.requires_grad:
            y.register_hook(self._count)
        return -y.cosh().sum(-1)

    def _count(self, grad: Tensor) -> None:
        self.counts["differentiated"] += 1


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
@pytest.mark.parametrize("value", ["control_variate", "taylor"])
def test_a_quadratic_log_density_leaves_nothing_to_chance(value, sampler):
    mean, logvar = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    q = diagonal_normal(mean.requires_grad_(), logvar.requires_grad_())
    p = standard_normal_like(q)
    estimate = MonteCarlo(8, value=value, sampler=sampler).estimate(q, p)
    exact = kl_divergence(q, p)
    torch.testing.assert_close(estimate.value, exact, rtol=1e-12, atol=1e-12)
    grads = (torch.autograd.grad(t.sum(), (mean, logvar)) for t in (estimate.value, exact))
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("learns", [False, True])
def test_a_control_variate_evaluates_log_p_once_and_differentiates_it_once_more_only_for_p(learns):
    p = Counted(torch.eye(3, requires_grad=learns))
    mean = torch.zeros(2, 3, requires_grad=True)
    value = MonteCarlo(8, value="control_variate").estimate(diagonal_normal(mean, torch.zeros(2, 3)), p).value
    assert p.counts == {"evaluated": 1, "differentiated": 1}
    value.sum().backward()
    assert mean.grad.isfinite().all()
    assert p.counts == {"evaluated": 1, "differentiated": 2 if learns else 1}
    assert (p.weight.grad is not None) == learns


def test_without_autograd_a_control_variate_still_has_its_scores():
    q, p = diagonal_normal(torch.zeros(200, 3), torch.zeros(200, 3)), Counted(0.5 * torch.eye(3))
    with torch.no_grad():
        plain, better = (MonteCarlo(16, value=v).estimate(q, p).value for v in ("entropy", "control_variate"))
    assert not better.requires_grad
    assert better.var() < plain.var() / 10


@pytest.mark.parametrize("options", [{"value": "control_variate"}, {"gradient": "mixed"}])
def test_a_second_derivative_is_an_error_and_not_a_wrong_number(options):
    mean = torch.zeros(2, 3, requires_grad=True)
    q, p = diagonal_normal(mean, torch.zeros(2, 3)), Counted(torch.eye(3))
    value = MonteCarlo(8, **options).estimate(q, p).value.sum()
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        torch.autograd.grad(value, mean, create_graph=True)


@pytest.mark.parametrize("sampler", [IID(), Stratified(), Sobol(), Sobol(replicates=2)], ids=repr)
@pytest.mark.parametrize("value", ["log_ratio", "entropy", "control_variate", "taylor"])
def test_the_reported_error_is_the_spread_of_the_estimates(value, sampler):
    q = diagonal_normal(torch.zeros(4000, 2), torch.zeros(4000, 2))
    estimate = MonteCarlo(16, value=value, sampler=sampler).estimate(q, Counted(torch.eye(2)), seeded())
    if estimate.dof == 0:
        assert estimate.std_error.isnan().all()
        return
    # Ratio of two variances from 4000 estimates of a density with heavy tails: good to a fifth.
    assert estimate.std_error.square().mean() / estimate.value.var() == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 100])
@pytest.mark.parametrize(
    ("value", "gradient"),
    [
        ("log_ratio", "pathwise"),
        ("log_ratio", "sticking_the_landing"),
        ("log_ratio", "score_function"),
        ("entropy", "score_function"),
        ("k3", "pathwise"),
        ("control_variate", "pathwise"),
        ("taylor", "pathwise"),
    ],
)
def test_the_result_does_not_depend_on_the_chunk_size(value, gradient, chunk_size):
    results = []
    for size in (None, chunk_size):
        mean = torch.full((3, 2), 0.3, dtype=torch.float64, requires_grad=True)
        weight = torch.eye(2, dtype=torch.float64, requires_grad=True)
        q = diagonal_normal(mean, torch.full_like(mean, -1.0))
        method = MonteCarlo(32, value=value, gradient=gradient, chunk_size=size)
        estimate = method.estimate(q, Counted(weight), seeded())
        grads = torch.autograd.grad(estimate.value.sum(), (mean, weight))
        results.append((estimate.value, estimate.std_error, *grads))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_the_score_function_of_a_mixture_does_not_depend_on_the_chunk_size():
    results = []
    for size in (None, 3):
        loc = torch.tensor([-1.0, 1.0], dtype=torch.float64, requires_grad=True)
        q = MixtureSameFamily(Categorical(torch.ones(2, dtype=torch.float64)), Normal(loc, 0.5))
        estimate = MonteCarlo(8, gradient="score_function", chunk_size=size).estimate(q, STANDARD, seeded())
        results.append((estimate.value, *torch.autograd.grad(estimate.value, loc)))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)


# Needs.

NO_ENTROPY = MixtureSameFamily(Categorical(torch.ones(2)), Normal(torch.zeros(2), 1.0))


@pytest.mark.parametrize(
    ("value", "q"),
    [
        ("entropy", NO_ENTROPY),
        ("entropy", VonMises(0.0, 1.0)),
        ("control_variate", NO_ENTROPY),
        ("control_variate", LogNormal(0.0, 1.0)),
        ("control_variate", Beta(2.0, 2.0)),
        ("taylor", StudentT(3.0)),
        ("control_variate", Uniform(0.0, 1.0)),
    ],
    ids=lambda each: each if isinstance(each, str) else type(each).__name__,
)
def test_a_q_that_lacks_what_the_value_needs_is_refused_with_the_way_out(value, q):
    method = MonteCarlo(8, value=value)
    assert not method.supports(q, q)
    with pytest.raises(NotImplementedError, match=rf"value='{value}'.*{type(q).__name__}.*use value='log_ratio'"):
        method.estimate(q, q)


def test_an_odd_number_of_draws_has_no_two_halves():
    for num_samples in (1, 7):
        with pytest.raises(ValueError, match=f"num_samples must be even, got {num_samples}"):
            MonteCarlo(num_samples, value="control_variate")
    assert MonteCarlo(2, value="control_variate").estimate(STANDARD, StudentT(3.0)).value.isfinite()


def test_an_unknown_value_or_chunk_size_is_an_error():
    with pytest.raises(ValueError, match=r"value must be one of 'log_ratio', .*'k3', got 'k1'"):
        MonteCarlo(8, value="k1")
    with pytest.raises(ValueError, match=r"chunk_size .* must be an integer of at least 1"):
        MonteCarlo(8, chunk_size=0)
    with pytest.raises(ValueError, match="cannot be combined: log q is integrated exactly"):
        MonteCarlo(8, value="entropy", gradient="sticking_the_landing")


def test_the_score_function_refuses_draws_that_know_of_one_another_unless_there_is_one():
    q = Categorical(torch.ones(3))
    for sampler in (Antithetic(), Stratified(), Sobol()):
        with pytest.raises(NotImplementedError, match=r"are not. Use sampler=IID\(\)"):
            MonteCarlo(4, gradient="score_function", sampler=sampler).estimate(STANDARD, StudentT(3.0))
    assert MonteCarlo(1).estimate(q, q).value == 0


def test_a_p_without_the_support_of_q_gives_infinity_in_every_form():
    for value in ("log_ratio", "entropy", "control_variate", "taylor", "k2", "k3"):
        mean = torch.zeros(3, requires_grad=True)
        estimate = MonteCarlo(8, value=value).estimate(Normal(mean, 1.0), LogNormal(0.0, 1.0))
        assert (estimate.value == math.inf).all(), value


@pytest.mark.parametrize("value", ["log_ratio", "entropy", "control_variate", "taylor", "k2", "k3"])
def test_nan_parameters_give_nan(value):
    for q, p in ((Normal(math.nan, 1.0, validate_args=False), STANDARD), (STANDARD, Normal(math.nan, 1.0, False))):
        assert MonteCarlo(8, value=value).estimate(q, p).value.isnan()


# Errors that would mislead.


def test_k2_reports_no_error_for_it_knows_nothing_of_its_bias():
    estimate = MonteCarlo(64, value="k2").estimate(Normal(1.0, 0.5), STANDARD)
    assert estimate.value.isfinite()
    assert estimate.std_error.isnan()


def test_k3_reports_an_error_where_the_ratio_is_bounded_and_warns_where_its_tail_is_heavy():
    bounded = MonteCarlo(1000, value="k3").estimate(Normal(torch.zeros(50), 1.0), Normal(0.0, 0.7), seeded())
    exact = kl_divergence(STANDARD, Normal(0.0, 0.7))
    assert (abs(bounded.value - exact) < 6 * bounded.std_error).all()
    with pytest.warns(HeavyTailWarning, match=r"value='k3'.*Pareto tail.*Use value='log_ratio'"):
        heavy = MonteCarlo(1000, value="k3").estimate(Normal(torch.zeros(50), 0.3), STANDARD, seeded())
    assert heavy.std_error.isnan().float().mean() > 0.9
    assert (heavy.value >= 0).all()
    assert MonteCarlo(20, value="k3").estimate(STANDARD, Normal(0.0, 0.7)).std_error.isnan()  # no tail to look at


def test_no_error_is_reported_where_the_log_ratio_has_an_infinite_variance():
    dof = torch.tensor([3.0, 4.0, 5.0])  # E[x⁴] is finite for more than 4
    estimate = MonteCarlo(16).estimate(StudentT(dof), STANDARD)
    assert estimate.std_error.isnan().tolist() == [True, True, False]
    joint = MonteCarlo(16).estimate(Independent(StudentT(dof), 1), Independent(Normal(torch.zeros(3), 1.0), 1))
    assert joint.std_error.isnan()
    assert MonteCarlo(16).estimate(STANDARD, StudentT(3.0)).std_error.isfinite()
