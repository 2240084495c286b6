"""Coordinates of a support: invertible, with the right slope, and with gradients to the ends."""

import pytest
import torch
from torch import Tensor

from torch_klloss.methods.quadrature.coordinates import HalfLine, Interval, Line, Mixed, Segment, Shifted, coordinate


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


COORDINATES = {
    "line": Line(f64(1.0), f64(0.3)),
    "half line": Shifted(HalfLine(f64(0.0), 1), f64(-1.0), f64(0.7)),
    "lower half line": Shifted(HalfLine(f64(2.0), -1), f64(0.0), f64(1.3)),
    "interval": Shifted(Interval(f64(-1.0), f64(3.0)), f64(0.4), f64(0.8)),
    "segment": Segment(f64(-3.0), f64(3.0), f64(0.5)),
    "shifted": Shifted(Line(f64(1.0), f64(0.3)), f64(2.0), f64(0.1)),
}


@pytest.mark.parametrize("name", COORDINATES)
def test_the_slope_is_that_of_the_map_and_the_inverse_leads_back(name):
    place = COORDINATES[name]
    v = torch.linspace(-2, 2, 9, dtype=torch.float64).unsqueeze(1).requires_grad_()
    x, log_slope = place.points(v)
    (slope,) = torch.autograd.grad(x.sum(), v)
    torch.testing.assert_close(log_slope.exp(), slope.abs(), rtol=1e-12, atol=0)
    torch.testing.assert_close(place.inverse(x), v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["half line", "lower half line", "interval"])
def test_no_point_within_the_limits_rounds_onto_an_end(name):
    place = COORDINATES[name]
    v = torch.stack(place.limits())
    x, log_slope = place.points(v)
    assert log_slope.isfinite().all()
    ends = [getattr(place.inner, key) for key in ("end", "lower", "upper") if hasattr(place.inner, key)]
    assert ends
    assert all((x != end).all() for end in ends)


def test_points_move_with_the_ends():
    lower = f64(1.0).requires_grad_()
    x, log_slope = Interval(lower, f64(3.0)).points(f64(-30.0, 0.0, 30.0).unsqueeze(1))
    (moves,) = torch.autograd.grad(x.sum(), lower, retain_graph=True)
    assert moves.item() == pytest.approx(1.5)  # all of it at the lower end, half in the middle, none at the upper
    (shrinks,) = torch.autograd.grad(log_slope[1].sum(), lower)
    assert shrinks.item() == pytest.approx(-0.5)  # of log(3 - lower)


def test_integrals_over_unlike_supports_share_a_coordinate():
    inf = torch.inf
    lower, upper = f64(0.0, 0.0, -inf, -inf), f64(1.0, inf, 0.0, inf)
    place = coordinate(lower, upper, f64(0.5, 1.0, -1.0, 0.0), f64(0.2, 1.0, 1.0, 1.0))
    assert isinstance(place, Mixed)
    x, log_slope = place.points(torch.linspace(-5, 5, 7, dtype=torch.float64).unsqueeze(1))
    assert ((x > lower) & (x < upper)).all()
    assert log_slope.isfinite().all()
