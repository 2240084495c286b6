"""Errors of estimates: intervals, their coverage, and sums."""

import dataclasses
import math

import pytest
import scipy.stats
import torch
from torch.distributions import Normal, StudentT, Uniform

from torch_klloss import KLEstimate, kl_divergence
from torch_klloss.methods import MixedGradient, MonteCarlo
from torch_klloss.samplers import IID, Antithetic, Sobol, Stratified


def sampled(value, std_error, dof) -> KLEstimate:
    return KLEstimate(
        torch.tensor(value), exact=False, std_error=torch.tensor(std_error), dof=dof, method="monte_carlo"
    )


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("dof", [1, 2, 7.5, 63, 1e5])
def test_the_interval_of_a_sample_is_students_t_interval(dof, level):
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
    # log q - log p is Normal here, so the error follows Student's t. The other claims are wrong:
    # ±1.96 standard errors cover less, and so does the t interval of one degree of freedom too many.
    n, level = 20_000, 0.95
    estimate = MonteCarlo(num_samples).estimate(Normal(torch.zeros(n), 1.0), Normal(1.0, 1.0))
    six_sigma = 6 * (level * (1 - level) / n) ** 0.5

    def coverage(claim: KLEstimate, half_width: float | None = None) -> float:
        low, high = claim.interval(level)
        if half_width is not None:
            low, high = claim.value - half_width * claim.std_error, claim.value + half_width * claim.std_error
        return ((low < 0.5) & (high > 0.5)).double().mean().item()

    symmetric = dataclasses.replace(estimate, skewness=None)
    assert abs(coverage(symmetric) - level) < six_sigma
    assert coverage(estimate, half_width=1.96) < level - six_sigma
    if num_samples <= 4:
        assert coverage(dataclasses.replace(symmetric, dof=estimate.dof + 1)) < level - six_sigma
    # Where the skewness is only noise, allowing for it raises the coverage by 1.2 % at most, at three draws.
    assert coverage(symmetric) <= coverage(estimate) < 0.962 + six_sigma


@pytest.mark.parametrize("sampler", [IID(), Antithetic(), Stratified(8), Sobol(8)], ids=lambda s: type(s).__name__)
def test_the_interval_covers_92_to_98_percent_where_the_log_ratio_is_skewed(sampler):
    n = 40_000
    torch.manual_seed(0)
    q, p = Normal(torch.ones(n, dtype=torch.float64), 0.5), Normal(torch.zeros((), dtype=torch.float64), 1.0)
    estimate, truth = MonteCarlo(64, sampler=sampler).estimate(q, p), kl_divergence(q, p)

    def coverage(skewness: torch.Tensor | None) -> float:
        low, high = dataclasses.replace(estimate, skewness=skewness).interval(0.95)
        return ((low < truth) & (high > truth)).double().mean().item()

    assert 0.92 < coverage(estimate.skewness) < 0.98
    # The t interval ignores the skewness and covers less; so does an interval shifted the wrong way.
    six_sigma = 6 * (0.08 / n) ** 0.5
    assert coverage(None) < coverage(estimate.skewness) - six_sigma
    assert coverage(-estimate.skewness) < coverage(estimate.skewness) - six_sigma


@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("skewness", [-0.7, 0.0, 0.25])
def test_the_interval_reaches_further_on_the_side_of_the_longer_tail(skewness, level):
    low, high = dataclasses.replace(sampled(2.0, 0.5, 7), skewness=torch.tensor(skewness)).interval(level)
    t = scipy.stats.t.ppf(0.5 + level / 2, 7)
    # Where the Edgeworth expansion of the studentised mean, Φ(x) + γ (2 x² + 1) φ(x) / 6, is Φ(±t) to first order.
    further = abs(skewness) * (2 * t**2 + 1) / 6
    ends = (t + further, t) if skewness < 0 else (t, t + further)
    assert low.item() == pytest.approx(2 - 0.5 * ends[0], rel=1e-5)
    assert high.item() == pytest.approx(2 + 0.5 * ends[1], rel=1e-5)


@pytest.mark.parametrize("n", [100, 400])
def test_the_ends_are_quantiles_of_a_studentised_mean_of_exponentials_up_to_order_1_over_n(n):
    repetitions = 100_000
    torch.manual_seed(0)
    draws = torch.distributions.Exponential(torch.ones((), dtype=torch.float64)).sample((n, repetitions))
    studentised = (draws.mean(0) - 1) / draws.std(0) * n**0.5
    skewness = 2 / n**0.5  # of the mean; the skewness of an exponential is 2

    def misses(claim: float) -> float:
        error = KLEstimate(torch.zeros(()), False, torch.ones(()), dof=n - 1, skewness=torch.tensor(claim))
        # The truth is above value + end x error as often as the studentised mean is below -end.
        return (studentised < -error.interval(0.95)[1]).double().mean().item()

    # Measured for n = 50 to 400, the error of a one-sided level falls as 0.3 / n; the t interval's as 0.2 / √n.
    tolerance = 0.4 / n + 6 * (0.025 / repetitions) ** 0.5
    assert abs(misses(skewness) - 0.025) < tolerance
    assert misses(0.0) > 0.025 + tolerance
    assert misses(2 * skewness) < 0.025 - tolerance


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


