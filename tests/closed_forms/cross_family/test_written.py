"""Pairs of unlike families: accuracy in three regimes, the edges of the supports, members that two families share."""

import itertools
import math

import mpmath as mp
import pytest
import torch
import torch.distributions as dist
from torch.distributions import kl_divergence as torch_kl
from torch.distributions.kl import _KL_REGISTRY

from tests.references.cross import REFERENCES
from tests.references.harness import EVERY, combinations, draw, errors_at, measure
from tests.references.targets import GRADIENT, target
from tests.references.worst_cases import used_by
from torch_klloss import kl_divergence
from torch_klloss.closed_forms.cross_family import FORMULAS
from torch_klloss.closed_forms.cross_family.infinite import INFINITE
from torch_klloss.distributions.supports import contained

CASES = [
    pytest.param(*case, id=f"{case[0].name}-{case[1]}-{str(case[2]).removeprefix('torch.')}")
    for case in combinations(REFERENCES)
]
PAIRS = {reference.name: reference for reference in REFERENCES}
SHARED = ["Exponential‖Gamma", "Gamma‖Exponential", "Beta‖Uniform", "ContinuousBernoulli‖Uniform", "Uniform‖Beta"]


def tensor(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


@pytest.mark.parametrize(("reference", "regime", "dtype"), CASES)
def test_values_and_gradients_have_the_digits_that_were_promised(reference, regime, dtype):
    accuracy = measure(reference, regime, dtype, num_draws=40, every=EVERY)
    allowed = target(reference, dtype)
    assert getattr(accuracy, f"worst_{allowed.unit}") <= allowed.number, accuracy.worst_value_at
    assert accuracy.worst_gradient <= GRADIENT[dtype], accuracy.worst_gradient_at
    assert (accuracy.negatives, accuracy.not_finite) == (0, 0)


@pytest.mark.parametrize("name", SHARED)
def test_the_targets_reject_the_formulas_of_torch_where_families_meet(name):
    q, p = draw(PAIRS[name], "near", torch.float64, 40)
    errors = errors_at(PAIRS[name], q, p, kl=torch_kl, with_gradient=False)
    assert sum(share > 1 for share in used_by(PAIRS[name], errors, q, p, "value")) > 5


LOG_DENSITIES = {
    dist.Beta: lambda x, a, b: (a - 1) * mp.log(x) + (b - 1) * mp.log(1 - x) - mp.log(mp.beta(a, b)),
    dist.ContinuousBernoulli: lambda x, t: t * x - mp.log(mp.expm1(t) / t),
    dist.Exponential: lambda x, rate: mp.log(rate) - rate * x,
    dist.Gamma: lambda x, a, rate: a * mp.log(rate * x) - mp.log(x) - rate * x - mp.loggamma(a),
    dist.Gumbel: lambda x, loc, scale: (loc - x) / scale - mp.exp((loc - x) / scale) - mp.log(scale),
    dist.Laplace: lambda x, loc, scale: -abs(x - loc) / scale - mp.log(2 * scale),
    dist.Normal: lambda x, loc, scale: -(((x - loc) / scale) ** 2) / 2 - mp.log(2 * mp.pi * scale**2) / 2,
    dist.Pareto: lambda x, scale, alpha: mp.log(alpha) + alpha * mp.log(scale / x) - mp.log(x),
    dist.Uniform: lambda x, low, high: -mp.log(high - low),
}
# Parameters in the order of the log-densities' arguments, and where to integrate: what lies beyond is below 1e-20.
AS_Q = {
    dist.Beta: ({"concentration1": 2.5, "concentration0": 1.5}, (0, 0.6, 1)),
    dist.ContinuousBernoulli: ({"logits": 0.75}, (0, 0.5, 1)),
    dist.Exponential: ({"rate": 1.25}, (0, 1, 40)),
    dist.Gamma: ({"concentration": 2.5, "rate": 1.25}, (0, 2, 50)),
    dist.Gumbel: ({"loc": 0.25, "scale": 0.75}, (-5, 0.5, 40)),
    dist.Laplace: ({"loc": -0.25, "scale": 0.75}, (-40, -0.25, 40)),
    dist.Normal: ({"loc": 0.25, "scale": 0.75}, (-10, -0.5, 10)),
    dist.Pareto: ({"scale": 0.5, "alpha": 3.5}, (0.5, 1, mp.inf)),
    dist.Uniform: ({"low": 0.125, "high": 0.875}, (0.125, 0.5, 0.875)),
}
AS_P = {
    dist.Laplace: {"loc": -0.5, "scale": 0.75},
    dist.Pareto: {"scale": 0.0625, "alpha": 3.5},
    dist.Uniform: {"low": -0.5, "high": 1.5},
}


@pytest.mark.parametrize("reference", REFERENCES[1:], ids=lambda reference: reference.name)
def test_the_references_are_the_integrals_that_they_stand_for(reference):
    of_q, of_p = LOG_DENSITIES[reference.type_q], LOG_DENSITIES[reference.type_p]
    q, points = AS_Q[reference.type_q]
    p = AS_P.get(reference.type_p) or AS_Q[reference.type_p][0]

    def integrand(x):
        log_q = of_q(x, *q.values())
        return mp.exp(log_q) * (log_q - of_p(x, *p.values()))

    exact = reference.kl(*({key: mp.mpf(x) for key, x in d.items()} for d in (q, p)))
    assert abs(mp.quad(integrand, points) - exact) < 1e-11


# Members that two families share


def test_a_shared_member_has_no_kl_from_itself():
    for rate in (1e-25, 0.7, 1e25):
        rate, one = tensor(rate, 1.0)
        assert kl_divergence(dist.Exponential(rate), dist.Gamma(one, rate)) == 0
        assert kl_divergence(dist.Gamma(one, rate), dist.Exponential(rate)) == 0
    flat = dist.Uniform(*tensor(0, 1))
    for d in (
        dist.Beta(*tensor(1, 1)),
        dist.ContinuousBernoulli(*tensor(0.5)),
        dist.ContinuousBernoulli(logits=tensor(0)[0]),
    ):
        assert kl_divergence(d, flat) == 0
        assert kl_divergence(flat, d) == 0
        if not isinstance(d, dist.Beta):
            assert kl_divergence(dist.Beta(*tensor(1, 1)), d) == 0


def test_a_gradient_at_the_end_of_the_support_is_finite_where_the_density_is():
    low, high, a, b = (t.requires_grad_() for t in tensor(0, 1, 1, 1))
    for p in (dist.Beta(a, b), dist.Gamma(a, b)):
        gradient = torch.autograd.grad(kl_divergence(dist.Uniform(low, high), p), (low, high, a, b))
        assert all(g.isfinite() for g in gradient)


# Edges


@pytest.mark.parametrize(
    ("q", "p", "expected"),
    [
        (dist.ContinuousBernoulli(*tensor(0.7)), dist.Uniform(*tensor(0, 1)), 0.02938620223212906),
        (dist.Exponential(*tensor(1e-20)), dist.Normal(*tensor(0, 1)), 1e40),
        (dist.Uniform(*tensor(1, 2)), dist.Pareto(*tensor(1e-3, 20)), 143.27155488960648),
        (dist.Bernoulli(*tensor(0)), dist.Poisson(*tensor(2)), 2.0),
        (dist.Bernoulli(*tensor(1)), dist.Poisson(*tensor(2)), 2 - math.log(2)),
        (dist.Bernoulli(logits=tensor(-math.inf)[0]), dist.Poisson(*tensor(2)), 2.0),
        (dist.Bernoulli(logits=tensor(200)[0]), dist.Poisson(*tensor(2)), 2 - math.log(2)),
        (dist.Bernoulli(*tensor(0)), dist.Poisson(*tensor(0)), 0.0),
        (dist.Bernoulli(*tensor(0.3)), dist.Poisson(*tensor(0)), math.inf),
        (
            dist.Normal(*tensor(0, 1e-25)),
            dist.Laplace(*tensor(0, 1)),
            25 * math.log(10) + math.log(2) / 2 - 0.5 - math.log(math.pi) / 2,
        ),
        (dist.Pareto(*tensor(1, 1)), dist.Exponential(*tensor(1)), math.inf),
        (dist.Pareto(*tensor(1, 1)), dist.Gamma(*tensor(2, 1)), math.inf),
        (dist.Pareto(*tensor(1, 2)), dist.Normal(*tensor(0, 1)), math.inf),
        (dist.Uniform(*tensor(-1, 1)), dist.Exponential(*tensor(1)), math.inf),
        (dist.Uniform(*tensor(-1, 1)), dist.Gamma(*tensor(2, 1)), math.inf),
        (dist.Uniform(*tensor(0.5, 1.5)), dist.Beta(*tensor(2, 1)), math.inf),
        (dist.Uniform(*tensor(-0.5, 0.5)), dist.ContinuousBernoulli(*tensor(0.3)), math.inf),
        (dist.Uniform(*tensor(1, 2)), dist.Pareto(*tensor(1.5, 2)), math.inf),
        (dist.Beta(*tensor(2, 2)), dist.Uniform(*tensor(0.5, 2)), math.inf),
        (dist.ContinuousBernoulli(*tensor(0.3)), dist.Uniform(*tensor(0, 0.5)), math.inf),
    ],
    ids=lambda value: type(value).__name__,
)
def test_edges(q, p, expected):
    torch.testing.assert_close(kl_divergence(q, p).item(), expected, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("logit", [-200.0, -30.0, 1e-9, 30.0, 200.0])
def test_far_logits_are_used_as_given(logit):
    loc, scale, t = tensor(0.5, 1.0, logit)
    t.requires_grad_()
    value = kl_divergence(dist.ContinuousBernoulli(logits=t), dist.Normal(loc, scale))
    mirrored = kl_divergence(dist.ContinuousBernoulli(logits=-t), dist.Normal(loc, scale))
    torch.testing.assert_close(value, mirrored, rtol=1e-14, atol=0.0)
    assert torch.autograd.grad(value, t)[0].isfinite()


def test_an_infinite_element_leaves_the_gradient_of_its_neighbour_alone():
    rate = torch.tensor(1.5, requires_grad=True)
    q = dist.Uniform(torch.tensor([-1.0, 0.5]), torch.tensor([1.0, 1.0]))
    value = kl_divergence(q, dist.Exponential(rate))
    assert value.isinf().tolist() == [True, False]
    together = torch.autograd.grad(value.sum(), rate)[0]
    alone = torch.autograd.grad(kl_divergence(dist.Uniform(0.5, 1.0), dist.Exponential(rate)), rate)[0]
    assert together == alone


# Infinite pairs


def test_the_table_of_infinite_pairs_agrees_with_that_of_torch():
    ours = {pair for types in INFINITE for pair in itertools.product(*types)}
    theirs = {types for types, rule in _KL_REGISTRY.items() if rule.__name__.endswith("infinity")}
    assert theirs - ours == {(dist.Poisson, dist.Bernoulli), (dist.Poisson, dist.Binomial)}
    assert ours & _KL_REGISTRY.keys() <= theirs
    assert ours.isdisjoint(FORMULAS)


def test_p_of_an_infinite_pair_of_torch_never_has_the_support_of_q():
    by_type = {cls: cls(*(torch.tensor(x) for x in values)) for cls, values in WIDEST.items()}
    pairs = {pair for types in INFINITE for pair in itertools.product(*types) if by_type.keys() >= set(pair)}
    assert len(pairs) == 31
    for type_q, type_p in pairs:
        assert not contained(by_type[type_q], by_type[type_p]), (type_q, type_p)
        assert kl_divergence(by_type[type_q], by_type[type_p]) == math.inf


# Supports that contain as much as they can
WIDEST = {
    dist.Beta: (1.0, 1.0),
    dist.ContinuousBernoulli: (0.5,),
    dist.Exponential: (1.0,),
    dist.Gamma: (1.0, 1.0),
    dist.Gumbel: (0.0, 1.0),
    dist.Laplace: (0.0, 1.0),
    dist.Normal: (0.0, 1.0),
    dist.Pareto: (1e-38, 1.0),
    dist.Uniform: (-1e38, 1e38),
}


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (dist.Bernoulli(torch.tensor(0.25)), -math.log(0.75)),
        (dist.Bernoulli(logits=torch.tensor(200.0)), 200.0),
        (dist.Bernoulli(torch.tensor(1.0)), math.inf),
        (dist.Binomial(3, torch.tensor(0.25)), -3 * math.log(0.75)),
        (dist.Binomial(3, logits=torch.tensor(-200.0)), 3 * math.exp(-200.0)),
        (dist.Binomial(0, torch.tensor(1.0)), 0.0),
        (dist.Binomial(3, torch.tensor(1.0)), math.inf),
    ],
    ids=repr,
)
def test_a_poisson_of_rate_zero_is_the_point_zero(p, expected):
    value = kl_divergence(dist.Poisson(torch.tensor([0.0, 1e-30])), p)
    torch.testing.assert_close(value, torch.tensor([expected, math.inf]))
    assert torch_kl(dist.Poisson(torch.tensor(0.0)), p) == math.inf
