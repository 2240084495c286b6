"""The integral beyond the outermost nodes."""

import math

import mpmath
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, StudentT

from torch_klloss.methods.quadrature.integrand import integrand
from torch_klloss.methods.quadrature.remainder import _bend, _bent, remainder

NONE = torch.zeros(1, dtype=torch.float64)


def at_end(f, end: float) -> Tensor:
    return f(end + torch.arange(-4, 1, dtype=torch.float64)).unsqueeze(1)


@pytest.mark.parametrize("k", [0.02, 0.3, 2.0])
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_a_polynomial_times_an_exponential_is_integrated_exactly(k, degree):
    end = 10.0
    rest, error = remainder(at_end(lambda v: (-k * v).exp(), end), at_end(lambda v: v**degree, end), NONE)
    # ∫ v^n exp(-k v) dv from the end on: exp(-k end) Σ n!/(n-j)! end^(n-j) / k^(j+1)
    truth = math.exp(-k * end) * sum(
        math.factorial(degree) / math.factorial(degree - j) * end ** (degree - j) / k ** (j + 1)
        for j in range(degree + 1)
    )
    assert rest.item() == pytest.approx(truth, rel=1e-9)
    assert abs(rest.item() - truth) <= error.item() + 1e-12 * truth


def test_an_exponential_factor_is_followed_too():
    rest, error = remainder(at_end(lambda v: (-2.2 * v).exp(), 20.0), at_end(lambda v: (2 * v).exp(), 20.0), NONE)
    assert rest.item() == pytest.approx(math.exp(-0.2 * 20) / 0.2, rel=1e-9)
    assert error < 1e-9


def test_what_does_not_fall_has_no_known_remainder():
    _, error = remainder(at_end(torch.ones_like, 5.0), at_end(torch.ones_like, 5.0), NONE)
    assert error == math.inf
    rest, error = remainder(at_end(torch.zeros_like, 5.0), at_end(torch.ones_like, 5.0), NONE)
    assert (rest.item(), error.item()) == (0.0, 0.0)


def test_rounding_of_the_points_counts():
    terms = at_end(lambda v: (-0.3 * v).exp(), 10.0), at_end(lambda v: v, 10.0)
    _, clean = remainder(*terms, NONE)
    _, noisy = remainder(*terms, NONE + 1e-6)
    assert noisy > 100 * clean


@pytest.mark.parametrize("middle", torch.linspace(15.0, 30.0, 31).tolist())
def test_a_bend_shows_wherever_it_lies(middle):
    """The slope of the factor goes from one value to another around the end; some derivative is always near zero."""
    k, width = 0.42, 3.5

    def factor(v):
        return 2 * width * torch.nn.functional.softplus((v - middle) / width) - v

    rest, error = remainder(at_end(lambda v: (-k * v).exp(), 22.0), at_end(factor, 22.0), NONE)
    v = torch.linspace(22.0, 200.0, 200_001, dtype=torch.float64)
    truth = torch.trapezoid((-k * v).exp() * factor(v), v)
    assert abs(rest.item() - truth) <= error.item()


@pytest.mark.parametrize(("k", "bend"), [(1.0, 0.3), (2.0, 1.9), (0.5, 1e-6), (1.0, 0.0)])
def test_what_another_component_adds_is_the_integral_of_a_slope_that_rises(k, bend):
    mass = at_end(lambda v: (-k * v).exp(), 0.0)  # 1 at the last point
    plain, near, nothing, again = _bent(mass, NONE, torch.full_like(NONE, bend))
    # what log(q/p) = bend·v beyond the end adds to ∫ m log(q/p) and to ∫ m (p/q - 1)
    assert plain.item() == pytest.approx(float(mpmath.quad(lambda v: mpmath.exp(-k * v) * bend * v, [0, mpmath.inf])))
    rising = mpmath.quad(lambda v: mpmath.exp(-k * v) * mpmath.expm1(bend * v), [0, mpmath.inf])
    assert near.item() == again.item() == pytest.approx(float(rising))
    assert nothing.item() == 0


def test_a_slope_that_rises_faster_than_the_mass_falls_leaves_no_bound():
    mass = at_end(lambda v: (-v).exp(), 0.0)
    _, near, _, _ = _bent(mass, NONE, torch.full_like(NONE, 1.5))
    assert near.item() == math.inf


def test_the_slope_of_a_mixture_can_rise_to_that_of_its_heaviest_tail():
    freedom = torch.tensor([8.0, 2.0], dtype=torch.float64)
    weights = torch.tensor([1.0, 1e-6], dtype=torch.float64)
    q = MixtureSameFamily(Categorical(weights), StudentT(freedom))
    f = integrand(q, StudentT(torch.tensor(3.0, dtype=torch.float64)), True, torch.Size())
    near, far = (torch.tensor([v, v + 1], dtype=torch.float64).exp().unsqueeze(-1) for v in (1.0, 30.0))
    slope = lambda d, x: (d.log_prob(x[1]) - d.log_prob(x[0])).item()
    heaviest = StudentT(freedom[1])
    assert _bend(f, q, near).item() == pytest.approx(slope(heaviest, near) - slope(q, near))
    assert _bend(f, q, near).item() > 2
    assert _bend(f, q, far).item() == pytest.approx(0.0, abs=1e-6)
    assert _bend(f, f.p, near).item() == 0
