"""The tensors that a pair is differentiated by, found and named."""

import pytest
import torch
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    ExpTransform,
    HalfNormal,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    StudentT,
    TransformedDistribution,
)

from torch_klloss.distributions.tensors import tensors_of
from torch_klloss.testing.leaves import derivatives, with_leaves


def learned(x):
    return torch.tensor(x, dtype=torch.float64, requires_grad=True)


def test_leaves_that_require_a_gradient_are_named_by_the_parameter_that_they_lead_to():
    mean, logvar, scale = learned([1.0, 2.0]), learned(0.5), learned(2.0)
    q, p = Independent(Normal(mean, (logvar / 2).exp()), 1), Independent(Normal(torch.zeros(2), scale), 1)
    same_q, same_p, leaves = with_leaves(q, p)
    assert (same_q, same_p) == (q, p)
    assert list(leaves) == ["q.loc", "q.scale", "p.scale"]
    assert all(a is b for a, b in zip(leaves.values(), (mean, logvar, scale), strict=True))


def test_a_leaf_that_leads_to_both_sides_is_one():
    shared = learned(1.0)
    assert list(with_leaves(Normal(shared, 1.0), Normal(0.0, shared))[2]) == ["q.loc"]


@pytest.mark.parametrize(
    ("q", "names"),
    [
        (Normal(0.0, 1.0), ["q.loc", "q.scale"]),
        (Independent(Normal(torch.zeros(2), 1.0), 1), ["q.loc", "q.scale"]),
        (HalfNormal(2.0), ["q.scale"]),  # the location of the Normal inside is none of its parameters
        (StudentT(4.0), ["q.df", "q.loc", "q.scale"]),
        (Beta(2.0, 3.0), ["q.concentration1", "q.concentration0"]),
        (Bernoulli(0.3), ["q.probs"]),
        (Bernoulli(logits=0.3), ["q.logits"]),
        (Binomial(3, torch.tensor(0.3)), ["q.probs"]),
        (Categorical(torch.tensor([0.5, 0.5])), ["q.probs"]),
        (MultivariateNormal(torch.zeros(2), torch.eye(2)), ["q.loc"]),
        (TransformedDistribution(Normal(0.0, 1.0), [ExpTransform()]), ["q.loc", "q.scale"]),
    ],
)
def test_without_one_the_declared_parameters_become_leaves_of_copies(q, names):
    copy, _, leaves = with_leaves(q, Normal(0.0, 1.0))
    assert [name for name in leaves if name.startswith("q")] == names
    assert not any(t.requires_grad for t in tensors_of(q))
    x = q.sample()
    assert torch.equal(copy.log_prob(x).detach(), q.log_prob(x))
    assert copy.log_prob(x).requires_grad


def test_what_torch_computed_on_demand_is_no_parameter():
    q = Bernoulli(torch.tensor(0.3))
    assert q.logits < 0  # keeps it
    assert list(with_leaves(q, q)[2]) == ["q.probs", "p.probs"]


def test_parts_that_share_a_name_are_told_apart():
    mixture = MixtureSameFamily(Categorical(torch.ones(2)), Independent(Categorical(torch.ones(2, 3, 4)), 1))
    leaves = with_leaves(mixture, mixture)[2]
    assert list(leaves) == ["q.probs", "q.probs (2)", "p.probs", "p.probs (2)"]
    assert leaves["q.probs (2)"].shape == (2, 3, 4)


class UnitNormal(Normal):
    def __init__(self, loc):
        super().__init__(loc, torch.ones_like(loc))


def test_a_class_that_takes_other_arguments_is_refused_with_the_way_out():
    q = UnitNormal(torch.tensor(0.0))
    with pytest.raises(ValueError, match=r"UnitNormal takes more than loc, scale or less; .* requires_grad=True"):
        with_leaves(q, q)


def test_derivatives_are_zero_where_nothing_leads_to_a_leaf():
    a, b = learned(2.0), learned([1.0, 1.0])
    assert [d.tolist() for d in derivatives(a**2, [a, b])] == [4.0, [0.0, 0.0]]
    assert [d.tolist() for d in derivatives((a**2).detach(), [a, b])] == [0.0, [0.0, 0.0]]
