"""The references of the laws are right where the KL is known, and say so where they are not."""

import math

import pytest
import torch
from torch.distributions import Beta, Cauchy, Distribution, Exponential, Laplace, Normal, Poisson, Uniform

from tests.expectations import Ends, integrate, log_density, sum_over


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def of(family: type[Distribution], *parameters: float) -> Distribution:
    return family(*map(scalar, parameters), validate_args=False)


LINE = (-math.inf, scalar(0.5), scalar(2.0), math.inf)
KNOWN = {
    "normal": (of(Normal, 0.5, 0.3), of(Normal, 2.0, 1.5), LINE, math.log(5) + (0.09 + 2.25) / 4.5 - 0.5),
    "laplace": (of(Laplace, 0.5, 1.0), of(Laplace, 2.0, 1.0), LINE, 1.5 + math.exp(-1.5) - 1),
    "cauchy": (of(Cauchy, 0.5, 1.0), of(Cauchy, 2.0, 1.0), LINE, math.log(1 + 1.5**2 / 4)),
    "exponential": (of(Exponential, 2.0), of(Exponential, 3.0), (0.0, math.inf), 1.5 - 1 - math.log(1.5)),
    "beta": (of(Beta, 2.0, 1.0), of(Beta, 1.0, 1.0), (0.0, 1.0), math.log(2) - 0.5),
    "uniform": (of(Uniform, 0.0, 1.0), of(Uniform, -1.0, 2.0), (scalar(0.0), scalar(1.0)), math.log(3)),
}


@pytest.mark.parametrize(("q", "p", "ends", "known"), KNOWN.values(), ids=KNOWN)
def test_an_integral_is_the_known_kl(q: Distribution, p: Distribution, ends: Ends, known: float):
    reference = integrate(q, p, ends, log_density, log_density)
    assert abs(reference.value - known) <= reference.error + 1e-14
    assert reference.error < 1e-12


def test_a_sum_is_the_known_kl():
    reference = sum_over(of(Poisson, 2.0), of(Poisson, 3.0), torch.arange(100, dtype=torch.float64))
    assert abs(reference.value - (2 * math.log(2 / 3) + 1)) <= reference.error + 1e-14
    short = sum_over(of(Poisson, 2.0), of(Poisson, 3.0), torch.arange(6, dtype=torch.float64))
    assert abs(short.value - reference.value) <= short.error  # the mass that is missing is told
    assert short.error > 1e-3


def test_a_kink_that_is_no_end_is_told():
    q, p = of(Laplace, 0.5, 1.0), of(Laplace, 2.0, 1.0)
    reference = integrate(q, p, (-math.inf, scalar(0.5), math.inf), log_density, log_density)
    assert reference.error > 1e-9


def test_a_tail_that_has_not_ended_is_told():
    q, p = of(Cauchy, 0.0, 1.0), of(Normal, 0.0, 1.0)
    assert integrate(q, p, (-math.inf, scalar(0.0), math.inf), log_density, log_density).error > 1e6


def test_mass_where_p_has_none_is_infinite():
    q, p = of(Normal, 0.0, 1.0), of(Exponential, 1.0)
    assert integrate(q, p, (-math.inf, scalar(0.0), math.inf), log_density, log_density).value == math.inf


def test_the_derivative_by_an_end_counts():
    theta = scalar(2.0).requires_grad_()
    q, p = Uniform(torch.zeros_like(theta), theta, validate_args=False), of(Normal, 0.0, 1.0)
    value = integrate(q, p, (0.0, theta), log_density, log_density).value
    (grad,) = torch.autograd.grad(value, theta)
    torch.testing.assert_close(grad, scalar(-1 / 2 + 2 / 3), rtol=0, atol=1e-12)  # -log θ + θ²/6 + a constant
