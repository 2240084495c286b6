"""The two rules: their integrals, and whether their error estimates hold."""

import math

import pytest
import torch
from torch import Tensor

from torch_klloss.methods.quadrature.rules import Panels, Trapezoid


def integral(rule: Panels | Trapezoid, f) -> tuple[float, float]:
    v, weights = rule.nodes()
    terms = rule.split(weights * f(v))
    size = terms.abs().sum(1)
    return float(terms.sum()), float(rule.error(terms, size).sum())


def panels(*edges: float) -> Panels:
    t = torch.tensor(edges, dtype=torch.float64).unsqueeze(1)
    return Panels(torch.stack([t[:-1], t[1:]]))


def trapezoid(low: float, high: float, bend: float = 1e5, n: int = 64) -> Trapezoid:
    ends = torch.tensor([[low], [high]], dtype=torch.float64)
    return Trapezoid((ends / bend).asinh(), torch.tensor([bend], dtype=torch.float64), n)


def gaussian(v: Tensor) -> Tensor:
    return (-v * v / 2).exp()


@pytest.mark.parametrize("rule", [panels(-9, -3, 0, 3, 9), trapezoid(-9, 9), trapezoid(-9, 9, 2.5)])
def test_a_smooth_integrand_is_right_and_has_a_small_error(rule):
    value, error = integral(rule, gaussian)
    assert abs(value - math.sqrt(2 * math.pi)) <= max(error, 1e-15)
    assert error < 1e-2


def test_panels_are_exact_for_polynomials_of_degree_31():
    value, _ = integral(panels(0.0, 1.0), lambda v: v**31)
    assert value == pytest.approx(1 / 32, rel=1e-14)


ROUGH = {
    "kink": lambda at: lambda v: (v - at).abs() * gaussian(v),
    "jump": lambda at: lambda v: (v > at) * gaussian(v),
    "logarithm": lambda at: lambda v: (v - at).abs().clamp_min(1e-300).log() * gaussian(v),
    "faint logarithm": lambda at: lambda v: (1 + 1e-4 * (v - at).abs().clamp_min(1e-300).log()) * gaussian(v),
    "narrow": lambda at: lambda v: gaussian(v) / (1 + ((v - at) / 0.05) ** 2),
}


@pytest.mark.parametrize("name", ROUGH)
@pytest.mark.parametrize("rule", [panels(-9, -3, 0.5, 3, 9), trapezoid(-9, 9), trapezoid(-12, 12, 2.5)])
def test_an_integrand_that_is_not_resolved_has_a_large_error(rule, name):
    """The error must hold wherever the rough point lies between the nodes, even if a difference vanishes."""
    for at in torch.linspace(-1, 1, 101, dtype=torch.float64):
        f = ROUGH[name](at)
        value, error = integral(rule, f)
        fine = sorted(
            {
                *torch.linspace(-12, 12, 25).tolist(),
                *(float(at) + s * 10.0**-k for k in range(9) for s in (-1, 1)),
                float(at),
            }
        )
        truth, _ = integral(panels(*fine), f)
        assert abs(value - truth) <= error + 1e-9 or error > 0.1 * abs(value)


def test_an_integrand_with_less_than_rounding_is_no_error():
    value, error = integral(panels(0.0, 1.0), torch.zeros_like)
    assert (value, error) == (0.0, 0.0)
