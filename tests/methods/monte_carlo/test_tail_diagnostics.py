"""The shape of a Pareto tail, and which log-ratios have a variance."""

import math

import pytest
import torch
from torch.distributions import Cauchy, Gumbel, Independent, Laplace, LogNormal, Normal, StudentT

from torch_klloss.methods.monte_carlo.tail_diagnostics import has_infinite_variance, tail_shape

LEVEL = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000


@pytest.mark.parametrize("shape", [0.3, 0.5, 0.7, 0.9, 1.3])
def test_the_shape_of_a_pareto_distribution_is_found(shape):
    # The estimate is drawn to 1/2 by ten of 425, and its standard error is (1 + k)/√425.
    assert abs(tail_shape(-shape * LEVEL.log()) - shape) < 10 / 425 * abs(shape - 0.5) + (1 + shape) / 425**0.5


def test_tails_that_end_have_a_negative_shape_and_light_ones_none():
    assert tail_shape(LEVEL.log()) < -0.5  # a uniform distribution has -1
    assert abs(tail_shape((-LEVEL.log()).log())) < 0.1  # an exponential one has 0


def test_every_batch_element_has_a_shape_of_its_own_in_whatever_order():
    shapes = torch.tensor([0.2, 1.0])
    ratios = -shapes * LEVEL.log().unsqueeze(-1)
    shuffled = ratios[torch.randperm(len(ratios))]
    torch.testing.assert_close(tail_shape(shuffled), tail_shape(ratios))
    for k, each in zip(tail_shape(ratios), shapes, strict=True):
        assert abs(k - each) < 0.1


def test_the_scale_of_the_ratios_does_not_matter():
    torch.testing.assert_close(tail_shape(500 - 0.8 * LEVEL.log()), tail_shape(-0.8 * LEVEL.log()))


def test_few_draws_and_nan_have_no_shape():
    assert tail_shape(LEVEL[:24]).isnan()
    assert tail_shape(LEVEL[:25]).isfinite()
    assert tail_shape(torch.full((100,), math.nan)).isnan()


PAIRS = [
    (Normal(0.0, 1.0), StudentT(1.0), False),
    (Cauchy(0.0, 1.0), StudentT(1.0), False),
    (StudentT(2.0), Laplace(0.0, 1.0), True),  # the variance of |x|
    (StudentT(2.1), Laplace(0.0, 1.0), False),
    (Laplace(0.0, 1.0), Gumbel(0.0, 1.5), True),  # of exp(-x/1.5), which has a mean
    (Laplace(0.0, 1.0), Gumbel(0.0, 2.5), False),
]


@pytest.mark.parametrize(("q", "p", "infinite"), PAIRS)
def test_the_variance_of_a_log_ratio_is_told_from_the_tails(q, p, infinite):
    assert bool(has_infinite_variance(q, p)) is infinite


def test_where_nothing_tells_nothing_is_said():
    assert (
        has_infinite_variance(Independent(Normal(torch.zeros(2), 1.0), 1), Independent(Normal(torch.zeros(2), 1.0), 1))
        is not None
    )
    assert (
        has_infinite_variance(
            torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2)),
            Independent(Normal(torch.zeros(2), 1.0), 1),
        )
        is None
    )
    assert not has_infinite_variance(LogNormal(0.0, 1.0), LogNormal(0.0, 1.0))
