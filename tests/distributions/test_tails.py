"""Declared tails: where they make a KL infinite, and what they leave undecided."""

import math

import pytest
import torch
import torch.distributions as dist
from torch import tensor

from torch_klloss.distributions.logistic import Logistic
from torch_klloss.distributions.tails import Tail, declare_tails, is_infinite, is_infinite_by_tails, tails_of

NORMAL = dist.Normal(0.0, 1.0)
ORDERS = tensor([0.5, 1.0, 1.5, 2.0, 2.5, 3.0])
DECIDED = {
    # q, p, and where the KL is infinite: at the order of the moment that diverges, and not above it.
    "StudentT‖Normal": (dist.StudentT(ORDERS), NORMAL, ORDERS <= 2),
    "StudentT‖Laplace": (dist.StudentT(ORDERS), dist.Laplace(0.0, 1.0), ORDERS <= 1),
    "StudentT‖Gumbel": (dist.StudentT(ORDERS), dist.Gumbel(0.0, 1.0), ORDERS > 0),
    "StudentT‖Cauchy": (dist.StudentT(ORDERS), dist.Cauchy(0.0, 1.0), ORDERS < 0),
    "Pareto‖HalfNormal": (dist.Pareto(1.0, ORDERS), dist.HalfNormal(1.0), ORDERS <= 2),
    "Pareto‖Weibull": (dist.Pareto(1.0, 1.5), dist.Weibull(1.0, ORDERS), ORDERS >= 1.5),
    "FisherSnedecor‖Gamma": (dist.FisherSnedecor(3.0, 2 * ORDERS), dist.Gamma(2.0, 1.0), ORDERS <= 1),
    "LogNormal‖Weibull": (dist.LogNormal(0.0, 1.0), dist.Weibull(1.0, ORDERS), ORDERS < 0),
    "Gamma‖InverseGamma": (dist.Gamma(ORDERS, 1.0), dist.InverseGamma(2.0, 1.0), ORDERS <= 1),
    "Weibull‖InverseGamma": (dist.Weibull(1.0, ORDERS), dist.InverseGamma(2.0, 1.0), ORDERS <= 1),
    "LogNormal‖InverseGamma": (dist.LogNormal(0.0, ORDERS), dist.InverseGamma(2.0, 1.0), ORDERS < 0),
    "Laplace‖Gumbel": (dist.Laplace(0.0, ORDERS), dist.Gumbel(0.0, 2.0), ORDERS >= 2),
    "Gumbel‖Gumbel": (dist.Gumbel(0.0, ORDERS), dist.Gumbel(0.0, 1.0), ORDERS < 0),
    "Normal‖Gumbel": (dist.Normal(0.0, ORDERS), dist.Gumbel(0.0, 1.0), ORDERS < 0),
    "Gumbel‖Normal": (dist.Gumbel(0.0, ORDERS), NORMAL, ORDERS < 0),
    "GeneralizedPareto‖HalfNormal": (
        dist.GeneralizedPareto(0.0, 1.0, tensor([-0.5, 0.0, 0.4, 0.5, 0.6])),
        dist.HalfNormal(1.0),
        tensor([False, False, False, True, True]),
    ),
    # by the supports
    "Normal‖Gamma": (NORMAL, dist.Gamma(1.0, 1.0), tensor(True)),
    "Uniform‖Beta": (dist.Uniform(0.0, tensor([0.5, 1.0, 1.5])), dist.Beta(2.0, 2.0), tensor([False, False, True])),
    "VonMises‖Uniform": (
        dist.VonMises(0.0, 1.0),
        dist.Uniform(-4.0, tensor([3.0, 4.0])),
        tensor([True, False]),
    ),
    # an end of q within p's support is no end of p's
    "Uniform‖InverseGamma": (
        dist.Uniform(tensor([0.0, 0.1]), 1.0),
        dist.InverseGamma(2.0, 1.0),
        tensor([True, False]),
    ),
}


@pytest.mark.parametrize("name", DECIDED)
def test_a_kl_is_infinite_from_the_moment_on_that_q_lacks(name):
    q, p, expected = DECIDED[name]
    assert is_infinite(q, p).tolist() == expected.tolist()


