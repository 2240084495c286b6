"""The class that torch has a recipe for."""

import math

import pytest
import torch
from torch.distributions import AffineTransform, SigmoidTransform, TransformedDistribution, Uniform

from tests.closed_forms.checks import t64
from torch_klloss.distributions.logistic import Logistic

LOC, SCALE = t64(-1.0, 0.5), t64(0.3, 2.0)


def recipe():
    return TransformedDistribution(Uniform(t64(0.0), t64(1.0)), [SigmoidTransform().inv, AffineTransform(LOC, SCALE)])


def test_the_density_is_that_of_the_recipe_and_goes_on_where_that_ends():
    x = torch.linspace(-5, 5, 11, dtype=torch.float64).unsqueeze(-1)
    torch.testing.assert_close(Logistic(LOC, SCALE).log_prob(x), recipe().log_prob(x))
    far = Logistic(t64(0.0), t64(1.0)).log_prob(t64(-1e3, 1e3))
    torch.testing.assert_close(far, t64(-1e3, -1e3))


def test_quantiles_undo_probabilities_and_moments_are_those_of_draws():
    d = Logistic(LOC, SCALE)
    u = t64(0.01, 0.5, 0.99).unsqueeze(-1)
    torch.testing.assert_close(d.cdf(d.icdf(u)), u.expand(3, 2))
    torch.manual_seed(0)
    x, n = d.rsample((100_000,)), 100_000
    assert ((x.mean(0) - d.mean).abs() < 5 * (d.variance / n).sqrt()).all()
    kurtosis = 4.2
    assert ((x.var(0) / d.variance - 1).abs() < 5 * math.sqrt((kurtosis - 1) / n)).all()


def test_draws_carry_the_gradient_and_expansion_keeps_the_parameters():
    loc, scale = LOC.clone().requires_grad_(), SCALE.clone().requires_grad_()
    d = Logistic(loc, scale).expand((3, 2))
    assert d.batch_shape == (3, 2)
    d.rsample().sum().backward()
    assert loc.grad.tolist() == [3.0, 3.0]
    assert scale.grad.isfinite().all()


def test_a_scale_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="scale"):
        Logistic(0.0, -1.0)
    with pytest.raises(ValueError, match="support"):
        Logistic(0.0, 1.0).log_prob(torch.tensor(torch.nan))
