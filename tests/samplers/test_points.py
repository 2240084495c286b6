"""Points that know their weights, and the sampler that draws them independently."""

import pytest
import scipy.stats
import torch
from torch.distributions import Categorical, Independent, Normal, Poisson

from torch_klloss.samplers import IID, Points


def test_points_weigh_what_they_were_given():
    x = torch.tensor([0.0, 1.0, 2.0])
    weights = torch.tensor([0.2, 0.5, 0.3])
    points = Points(x, weights, num_replicates=None)
    torch.testing.assert_close(points.expectation(x**2), torch.tensor(0.5 + 4 * 0.3))
    assert points.std_error(x**2) is None


def test_an_expectation_is_taken_for_every_batch_element():
    points = Points(torch.zeros(4, 2, 3), torch.full((4, 1, 1), 0.25), num_replicates=4)
    f = torch.arange(24.0).reshape(4, 2, 3)
    torch.testing.assert_close(points.expectation(f), f.mean(0))
    torch.testing.assert_close(points.std_error(f), f.std(0) / 2)


def test_the_error_is_the_spread_of_the_means_of_the_replicates():
    f = torch.tensor([1.0, 3.0, 2.0, 6.0])
    points = Points(f, torch.full((4,), 0.25), num_replicates=2)
    # Two replicates of two points each, with means 2 and 4: a standard deviation of √2, over √2.
    torch.testing.assert_close(points.std_error(f), torch.tensor(1.0))
    assert Points(f, torch.full((4,), 0.25), num_replicates=1).std_error(f).isnan()


@pytest.mark.parametrize("replicates", [3, 4])
def test_skewness_and_error_of_every_outcome_average_to_the_third_cumulant_of_the_mean(replicates):
    # A replicate is a pair of dependent points: three possible pairs, with their probabilities. All outcomes at once.
    pairs = torch.tensor([[0.0, 1.0], [1.0, 3.0], [6.0, 0.0]], dtype=torch.float64)
    chances = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    outcomes = torch.cartesian_prod(*[torch.arange(3)] * replicates)
    f = pairs[outcomes].flatten(1).T  # [2 R, 3^R]
    chance = chances[outcomes].prod(1)
    centred = pairs.mean(1) - chances @ pairs.mean(1)
    truth = chances @ centred**3 / replicates**2

    def average(num_replicates: int) -> torch.Tensor:
        points = Points(f, torch.full((len(f), 1), 1 / len(f), dtype=torch.float64), num_replicates)
        # What makes Σd³ unbiased, over what std_error and a sample skewness have divided it by.
        unbiased = (num_replicates * (num_replicates - 1)) ** 0.5 / (num_replicates - 2)
        return unbiased * (chance @ (points.skewness(f) * points.std_error(f) ** 3))

    torch.testing.assert_close(average(replicates), truth, rtol=1e-12, atol=0)
    assert abs(average(2 * replicates) / truth - 1) > 0.1  # the points are not independent of one another


def test_the_skewness_is_that_of_a_mean_and_unknown_where_nothing_spreads():
    f = torch.tensor([[0.0, 5.0], [1.0, 5.0], [5.0, 5.0], [2.0, 5.0]], requires_grad=True)
    weights = torch.full((4, 1), 0.25)
    found = Points(f, weights, num_replicates=4).skewness(f)
    expected = scipy.stats.skew(f.detach().numpy()[:, 0]) / 4**0.5
    torch.testing.assert_close(found, torch.tensor([expected, 0.0], dtype=torch.float32))
    assert not found.requires_grad
    summed = Points(f, weights, num_replicates=4).skewness(f, 1)
    torch.testing.assert_close(summed, found[0])  # adding a constant to every draw
    assert (Points(f, weights, num_replicates=1).skewness(f) == 0).all()
    assert (Points(f, weights, num_replicates=2).skewness(f) == 0).all()
    assert Points(f, weights, num_replicates=None).skewness(f) is None


@pytest.mark.parametrize("num_samples", [1, 7])
def test_independent_draws_weigh_the_same(num_samples):
    q = Independent(Normal(torch.zeros(3, 2, dtype=torch.float64), 1.0), 1)
    points = IID().draw(q, num_samples, differentiable=True)
    assert points.x.shape == (num_samples, 3, 2)
    assert points.weights.dtype == torch.float64
    assert points.num_replicates == num_samples
    torch.testing.assert_close(
        points.expectation(torch.ones(num_samples, 3).double()), torch.ones(3, dtype=torch.float64)
    )


def test_draws_carry_a_path_only_where_it_is_asked_for():
    q = Normal(torch.zeros(3, requires_grad=True), 1.0)
    assert IID().draw(q, 2, differentiable=True).x.requires_grad
    assert not IID().draw(q, 2, differentiable=False).x.requires_grad


@pytest.mark.parametrize("q", [Categorical(torch.ones(4, 3)), Poisson(torch.ones(4))], ids=["categorical", "poisson"])
def test_discrete_draws_weigh_in_the_dtype_of_q(q):
    points = IID().draw(q, 5, differentiable=False)
    assert points.x.shape == (5, 4)
    assert points.weights.dtype == torch.float32


def test_the_mean_of_draws_is_that_of_q():
    points = IID().draw(Normal(torch.full((50,), 3.0), 2.0), 4000, differentiable=False)
    z = (points.expectation(points.x) - 3.0) / points.std_error(points.x)
    assert z.abs().max() < 6
    assert IID() == IID()
