"""Transforms that change the shape of an event, or hold a distribution: equal ones are taken off, and points fit."""

import math

import pytest
import torch
from torch.distributions import (
    AffineTransform,
    CatTransform,
    ComposeTransform,
    CorrCholeskyTransform,
    CumulativeDistributionTransform,
    ExpTransform,
    Independent,
    IndependentTransform,
    Laplace,
    Normal,
    PowerTransform,
    ReshapeTransform,
    StickBreakingTransform,
    TanhTransform,
    TransformedDistribution,
    Uniform,
)

from torch_klloss import AutoKL
from torch_klloss.methods import MonteCarlo, Quadrature

SHAPED = {
    "reshape": lambda: [ReshapeTransform((4,), (2, 2))],
    "its inverse": lambda: [ReshapeTransform((2, 2), (4,)).inv],
    "twice": lambda: [ReshapeTransform((4,), (2, 2)), ReshapeTransform((2, 2), (4, 1))],
    "before a chain": lambda: [ComposeTransform([ReshapeTransform((4,), (2, 2)), ExpTransform()])],
    "within a list": lambda: [ExpTransform(), ReshapeTransform((4,), (2, 2)), TanhTransform()],
    "independent": lambda: [IndependentTransform(ReshapeTransform((4,), (2, 2)), 0)],
    "cat": lambda: [CatTransform([ExpTransform(), AffineTransform(1.0, 2.0)], dim=-1, lengths=[2, 2])],
    "stick breaking": lambda: [StickBreakingTransform()],
    "cdf": lambda: [CumulativeDistributionTransform(Normal(torch.tensor(0.5), torch.tensor(2.0)))],
    "cdf of a vector": lambda: [CumulativeDistributionTransform(Normal(torch.arange(4.0), 2.0))],
}


@pytest.mark.parametrize("outer", [False, True], ids=["", "in an Independent"])
@pytest.mark.parametrize("transforms", SHAPED.values(), ids=SHAPED)
def test_two_equal_transforms_that_change_the_shape_are_taken_off(transforms, outer):
    def law(mean):
        d = TransformedDistribution(Independent(Normal(mean, 1.0), 1), transforms())
        return Independent(d, 1) if outer else d

    batch = (3, 5) if outer else (3,)
    q, p = law(torch.ones(*batch, 4)), law(torch.zeros(*batch, 4))
    assert AutoKL().route(q, p) == "closed_form"
    assert AutoKL(reduction="none")(q, p).tolist() == [10.0 if outer else 2.0] * 3


def test_two_equal_maps_to_correlation_factors_are_taken_off():
    q, p = (
        TransformedDistribution(Independent(Normal(m, 1.0), 1), [CorrCholeskyTransform()])
        for m in (torch.ones(6), torch.zeros(6))
    )
    assert AutoKL()(q, p) == 3.0


@pytest.mark.parametrize(
    ("of_q", "of_p"),
    [
        (ReshapeTransform((4,), (2, 2)), ReshapeTransform((2, 2), (2, 2))),
        (
            CatTransform([ExpTransform(), TanhTransform()], dim=-1, lengths=[2, 2]),
            CatTransform([ExpTransform(), TanhTransform()], dim=-1, lengths=[1, 3]),
        ),
        (
            CatTransform([PowerTransform(2.0), ExpTransform()], dim=-1, lengths=[2, 2]),  # not injective on the line
            CatTransform([PowerTransform(2.0), ExpTransform()], dim=-1, lengths=[2, 2]),
        ),
        (CumulativeDistributionTransform(Normal(0.0, 1.0)), CumulativeDistributionTransform(Normal(0.0, 2.0))),
        (CumulativeDistributionTransform(Normal(0.0, 1.0)), CumulativeDistributionTransform(Laplace(0.0, 1.0))),
        (
            CumulativeDistributionTransform(Normal(torch.zeros((), requires_grad=True), 1.0)),
            CumulativeDistributionTransform(Normal(torch.zeros((), requires_grad=True), 1.0)),
        ),
    ],
    ids=["shapes", "lengths", "power", "scales", "families", "learned"],
)
def test_unequal_learned_or_folding_ones_stay(of_q, of_p):
    shape = of_p.in_shape if isinstance(of_p, ReshapeTransform) else (4,)
    q = TransformedDistribution(Independent(Normal(torch.ones(4), 1.0), 1), [of_q])
    p = TransformedDistribution(Independent(Normal(torch.zeros(shape), 1.0), len(shape)), [of_p])
    assert AutoKL().route(q, p) == "monte_carlo"


@pytest.mark.parametrize("of_cdf", ["scalar", "ones", "last", "full"])
@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (4, 4), (2, 3, 4)], ids=str)
def test_a_distribution_within_a_transform_is_integrated_in_every_batch_shape(shape, of_cdf):
    within = {"scalar": (), "ones": (1,) * len(shape), "last": shape[-1:], "full": shape}[of_cdf]
    loc = 0.1 * torch.arange(float(torch.Size(within).numel())).reshape(within)
    cdf = CumulativeDistributionTransform(Normal(loc, 1.0))
    q = TransformedDistribution(Normal(torch.ones(shape), 0.5), [cdf])
    estimate = AutoKL(fallback=[Quadrature(), MonteCarlo(64)]).estimate(
        q, Uniform(torch.tensor(0.0), torch.tensor(1.0))
    )
    assert estimate.method == "quadrature"
    torch.testing.assert_close(
        estimate.value, (0.5 * (1 - loc) ** 2 + math.log(2) - 0.375).expand(shape), rtol=1e-5, atol=1e-6
    )


def test_a_mask_takes_no_example_from_a_distribution_within_a_transform():
    """One of a smaller batch shape belongs to the last dimension, whatever its size."""
    cdf = CumulativeDistributionTransform(Normal(torch.tensor([0.0, 1.0]), 1.0))
    q = TransformedDistribution(Normal(torch.ones(2, 2), 0.5), [cdf])
    loss = AutoKL(fallback=Quadrature())
    torch.testing.assert_close(
        loss(q, Uniform(0.0, 1.0), mask=torch.tensor([False, True])).item(),
        0.5 + 2 * (math.log(2) - 0.375),
        rtol=1e-5,
        atol=0,
    )