def test_the_degrees_of_freedom_of_errors_that_are_zero_add_up():
    total = sampled([1.0, 1.0], [0.0, 0.0], 3).sum(1)
    assert (total.std_error, total.dof) == (0.0, 6.0)
    assert total.interval() == (2.0, 2.0)


def test_a_sum_adds_third_cumulants():
    estimate = dataclasses.replace(sampled([1.0, 2.0], [3.0, 4.0], 9), skewness=torch.tensor([0.5, -0.25]))
    total = estimate.sum(1)
    torch.testing.assert_close(total.skewness, torch.tensor((0.5 * 27 - 0.25 * 64) / 125))
    turned = estimate.combine(torch.tensor([-2.0, 0.0]), (0,))
    torch.testing.assert_close(turned.skewness, torch.tensor(-0.5))
    each = estimate.combine(torch.tensor([-2.0, 0.0]), ())
    torch.testing.assert_close(each.skewness, torch.tensor([-0.5, 0.0]))
    alike = dataclasses.replace(sampled([1.0] * 16, [0.5] * 16, 9), skewness=torch.full((16,), 0.8))
    torch.testing.assert_close(alike.sum(1).skewness, torch.tensor(0.8 / 16**0.5))  # as of independent draws
    assert sampled([1.0, 2.0], [3.0, 4.0], 9).sum(1).skewness is None


def test_an_unknown_skewness_gives_students_t_interval():
    estimate = dataclasses.replace(sampled([1.0, 1.0], [0.0, 0.0], 9), skewness=torch.zeros(2))
    assert estimate.sum(1).skewness == 0.0
    unknown = dataclasses.replace(sampled([1.0, math.nan], [0.5, math.nan], 9), skewness=torch.tensor([0.5, math.nan]))
    kept = unknown.combine(torch.tensor([1.0, 0.0]), (0,))
    assert (kept.std_error, kept.skewness) == (0.5, 0.5)
    constant = MonteCarlo(8).estimate(Uniform(0.0, 1.0), Uniform(0.0, 2.0))  # log 2 at every draw
    assert constant.interval() == (constant.value, constant.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk_size": 5},
        {"gradient": "score_function"},
        {"gradient": MixedGradient()},
        {"value": "taylor"},
        {"value": "control_variate"},
        {"sampler": Sobol(8)},
    ],
    ids=lambda options: "_".join(map(str, options)) or "default",
)
def test_every_sampled_estimate_has_a_skewness(options):
    q = Normal(torch.zeros(5, requires_grad=True), 1.0)
    estimate = MonteCarlo(16, **options).estimate(q, StudentT(4.0))
    assert estimate.skewness.shape == estimate.value.shape
    assert (estimate.skewness != 0).all()
    assert not estimate.skewness.requires_grad
    # Of n numbers the sample skewness is (n - 2) / √(n - 1) at most.
    n = 8 if len({"sampler", "value"} & options.keys()) and options.get("value") != "taylor" else 16
    assert (estimate.skewness.abs() <= (n - 2) / ((n - 1) * n) ** 0.5 + 1e-6).all()
    assert MonteCarlo(1).estimate(q, StudentT(4.0)).skewness.eq(0).all()


@pytest.mark.parametrize("sampler", [IID(), Antithetic(), Sobol(6)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("chunk_size", [1, 4, 7, 23, 24])
def test_the_skewness_of_the_replicates_does_not_depend_on_chunks(sampler, chunk_size):
    q, p = Normal(torch.zeros(4, dtype=torch.float64), 1.0), StudentT(torch.tensor(4.0, dtype=torch.float64))
    torch.manual_seed(0)
    estimate = MonteCarlo(24, sampler=sampler, chunk_size=chunk_size).estimate(q, p)
    torch.manual_seed(0)
    points = sampler.draw(q, 24, differentiable=True)
    log_ratio = q.log_prob(points.x) - p.log_prob(points.x)
    means = log_ratio.unflatten(0, (points.num_replicates, -1)).mean(1)
    expected = torch.from_numpy(scipy.stats.skew(means.numpy())) / points.num_replicates**0.5
    torch.testing.assert_close(estimate.skewness, expected, rtol=1e-10, atol=1e-12)


def test_an_unknown_error_makes_the_error_of_the_sum_unknown():
    assert sampled([1.0, 1.0], [0.5, math.nan], 3).sum(1).std_error.isnan()


def test_elements_of_weight_zero_add_nothing_even_if_nan():
    estimate = sampled([1.0, math.nan, math.inf], [0.5, math.nan, math.nan], 9)
    weighted = estimate.combine(torch.tensor([2.0, 0.0, 0.0]), (0,))
    assert (weighted.value, weighted.std_error, weighted.dof) == (2.0, 1.0, 9.0)
    bounded = KLEstimate(torch.ones(2), exact=False, error_bound=torch.tensor([0.5, math.nan]))
    assert bounded.combine(torch.tensor([-1.0, 0.0]), (0,)).error_bound == 0.5


def test_an_estimate_is_a_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampled(2.0, 0.5, 9).value = torch.tensor(1.0)
    assert KLEstimate(torch.tensor(1.0), True).exact is True
