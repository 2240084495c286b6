"""What an estimate says about its own error."""

import dataclasses
import math

import pytest
import scipy.stats
import torch
from torch.distributions import Normal

from torch_klloss import KLEstimate
from torch_klloss.methods import MonteCarlo


def sampled(value, std_error, dof) -> KLEstimate:
    return KLEstimate(
        torch.tensor(value), exact=False, std_error=torch.tensor(std_error), dof=dof, method="monte_carlo"
    )


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("dof", [1, 2, 7.5, 63, 1e5])
def test_the_interval_of_a_sample_is_that_of_students_t(dof, level):
    low, high = sampled(2.0, 0.5, dof).interval(level)
    half_width = 0.5 * scipy.stats.t.ppf(0.5 + level / 2, dof)
    assert low.item() == pytest.approx(2 - half_width, rel=1e-5)
    assert high.item() == pytest.approx(2 + half_width, rel=1e-5)


def test_degrees_of_freedom_may_differ_between_elements():
    estimate = sampled([0.0, 0.0], [1.0, 1.0], torch.tensor([1.0, 30.0]))
    expected = torch.tensor([scipy.stats.t.ppf(0.975, dof) for dof in (1, 30)], dtype=torch.float32)
    torch.testing.assert_close(estimate.interval()[1], expected)


def test_the_interval_of_a_quadrature_is_its_error_bound():
    estimate = KLEstimate(torch.tensor(2.0), exact=False, error_bound=torch.tensor(0.25))
    assert estimate.interval() == (1.75, 2.25)


def test_an_exact_value_is_its_own_interval():
    assert KLEstimate(torch.tensor(2.0), exact=True).interval() == (2.0, 2.0)


def test_an_error_of_unknown_reliability_gives_no_interval():
    for estimate in (sampled(2.0, 0.5, None), sampled(2.0, math.nan, 0), sampled(2.0, 0.5, 0)):
        assert all(end.isnan() for end in estimate.interval())


@pytest.mark.parametrize("level", [0, 1, -0.5, 95, math.nan])
def test_a_level_outside_0_and_1_is_an_error(level):
    with pytest.raises(ValueError, match=f"level must lie strictly between 0 and 1, got {level}"):
        sampled(2.0, 0.5, 9).interval(level)


@pytest.mark.parametrize("num_samples", [2, 4, 16])
def test_the_interval_covers_the_truth_as_often_as_it_says(num_samples):
    # log q - log p is Normal here, so that Student's t is the law of the error. The other claims are wrong:
    # ±1.96 standard errors cover less, and so does the t interval of one degree of freedom too many.
    n, level = 20_000, 0.95
    estimate = MonteCarlo(num_samples).estimate(Normal(torch.zeros(n), 1.0), Normal(1.0, 1.0))
    six_sigma = 6 * (level * (1 - level) / n) ** 0.5

    def coverage(claim: KLEstimate, half_width: float | None = None) -> float:
        low, high = claim.interval(level)
        if half_width is not None:
            low, high = claim.value - half_width * claim.std_error, claim.value + half_width * claim.std_error
        return ((low < 0.5) & (high > 0.5)).double().mean().item()

    assert abs(coverage(estimate) - level) < six_sigma
    assert coverage(estimate, half_width=1.96) < level - six_sigma
    if num_samples <= 4:
        assert coverage(dataclasses.replace(estimate, dof=estimate.dof + 1)) < level - six_sigma


def test_a_sum_adds_values_and_squares_of_errors():
    estimate = sampled([[1.0, 2.0], [3.0, 4.0]], [[3.0, 4.0], [5.0, 12.0]], 9)
    total = estimate.sum(1)
    assert total.value.tolist() == [3.0, 7.0]
    assert total.std_error.tolist() == [5.0, 13.0]
    # Welch and Satterthwaite: (Σs²)² / Σ(s⁴/ν).
    torch.testing.assert_close(total.dof, torch.tensor([25**2 / ((81 + 256) / 9), 169**2 / ((625 + 20736) / 9)]))
    assert estimate.sum(0) is estimate
    both = estimate.sum(2)
    assert both.value == 10.0
    torch.testing.assert_close(both.std_error, torch.tensor((25.0 + 169.0) ** 0.5))


def test_a_sum_of_exact_values_is_exact():
    total = KLEstimate(torch.ones(2, 3), exact=True, method="closed_form").sum(1)
    assert total.value.tolist() == [3.0, 3.0]
    assert (total.exact, total.std_error, total.method) == (True, None, "closed_form")


def test_a_sum_adds_error_bounds():
    total = KLEstimate(torch.ones(3), exact=False, error_bound=torch.full((3,), 0.5)).sum(1)
    assert total.error_bound == 1.5


def test_a_sum_of_errors_that_are_zero_keeps_every_degree_of_freedom():
    total = sampled([1.0, 1.0], [0.0, 0.0], 3).sum(1)
    assert (total.std_error, total.dof) == (0.0, 6.0)
    assert total.interval() == (2.0, 2.0)


def test_an_unknown_error_makes_the_error_of_the_sum_unknown():
    assert sampled([1.0, 1.0], [0.5, math.nan], 3).sum(1).std_error.isnan()


def test_elements_of_weight_zero_count_for_nothing_even_where_they_are_nan():
    estimate = sampled([1.0, math.nan, math.inf], [0.5, math.nan, math.nan], 9)
    weighted = estimate.combine(torch.tensor([2.0, 0.0, 0.0]), (0,))
    assert (weighted.value, weighted.std_error, weighted.dof) == (2.0, 1.0, 9.0)
    bounded = KLEstimate(torch.ones(2), exact=False, error_bound=torch.tensor([0.5, math.nan]))
    assert bounded.combine(torch.tensor([-1.0, 0.0]), (0,)).error_bound == 0.5


def test_an_estimate_is_a_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampled(2.0, 0.5, 9).value = torch.tensor(1.0)
    assert KLEstimate(torch.tensor(1.0), True).exact is True
