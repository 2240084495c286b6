"""The question's curves: three agree, and the fourth is too small by a known factor."""

import math

import pytest
import torch

from torch_klloss.cli.demo import EXPECTED_FACTOR, question_curves

EPS = torch.finfo(torch.float64).eps
GRID_POINTS = 401


def grid_tolerance(mu):
    """Bound the rounding of a weighted sum of `GRID_POINTS` log-ratios, whose size is about 1 + μ²."""
    return GRID_POINTS * EPS * (1 + mu**2)


def test_the_closed_form_is_half_the_squared_mean():
    curves = question_curves()
    assert curves.mu[0] == -5
    assert curves.mu[-1] == 5
    assert len(curves.mu) == 41
    assert torch.equal(curves.closed_form, curves.mu**2 / 2)


def test_the_grid_with_its_density_weights_gives_the_closed_form():
    curves = question_curves()
    assert ((curves.grid - curves.closed_form).abs() <= grid_tolerance(curves.mu)).all()


def test_the_expectation_of_the_questioners_formula_is_the_kl_times_the_mean_density():
    mu = question_curves().mu.unsqueeze(-1)
    offsets = torch.linspace(-10, 10, GRID_POINTS, dtype=torch.float64)
    q, p = torch.distributions.Normal(mu, 1.0), torch.distributions.Normal(0.0, 1.0)
    x = mu + offsets
    log_q = q.log_prob(x)
    expectation = (log_q.exp() ** 2 * (log_q - p.log_prob(x))).sum(-1) * (offsets[1] - offsets[0])
    mu, kl = mu.squeeze(-1), mu.squeeze(-1) ** 2 / 2

    def is_factor(c):
        return bool(((expectation - c * kl).abs() <= grid_tolerance(mu)).all())

    assert is_factor(EXPECTED_FACTOR)
    assert not is_factor(1 / math.sqrt(2 * math.pi))  # the density at the peak


@pytest.mark.parametrize("seed", range(5))
def test_the_measured_factor_is_the_mean_density_within_its_error(seed):
    curves = question_curves(seed=seed)
    assert abs(curves.factor - EXPECTED_FACTOR) < 6 * curves.factor_std_error
    for wrong in (1.0, 1 / math.sqrt(2 * math.pi)):
        assert abs(curves.factor - wrong) > 6 * curves.factor_std_error


def test_the_error_of_the_factor_is_its_spread_over_seeds():
    curves = [question_curves(num_points=11, seed=seed) for seed in range(200)]
    spread = torch.tensor([c.factor for c in curves]).std()
    stated = torch.tensor([c.factor_std_error for c in curves]).square().mean().sqrt()
    # The standard deviation of 200 draws is known to 1/√400 = 5 %.
    assert abs(spread / stated - 1) < 6 * 0.05


def test_the_plain_mean_agrees_with_the_closed_form_and_the_questioners_does_not():
    curves = question_curves()
    std_error = curves.sampled.std_error
    elsewhere = curves.mu != 0  # there both formulas are zero, without spread
    gap = (curves.sampled.value - curves.closed_form)[elsewhere] / std_error[elsewhere]
    wrong_gap = (curves.questioner - curves.closed_form)[elsewhere] / std_error[elsewhere]
    assert gap.abs().max() < 6
    assert wrong_gap.abs().max() > 6
    assert curves.sampled.dof == 99
    assert not curves.sampled.exact


def test_both_sampled_curves_see_the_same_samples():
    curves, others = (question_curves(num_points=10, num_samples=1, seed=seed) for seed in (0, 1))
    # One sample x has log q - log p = μx - μ²/2, which determines x.
    x = curves.sampled.value / curves.mu + curves.mu / 2
    weight = torch.distributions.Normal(curves.mu, 1.0).log_prob(x).exp()
    # Log-densities below 50 in size, divided by |μ| ≥ ½ and times |x - μ| < 5, and values below 8.
    tolerance = 2 * 50 / 0.5 * 5 * 8 * EPS
    assert ((weight * curves.sampled.value - curves.questioner).abs() < tolerance).all()
    assert ((weight * curves.sampled.value - others.questioner).abs() > tolerance).any()


def test_a_single_sample_has_no_standard_error():
    curves = question_curves(num_samples=1)
    assert math.isnan(curves.factor_std_error)
    assert curves.sampled.std_error.isnan().all()


def test_the_seed_determines_the_samples_and_the_global_stream_does_not_change():
    state = torch.get_rng_state()
    first, again, other = (question_curves(seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.questioner, again.questioner)
    assert torch.equal(first.sampled.value, again.sampled.value)
    assert not torch.equal(first.questioner, other.questioner)


def test_too_few_points_or_samples_are_refused():
    with pytest.raises(ValueError, match="num_points must be at least 2, got 1"):
        question_curves(num_points=1)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        question_curves(num_samples=0)
