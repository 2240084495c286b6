"""The building blocks of the closed forms, where their pieces meet."""

import pytest
import torch

from torch_klloss.numerics.elementary import gkl, x_minus_log1p
from torch_klloss.numerics.exponentials import e2


def around(*points):
    """Return each point with the eight numbers on either side of it, which round differently in each operation."""
    x = torch.tensor(points, dtype=torch.float64)
    found = [x]
    for direction in (-torch.inf, torch.inf):
        y = x
        for _ in range(8):
            y = torch.nextafter(y, torch.tensor(direction, dtype=torch.float64))
            found.append(y)
    return torch.cat(found).requires_grad_()


@pytest.mark.parametrize(
    ("function", "slope", "points"),
    [
        (x_minus_log1p, lambda x: x / (1 + x), (-0.5, 1.0)),
        (e2, torch.expm1, (-1.0, 1.0)),
        (lambda x: gkl(x, x.new_tensor(3.0), x - 3), lambda x: torch.log(x / 3), (1.5, 6.0)),
        (lambda x: gkl(x.new_tensor(3.0), x, 3 - x), lambda x: (x - 3) / x, (1.5, 6.0)),
    ],
    ids=["x - log(1 + x)", "exp(x) - 1 - x", "gkl by a", "gkl by b"],
)
def test_the_derivative_is_right_where_two_forms_of_a_function_meet(function, slope, points):
    x = around(*points)
    (computed,) = torch.autograd.grad(function(x).sum(), x)
    torch.testing.assert_close(computed, slope(x.detach()), rtol=1e-13, atol=0)
