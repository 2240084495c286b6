"""Log-densities far out, against 40 digits, where torch's own have lost theirs."""

import mpmath as mp
import pytest
import torch
import torch.distributions as dist

from torch_klloss.distributions.densities import log_density


def f64(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def continuous_bernoulli(x):
    t = mp.mpf(40)
    return t * x - mp.log(mp.expm1(t) / t)


def near_even_bernoulli(x):
    t = mp.mpf(0.001)
    return t * x - mp.log(mp.expm1(t) / t)


def generalized_pareto(x):
    return -(1 + 1 / mp.mpf(0.3)) * mp.log1p(mp.mpf(0.3) * x / mp.mpf(1.2)) - mp.log(mp.mpf(1.2))


def inverse_gamma(x):
    a, r = mp.mpf(2.5), mp.mpf(1.4)
    return a * mp.log(r) - mp.loggamma(a) - (a + 1) * mp.log(x) - r / x


def kumaraswamy(x):
    a, b = mp.mpf(2.2), mp.mpf(1.7)
    return mp.log(a * b) + (a - 1) * mp.log(x) + (b - 1) * mp.log1p(-(x**a))


def relaxed_bernoulli(x):
    t, logit = mp.mpf(1.3), mp.mpf(0.4)
    gap = logit - t * (mp.log(x) - mp.log1p(-x))
    return mp.log(t) + gap - 2 * mp.log1p(mp.exp(gap)) - mp.log(x) - mp.log1p(-x)


def von_mises(x):
    return mp.mpf(3) * mp.cos(x - 1) - mp.log(2 * mp.pi * mp.besseli(0, 3))


def weibull(x):
    k, s = mp.mpf(0.6), mp.mpf(1.3)
    return mp.log(k / s) + (k - 1) * mp.log(x / s) - (x / s) ** k


CASES = [
    (dist.ContinuousBernoulli(logits=f64(40.0)), continuous_bernoulli, (1e-20, 0.5, 1 - 1e-9)),
    (dist.ContinuousBernoulli(logits=f64(0.001)), near_even_bernoulli, (1e-20, 0.5, 1 - 1e-9)),
    (dist.GeneralizedPareto(f64(0.0), f64(1.2), f64(0.3)), generalized_pareto, (1e-200, 1.0, 1e150)),
    (dist.InverseGamma(f64(2.5), f64(1.4)), inverse_gamma, (1e-200, 1.0, 1e150)),
    (dist.Kumaraswamy(f64(2.2), f64(1.7)), kumaraswamy, (1e-200, 0.5, 1 - 1e-12)),
    (dist.RelaxedBernoulli(f64(1.3), logits=f64(0.4)), relaxed_bernoulli, (1e-200, 0.5, 1 - 1e-12)),
    (dist.VonMises(f64(1.0), f64(3.0)), von_mises, (-3.0, 0.0, 2.5)),
    (dist.Weibull(f64(1.3), f64(0.6)), weibull, (1e-200, 1.0, 1e150)),
]


@pytest.mark.parametrize(("d", "formula", "points"), CASES, ids=lambda c: type(c).__name__)
def test_the_log_density_has_its_digits_everywhere(d, formula, points):
    x = torch.tensor(points, dtype=torch.float64)
    actual = log_density(d, x, True)
    with mp.workdps(40):
        expected = [float(formula(mp.mpf(point))) for point in points]
    # At 1 - 1e-12 the point itself has four digits of its distance from 1, and the reference is at that same point.
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=1e-13)


def test_other_families_keep_their_own():
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    normal = dist.Normal(f64(0.0), f64(1.0))
    torch.testing.assert_close(log_density(normal, x, True), normal.log_prob(x), rtol=0, atol=0)
    assert log_density(dist.HalfNormal(f64(1.0)), f64(-1.0), None) == -torch.inf