def in_float64(d):
    return type(d)(**{key: getattr(d, key).double() for key in d.arg_constraints})


@pytest.mark.parametrize("name", ["StudentT‖Normal", "Pareto‖HalfNormal", "Gamma‖InverseGamma"])
def test_the_integral_grows_without_bound_exactly_where_the_tails_say_so(name):
    """What lies at the far end of twelve more decades is as much as at their beginning, or less."""
    q, p, infinite = DECIDED[name]
    q, p = in_float64(q), in_float64(p)
    decades = tensor([8.0, 20.0], dtype=torch.float64).unsqueeze(-1)
    x = 10.0 ** (-decades if name == "Gamma‖InverseGamma" else decades)
    near, far = -q.log_prob(x).exp() * p.log_prob(x) * x
    assert ((far >= 0.99 * near) == infinite).all()


def test_a_nan_is_not_called_infinite():
    q = dist.Pareto(1.0, tensor([math.nan, 1.0]), validate_args=False)
    assert is_infinite(q, NORMAL).tolist() == [False, True]


def test_batch_shapes_broadcast():
    assert is_infinite(dist.StudentT(ORDERS), dist.Normal(torch.zeros(2, 1), 1.0)).shape == (2, 6)
    assert is_infinite(NORMAL, dist.Normal(torch.zeros(3), 1.0)).tolist() == [False] * 3


def test_one_infinite_component_makes_the_joint_infinite():
    q = dist.Independent(dist.StudentT(tensor([[3.0, 3.0], [3.0, 2.0]])), 1)
    p = dist.Independent(dist.Normal(torch.zeros(2), 1.0), 1)
    assert is_infinite(q, p).tolist() == [False, True]


def test_an_affine_map_turns_and_stretches_the_tails():
    gumbel = dist.TransformedDistribution(dist.Gumbel(0.0, 1.0), [dist.AffineTransform(1.0, tensor([2.0, -2.0]))])
    assert is_infinite(dist.Laplace(0.0, tensor([1.5, 1.5])), gumbel).tolist() == [False, False]
    assert is_infinite(dist.Laplace(0.0, tensor([2.5, 2.5])), gumbel).tolist() == [True, True]
    falling = is_infinite(gumbel, dist.TransformedDistribution(dist.Gumbel(0.0, 1.0), [dist.AffineTransform(0.0, 1.0)]))
    assert falling.tolist() == [False, True]  # turned around, its exponential tail meets the double exponential one


def test_a_mixture_has_the_tails_of_its_heaviest_component():
    def mixture(df):
        return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.StudentT(tensor(df)))

    assert is_infinite(mixture([3.0, 1.5]), NORMAL)
    assert not is_infinite(mixture([3.0, 2.5]), NORMAL)
    normals = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), 1.0))
    assert is_infinite(dist.Cauchy(0.0, 1.0), normals)
    assert not is_infinite(normals, mixture([3.0, 1.5]))


@pytest.mark.parametrize(
    "q",
    [
        dist.Poisson(1.0),
        dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
        dist.TransformedDistribution(
            dist.Normal(0.0, 1.0), [dist.CumulativeDistributionTransform(dist.Normal(1.0, 1.0))]
        ),
    ],
    ids=["counts", "several dimensions", "an unknown transform"],
)
def test_what_is_not_declared_is_not_decided(q):
    assert is_infinite(q, q) is None


def test_a_subclass_with_a_density_of_its_own_declares_its_own_tails():
    class Light(dist.StudentT):
        def log_prob(self, value):
            return -value.square()

    q = Light(tensor(1.0))
    assert tails_of(q) is None
    assert is_infinite(q, NORMAL) is None
    declare_tails(Light, lambda d: (Tail(growth=2.0), Tail(growth=2.0)))
    assert not is_infinite(q, NORMAL)


