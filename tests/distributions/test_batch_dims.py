"""Some elements of a batch of distributions, on their own."""

import pytest
import torch
from torch import nn
from torch.distributions import (
    AffineTransform,
    Categorical,
    Distribution,
    FisherSnedecor,
    Gamma,
    MixtureSameFamily,
    Normal,
    Pareto,
    SigmoidTransform,
    TransformedDistribution,
    constraints,
)

from torch_klloss.distributions.batch_dims import flattened, select
from torch_klloss.distributions.precision import in_float64
from torch_klloss.distributions.tensors import NotSelectableError

SHAPE = torch.Size([2, 3])


def mixture() -> MixtureSameFamily:
    return MixtureSameFamily(Categorical(torch.rand(2, 3, 4)), Normal(torch.randn(2, 3, 4), torch.rand(2, 3, 4) + 0.5))


def transformed() -> TransformedDistribution:
    return TransformedDistribution(
        Normal(torch.randn(2, 3), torch.rand(3) + 0.5), [AffineTransform(torch.randn(3), 2.0), SigmoidTransform()]
    )


INSTANCES = {
    "Normal": lambda: Normal(torch.randn(2, 1), torch.rand(3) + 0.5),
    "Gamma": lambda: Gamma(torch.rand(3) + 1, 2.0),
    "FisherSnedecor": lambda: FisherSnedecor(torch.rand(2, 3) + 1, torch.rand(3) + 1),
    "Pareto": lambda: Pareto(torch.full((2, 3), 0.01), torch.rand(3) + 1),
    "mixture": mixture,
    "transformed": transformed,
}


@pytest.mark.parametrize("name", INSTANCES)
def test_the_chosen_elements_have_the_densities_that_they_had(name):
    d = in_float64(INSTANCES[name]())
    x = torch.rand(5, 2, 3, dtype=torch.float64) * 0.9 + 0.05
    index = torch.tensor([4, 1])
    flat = flattened(d, SHAPE)
    assert flat.batch_shape == (6,)
    chosen = select(flat, index)
    assert chosen.batch_shape == (2,)
    expected = d.log_prob(x).expand(5, 2, 3).flatten(1)
    torch.testing.assert_close(flat.log_prob(x.flatten(1)), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(chosen.log_prob(x.flatten(1)[:, index]), expected[:, index], rtol=1e-14, atol=0)


def test_leaves_are_cut_off_from_what_they_were_taken_from():
    loc = torch.randn(4, requires_grad=True)
    flat = flattened(Normal(loc, 1.0), torch.Size([4]))
    leaves: list = []
    chosen = select(flat, torch.tensor([2]), leaves)
    chosen.log_prob(torch.ones(1)).backward()
    assert loc.grad is None
    ((source, leaf),) = leaves
    assert source.shape == (4,)
    assert leaf.grad.shape == (1,)


class Flow(Distribution):
    arg_constraints = {}  # noqa: RUF012
    support = constraints.real

    def __init__(self, net):
        self.net = net
        super().__init__(torch.Size([3]), validate_args=False)


def test_what_holds_a_network_is_not_taken_apart():
    with pytest.raises(NotSelectableError):
        flattened(Flow(nn.Linear(1, 3)), torch.Size([3]))
