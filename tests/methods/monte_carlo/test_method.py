"""How MonteCarlo draws, how sure it says it is, and what it refuses. That it is unbiased is proved next door."""

import math

import pytest
import torch
from torch.distributions import (
    AffineTransform,
    Beta,
    Categorical,
    ExpTransform,
    Gamma,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    OneHotCategoricalStraightThrough,
    Pareto,
    Poisson,
    SigmoidTransform,
    StudentT,
    TransformedDistribution,
    Uniform,
    VonMises,
)

from torch_klloss.methods import MonteCarlo

STANDARD = Normal(0.0, 1.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Draws


def test_a_generator_makes_the_estimate_reproducible_and_leaves_the_global_stream_alone():
    q, p = Normal(torch.zeros(5), 1.0), StudentT(3.0)
    before = torch.get_rng_state()
    first, again = (MonteCarlo(8).estimate(q, p, seeded(3)).value for _ in range(2))
    generator = seeded(3)
    repeated = [MonteCarlo(8).estimate(q, p, generator).value for _ in range(2)]
    assert torch.equal(first, again)
    assert torch.equal(first, repeated[0])
    assert not torch.equal(*repeated)  # the generator advances
    assert torch.equal(before, torch.get_rng_state())


def test_without_a_generator_the_global_stream_is_drawn_from():
    torch.manual_seed(5)
    first = MonteCarlo(8).estimate(STANDARD, StudentT(3.0)).value
    second = MonteCarlo(8).estimate(STANDARD, StudentT(3.0)).value
    torch.manual_seed(5)
    again = MonteCarlo(8).estimate(STANDARD, StudentT(3.0)).value
    assert first == again != second


def test_every_batch_element_has_noise_of_its_own():
    p = Normal(torch.ones(8), 1.0)
    assert MonteCarlo(1).estimate(STANDARD, p).value.unique().numel() == 8
    # Shared noise would make the spread of the sum eight times that of one, not √8 times.
    estimates = MonteCarlo(4).estimate(STANDARD.expand((2000, 1)), Normal(torch.ones(8), 1.0))
    spread, claimed = estimates.value.sum(-1).std(), estimates.sum(1).std_error.square().mean().sqrt()
    assert abs(spread / claimed - 1) < 6 * (2 * 2000) ** -0.5  # the log-ratio is Normal


def test_draws_sum_over_the_event_before_the_error_is_taken():
    # One shared draw in each of two equal dimensions: the errors add up, their squares do not.
    class Copies(Normal):
        def rsample(self, sample_shape=()):
            return super().rsample(sample_shape)[..., :1].expand(*sample_shape, *self.batch_shape)

        sample = rsample

    q, p = Copies(torch.zeros(2), torch.ones(2)), Normal(torch.ones(2), 1.0)
    joint = MonteCarlo(64).estimate(Independent(q, 1), Independent(p, 1), seeded())
    parts = MonteCarlo(64).estimate(q, p, seeded())
    torch.testing.assert_close(joint.std_error, parts.std_error.sum())
    assert joint.std_error > 1.3 * parts.sum(1).std_error


def test_the_reported_error_is_the_spread_of_the_estimates():
    estimate = MonteCarlo(16).estimate(Normal(torch.zeros(4000), 1.0), Normal(1.0, 1.0), seeded())
    claimed = estimate.std_error.square().mean().sqrt()
    # The log-ratio is Normal: the spread of 4000 is known to 1/√8000, the claimed one better still.
    assert abs(estimate.value.std() / claimed - 1) < 6 * 8000**-0.5
    assert estimate.dof == 15
    assert estimate.num_evaluations == 16
    assert not estimate.exact
    assert estimate.method == "monte_carlo"


def test_a_single_sample_cannot_tell_its_error():
    estimate = MonteCarlo(1).estimate(Normal(torch.zeros(3), 1.0), STANDARD)
    assert estimate.value.isfinite().all()
    assert estimate.std_error.isnan().all()
    assert estimate.dof == 0
    assert all(end.isnan().all() for end in estimate.interval())


def test_a_single_estimate_may_be_negative_and_is_not_clamped():
    value = MonteCarlo(1).estimate(Normal(torch.full((1000,), 0.1), 1.0), STANDARD, seeded()).value
    assert (value < 0).float().mean() > 0.4


def test_the_error_carries_no_gradient():
    loc = torch.zeros(3, requires_grad=True)
    estimate = MonteCarlo(4).estimate(Normal(loc, 1.0), STANDARD)
    assert estimate.value.requires_grad
    assert not estimate.std_error.requires_grad
    assert not MonteCarlo(1).estimate(Normal(loc, 1.0), STANDARD).std_error.requires_grad


@pytest.mark.parametrize("gradient", ["pathwise", "sticking_the_landing", "score_function", "none"])
def test_every_gradient_has_the_same_value(gradient):
    q, p = Normal(torch.zeros(3), 1.0), StudentT(torch.tensor(3.0))
    expected = MonteCarlo(6).estimate(q, p, seeded())
    actual = MonteCarlo(6, gradient=gradient).estimate(q, p, seeded())
    torch.testing.assert_close(actual.value, expected.value)
    torch.testing.assert_close(actual.std_error, expected.std_error)


# Supports


def test_a_p_without_the_support_of_q_gives_infinity():
    q = Normal(torch.zeros(2, requires_grad=True), 1.0)
    assert (MonteCarlo(3).estimate(q, Gamma(2.0, 1.0)).value == math.inf).all()
    uniform = MonteCarlo(3).estimate(Uniform(0.0, torch.tensor([1.0, 2.0])), Uniform(0.0, 1.5)).value
    assert uniform.tolist() == [pytest.approx(math.log(1.5)), math.inf]


def test_points_outside_count_as_zero_density_where_constraints_cannot_decide():
    gap = MixtureSameFamily(Categorical(torch.ones(2)), Uniform(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 3.0])))
    assert MonteCarlo(2000).estimate(Uniform(0.5, 2.5), gap).value == math.inf
    torch.testing.assert_close(MonteCarlo(50).estimate(Uniform(2.0, 3.0), gap).value, torch.tensor(math.log(2)))
    assert gap._validate_args  # the user's object keeps its own validation