VARIANCES = [
    (dist.Normal(0.0, 1.0), dist.StudentT(1.0), False),
    (dist.Cauchy(0.0, 1.0), dist.StudentT(1.0), False),
    (dist.StudentT(2.0), dist.Laplace(0.0, 1.0), True),  # the variance of |x|
    (dist.StudentT(2.1), dist.Laplace(0.0, 1.0), False),
    (dist.Laplace(0.0, 1.0), dist.Gumbel(0.0, 1.5), True),  # of exp(-x/1.5), which has a mean
    (dist.Laplace(0.0, 1.0), dist.Gumbel(0.0, 2.5), False),
]


@pytest.mark.parametrize(("q", "p", "infinite"), VARIANCES)
def test_the_variance_of_a_log_ratio_is_told_from_the_tails(q, p, infinite):
    assert bool(is_infinite(q, p, power=2)) is infinite


def test_the_variance_is_not_known_without_a_common_structure():
    normals = dist.Independent(dist.Normal(torch.zeros(2), 1.0), 1)
    assert is_infinite(normals, normals, power=2) is not None
    assert is_infinite(dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), normals, power=2) is None
    assert not is_infinite(dist.LogNormal(0.0, 1.0), dist.LogNormal(0.0, 1.0), power=2)


LINE = [
    dist.Normal(0.0, 1.0),
    dist.Laplace(0.0, ORDERS),
    dist.StudentT(ORDERS),
    dist.Gumbel(0.0, 1.5),
    Logistic(0.0, ORDERS),
    dist.TransformedDistribution(dist.Gumbel(0.0, 1.5), [dist.AffineTransform(0.0, -1.0)]),
]
MAPS = {
    "exp": [dist.ExpTransform()],
    "sigmoid": [dist.SigmoidTransform()],
    "tanh": [dist.TanhTransform()],
    "softplus": [dist.SoftplusTransform()],
    "falling": [dist.AffineTransform(1.0, -2.0)],
    "power of exp": [dist.ExpTransform(), dist.PowerTransform(tensor(-0.5))],
    "sigmoid in an interval": [dist.SigmoidTransform(), dist.AffineTransform(1.0, 3.0)],
    "there and back": [dist.SigmoidTransform(), dist.SigmoidTransform().inv],
    "composed": [dist.ComposeTransform([dist.ExpTransform(), dist.AffineTransform(0.0, 0.5)]), dist.ExpTransform().inv],
}


@pytest.mark.parametrize("name", MAPS)
def test_a_shared_bijection_leaves_finite_what_is_finite(name):
    """The KL is the same for both, so that the tails of the images must not say otherwise."""
    decided = 0
    for q in LINE:
        for p in LINE:
            images = [dist.TransformedDistribution(d, MAPS[name], validate_args=False) for d in (q, p)]
            tails = [tails_of(image) for image in images]
            if None in tails:
                continue
            found = is_infinite_by_tails(*images, *tails)
            if found is None:
                continue
            decided += 1
            assert found.expand(6).tolist() == is_infinite(q, p).expand(6).tolist(), (q, p)
    assert decided >= 8


@pytest.mark.parametrize("shape", [0.5, 1.0, 1.7])
def test_the_tails_of_an_image_are_those_of_the_family_that_it_is(shape):
    """E^c is a Weibull, log E a reflected Gumbel, exp(E) a Pareto, logit U a Logistic, for E exponential, U uniform."""
    a = tensor(shape)
    same = [
        (dist.TransformedDistribution(dist.Exponential(1.0), [dist.PowerTransform(a)]), dist.Weibull(1.0, 1 / a)),
        (dist.TransformedDistribution(dist.Exponential(a), [dist.ExpTransform()]), dist.Pareto(1.0, a)),
        (dist.TransformedDistribution(dist.Uniform(0.0, 1.0), [dist.SigmoidTransform().inv]), Logistic(0.0, 1.0)),
        (
            dist.RelaxedBernoulli(a, logits=tensor(0.0)),
            dist.TransformedDistribution(Logistic(0.0, 1 / a), [dist.SigmoidTransform()]),
        ),
    ]
    for image, family in same:
        for found, expected in zip(tails_of(image), tails_of(family), strict=True):
            pairs = [(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(found, expected, strict=True)]
            assert all(torch.allclose(x.float(), y.float()) for x, y in pairs), (image, found, expected)
