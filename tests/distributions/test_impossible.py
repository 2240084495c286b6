"""Outcomes of probability zero under p, which a few draws of q may never show."""

import math

import pytest
import torch
import torch.distributions as dist
from torch.distributions import Independent

from torch_klloss.methods import MonteCarlo


def t(*values):
    return torch.tensor(values[0] if len(values) == 1 else values)


RARE, NEVER = t(0.9999, 0.0001), t(1.0, 0.0)
TWO = t(0.5, 0.5)

INFINITE = {
    "multinomial": (dist.Multinomial(3, RARE), dist.Multinomial(3, NEVER)),
    "multinomial_common": (dist.Multinomial(3, TWO), dist.Multinomial(3, NEVER)),
    "categorical": (dist.Categorical(RARE), dist.Categorical(NEVER)),
    "categorical_logits": (dist.Categorical(logits=t(0.0, -9.0)), dist.Categorical(logits=t(0.0, -math.inf))),
    "one_hot": (dist.OneHotCategorical(RARE), dist.OneHotCategorical(NEVER)),
    "straight_through": (dist.OneHotCategoricalStraightThrough(RARE), dist.OneHotCategorical(NEVER)),
    "binomial": (dist.Binomial(3, t(0.9999)), dist.Binomial(3, t(1.0))),
    "binomial_zero": (dist.Binomial(3, t(0.0001)), dist.Binomial(3, t(0.0))),
    "bernoulli_logits": (dist.Bernoulli(logits=t(-9.0)), dist.Bernoulli(logits=t(-math.inf))),
    "poisson": (dist.Poisson(t(0.0001)), dist.Poisson(t(0.0))),
    "geometric": (dist.Geometric(t(0.9999)), dist.Geometric(t(1.0))),
    "negative_binomial": (dist.NegativeBinomial(3.0, t(0.0001)), dist.NegativeBinomial(3.0, t(0.0))),
    "independent": (
        Independent(dist.Bernoulli(t(0.0001, 0.5)), 1),
        Independent(dist.Bernoulli(t(0.0, 0.5)), 1),
    ),
    "independent_classes": (
        Independent(dist.Categorical(torch.stack([RARE, TWO])), 1),
        Independent(dist.Categorical(torch.stack([NEVER, TWO])), 1),
    ),
    "mixture": (
        dist.MixtureSameFamily(dist.Categorical(TWO), dist.Categorical(torch.stack([NEVER, RARE]))),
        dist.Categorical(NEVER),
    ),
}
FINITE = {
    "multinomial": (dist.Multinomial(3, NEVER), dist.Multinomial(3, TWO), 3 * math.log(2)),
    "categorical": (dist.Categorical(NEVER), dist.Categorical(NEVER), 0.0),
    "logits_that_round_to_0": (
        dist.Categorical(logits=t(0.0, -200.0)),
        dist.Categorical(logits=t(0.0, -300.0)),
        0.0,
    ),
    "bernoulli": (dist.Bernoulli(t(1.0)), dist.Bernoulli(t(0.5)), math.log(2)),
    "poisson": (dist.Poisson(t(0.0)), dist.Poisson(t(0.5)), 0.5),
    "unused_component": (
        dist.MixtureSameFamily(dist.Categorical(NEVER), dist.Categorical(torch.stack([NEVER, TWO]))),
        dist.Categorical(NEVER),
        0.0,
    ),
}


@pytest.mark.parametrize("gradient", ["score_function", "none"])
@pytest.mark.parametrize("num_samples", [1, 16])
@pytest.mark.parametrize("name", INFINITE)
def test_a_sampled_kl_is_infinite_where_p_lacks_an_outcome_of_q(name, num_samples, gradient):
    torch.manual_seed(0)
    assert MonteCarlo(num_samples, gradient=gradient).estimate(*INFINITE[name]).value == math.inf


@pytest.mark.parametrize("name", FINITE)
def test_a_sampled_kl_is_finite_where_only_q_lacks_an_outcome(name):
    q, p, expected = FINITE[name]
    torch.manual_seed(0)
    assert MonteCarlo(4).estimate(q, p).value.item() == pytest.approx(expected, abs=1e-6)


def test_only_the_elements_that_lack_an_outcome_are_infinite():
    q, p = dist.Multinomial(3, torch.stack([RARE, TWO])), dist.Multinomial(3, torch.stack([NEVER, TWO]))
    assert MonteCarlo(4).estimate(q, p).value.isinf().tolist() == [True, False]