@pytest.mark.parametrize("p", [VonMises(0.0, 1.0), Beta(2.0, 2.0), Pareto(1.0, 1.0)], ids=lambda p: type(p).__name__)
def test_the_parameters_stay_finite_where_the_kl_is_not(p):
    loc = torch.zeros(4, requires_grad=True)
    value = MonteCarlo(50).estimate(Normal(loc, 3.0), p).value
    assert (value == math.inf).all()
    torch.where(value.isfinite(), value, 0.0).sum().backward()
    assert loc.grad.tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("q", "p"),
    [
        (Normal(math.nan, 1.0, validate_args=False), STANDARD),
        (STANDARD, Normal(math.nan, 1.0, validate_args=False)),
        (Uniform(math.nan, 1.0, validate_args=False), Uniform(0.0, 2.0)),
        (Uniform(0.0, 1.0), Uniform(math.nan, 2.0, validate_args=False)),
    ],
)
def test_nan_parameters_give_nan(q, p):
    assert MonteCarlo(3).estimate(q, p).value.isnan().all()


# Refusals


@pytest.mark.parametrize("gradient", ["pathwise", "sticking_the_landing"])
@pytest.mark.parametrize(
    "q",
    [Categorical(torch.ones(3)), OneHotCategoricalStraightThrough(torch.ones(3)), Poisson(1.0)],
    ids=lambda q: type(q).__name__,
)
def test_a_path_through_samples_that_have_none_is_refused(q, gradient):
    method = MonteCarlo(2, gradient=gradient)
    assert not method.supports(q, q)
    with pytest.raises(NotImplementedError, match=rf"'{gradient}'.*{type(q).__name__}.*gradient='score_function'"):
        method.estimate(q, q)


