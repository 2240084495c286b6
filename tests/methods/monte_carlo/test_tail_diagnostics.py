"""The shape of a Pareto tail."""

import math

import pytest
import torch

from torch_klloss.methods.monte_carlo.tail_diagnostics import tail_shape

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
