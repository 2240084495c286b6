"""Is the family that a transform is said to lead to the one that it leads to?"""

import pytest
import torch
import torch.distributions as dist
from torch.distributions import AffineTransform, ExpTransform, PowerTransform, SigmoidTransform, TransformedDistribution

from tests.closed_forms.checks import t64
from torch_klloss.distributions.logistic import Logistic
from torch_klloss.distributions.pushforward import image, is_a, split

A, B, C = t64(0.7), t64(1.3), t64(2.5)
VECTOR, ROW = t64(0.5, -1.0, 2.0), t64(-2.0, 0.5, 3.0)
SHIFTED, FLIPPED, SCALED = AffineTransform(A, B), AffineTransform(A, -B), AffineTransform(0.0, B)

IMAGES = [
    *((d, t) for d in (dist.Normal(A, B), dist.Laplace(A, B), dist.Cauchy(A, B)) for t in (SHIFTED, FLIPPED)),
    *((d, t) for d in (dist.StudentT(C, A, B), Logistic(A, B), dist.Uniform(A, C)) for t in (SHIFTED, FLIPPED)),
    (dist.Gumbel(A, B), SHIFTED),
    *(
        (d, AffineTransform(VECTOR, ROW))
        for d in (
            dist.MultivariateNormal(VECTOR, torch.eye(3, dtype=torch.float64) + 0.5),
            dist.LowRankMultivariateNormal(VECTOR, VECTOR.unsqueeze(-1), VECTOR.square()),
        )
    ),
    *(
        (d, SCALED)
        for d in (
            dist.Exponential(B),
            dist.Gamma(C, B),
            dist.Chi2(C),
            dist.HalfCauchy(B),
            dist.HalfNormal(B),
            dist.InverseGamma(C, B),
            dist.LogNormal(A, B),
            dist.Pareto(B, C),
            dist.Weibull(B, C),
        )
    ),
    (dist.Beta(B, C), AffineTransform(1.0, -1.0)),
    (dist.Normal(A, B), ExpTransform()),
    (dist.Exponential(B), ExpTransform()),
    (dist.LogNormal(A, B), ExpTransform().inv),
    (dist.LogNormal(A, B), PowerTransform(t64(-2.0))),
    (dist.Exponential(B), PowerTransform(t64(0.4))),
    (dist.Weibull(B, C), PowerTransform(t64(3.0))),
    (dist.Gamma(C, B), PowerTransform(t64(-1.0))),
    (dist.InverseGamma(C, B), PowerTransform(t64(-1.0))),
    (dist.Uniform(t64(0.0), t64(1.0)), SigmoidTransform().inv),
]
each_image = pytest.mark.parametrize(
    ("d", "t"), IMAGES, ids=lambda part: type(getattr(part, "_inv", None) or part).__name__
)


def points(d):
    torch.manual_seed(0)
    return d.sample((20,))


@each_image
def test_the_image_has_the_density_of_what_is_transformed(d, t):
    found, given = image(t, d), TransformedDistribution(d, [t])
    assert type(found) is not TransformedDistribution
    y = t(points(d))
    torch.testing.assert_close(found.log_prob(y), given.log_prob(y), rtol=1e-10, atol=1e-10)


@each_image
def test_what_is_mapped_back_is_what_it_was(d, t):
    found = image(t.inv, image(t, d))
    if found is not None:  # the exponential of an Exponential is a Pareto, of which few have a logarithm with a name
        x = points(d)
        torch.testing.assert_close(found.log_prob(x), d.log_prob(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("d", "t"),
    [
        (dist.Gumbel(A, B), FLIPPED),
        (dist.Gamma(C, B), SHIFTED),
        (dist.Gamma(C, B), AffineTransform(0.0, -B)),
        (dist.Gamma(C, B), AffineTransform(0.0, t64(1.0, -1.0))),
        (dist.Gamma(C, B), AffineTransform(t64(0.0, requires_grad=True), B)),  # whose gradient would be lost
        (dist.Gamma(C, B), PowerTransform(t64(-1.0, requires_grad=True))),
        (dist.Weibull(B, C), PowerTransform(t64(-1.0))),
        (dist.Uniform(A, C), SigmoidTransform().inv),
        (dist.Beta(B, C), AffineTransform(1.0, -2.0)),
        (dist.Normal(A, B), SigmoidTransform()),
        (dist.VonMises(A, B), SHIFTED),
    ],
)
def test_what_leads_to_no_family_has_no_image(d, t):
    assert image(t, d) is None


def test_a_family_whose_density_was_overridden_has_no_image():
    class Mine(dist.Normal):
        def log_prob(self, value):
            return super().log_prob(value) * 2

    class Inherits(dist.Normal):
        pass

    assert image(SHIFTED, Mine(A, B)) is None
    assert is_a(Inherits(A, B), dist.Normal)
    assert type(image(SHIFTED, Inherits(A, B))) is dist.Normal


def test_an_image_carries_the_gradient_of_the_transform():
    loc, scale = t64(0.7, requires_grad=True), t64(-1.3, requires_grad=True)
    y = t64(0.2)
    t = AffineTransform(loc, scale)
    found = image(t, dist.Laplace(A, B)).log_prob(y)
    given = TransformedDistribution(dist.Laplace(A, B), [t]).log_prob(y)
    for a, b in zip(*(torch.autograd.grad(value, (loc, scale)) for value in (found, given)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("t", [SHIFTED, FLIPPED], ids=["shifted", "flipped"])
@pytest.mark.parametrize("d", [dist.Gamma(C, B), dist.Gumbel(A, B)], ids=["gamma", "gumbel"])
def test_a_shift_or_a_reflection_is_split_from_the_scale(d, t):
    found = split(t, d)
    y = t(points(d))
    torch.testing.assert_close(found.log_prob(y), TransformedDistribution(d, [t]).log_prob(y), rtol=1e-10, atol=1e-10)
    assert abs(found.transforms[0].scale) == 1.0
    assert split(found.transforms[0], found.base_dist) is None