def test_pathwise_never_falls_back_on_detached_samples():
    with pytest.raises(
        NotImplementedError, match=r"needs q\.rsample, which VonMises lacks; use gradient='score_function'"
    ):
        MonteCarlo(2, gradient="pathwise").estimate(VonMises(0.0, 1.0), VonMises(0.0, 1.0))


def test_auto_is_pathwise_where_samples_have_a_derivative_and_the_score_function_elsewhere():
    loc = torch.zeros(3, requires_grad=True)
    for q in (Normal(loc, 1.0), VonMises(loc, 1.0)):
        expected = "pathwise" if q.has_rsample else "score_function"
        p = type(q)(torch.ones(3), 1.0)
        auto, explicit = (MonteCarlo(4, gradient=g).estimate(q, p, seeded()).value.sum() for g in ("auto", expected))
        assert torch.equal(*(torch.autograd.grad(value, loc)[0] for value in (auto, explicit)))


THETA = torch.tensor(2.0, requires_grad=True)
MOVING = {
    "uniform": Uniform(torch.zeros(()), THETA),
    "pareto": Pareto(THETA, torch.ones(())),
    "independent": Independent(Uniform(torch.zeros(2), THETA.expand(2)), 1),
    "exp_of_uniform": TransformedDistribution(Uniform(torch.zeros(()), THETA), [ExpTransform()]),
    "shifted_gamma": TransformedDistribution(Gamma(torch.ones(()), 1.0), [AffineTransform(THETA, 1.0)]),
    "mixture": MixtureSameFamily(Categorical(torch.ones(2)), Uniform(torch.zeros(2), THETA.expand(2))),
}


@pytest.mark.parametrize("q", MOVING.values(), ids=MOVING)
@pytest.mark.parametrize("gradient", ["score_function", "sticking_the_landing"])
def test_a_support_that_moves_with_its_parameters_is_refused(q, gradient):
    method = MonteCarlo(2, gradient=gradient)
    assert not method.supports(q, q)
    with pytest.raises(NotImplementedError, match="gradient"):
        method.estimate(q, q)


FIXED = {
    "uniform": Uniform(torch.zeros(()), torch.ones(())),
    "affine_normal": TransformedDistribution(Normal(torch.zeros(()), 1.0), [AffineTransform(THETA, THETA)]),
    "exp_of_affine_normal": TransformedDistribution(STANDARD, [AffineTransform(THETA, 1.0), ExpTransform()]),
    "logistic": TransformedDistribution(
        Uniform(torch.zeros(2), torch.ones(2)), [SigmoidTransform().inv, AffineTransform(THETA, 1.0)]
    ),
    "multivariate": MultivariateNormal(THETA.expand(2), torch.eye(2)),
}


@pytest.mark.parametrize("q", FIXED.values(), ids=FIXED)
@pytest.mark.parametrize("gradient", ["score_function", "sticking_the_landing", "pathwise"])
def test_a_support_that_stays_where_it_is_takes_every_gradient(q, gradient):
    assert MonteCarlo(2, gradient=gradient).supports(q, q)
    assert MonteCarlo(2, gradient=gradient).estimate(q, q).value.abs().max() < 1e-5


@pytest.mark.parametrize("num_samples", [0, -1, 1.5, True, "8", None])
def test_a_number_of_samples_that_is_none_is_an_error(num_samples):
    with pytest.raises(ValueError, match=f"num_samples must be an integer of at least 1, got {num_samples!r}"):
        MonteCarlo(num_samples)


def test_an_unknown_gradient_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'auto', 'pathwise', .*'none', got 'reinforce'"):
        MonteCarlo(gradient="reinforce")


def test_methods_of_equal_settings_are_equal():
    assert MonteCarlo(4) == MonteCarlo(4) != MonteCarlo(5)
    assert hash(MonteCarlo(4)) == hash(MonteCarlo(4))
    assert repr(MonteCarlo(4)).startswith("MonteCarlo(num_samples=4, sampler=IID()")
