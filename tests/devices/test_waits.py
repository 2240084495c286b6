"""Methods that must look at their errors wait for the device a number of times that the batch does not change."""

import pytest

from tests.processes import run

CODE = """
import json, torch
from torch.distributions import Distribution, Gamma, Laplace, LogNormal, NegativeBinomial, Normal, Poisson
from tests.devices.pretended import NAME, pretended
from torch_klloss.methods import Enumeration, Quadrature
from torch_klloss.methods.enumeration import counts
from torch_klloss.methods.quadrature import method

Distribution.set_default_validate_args(False)
PART = 4  # elements, so that a few dozen are many parts
method._LARGE_CHUNK, counts._CHUNK = 64 * PART, 64

CASES = {
    "kinks": (Quadrature(rtol=1e-4), lambda x: (Normal(x - 1, x), Laplace(0 * x, 1 + 0 * x))),
    "half line": (Quadrature(rtol=1e-4), lambda x: (Gamma(x, x), LogNormal(0 * x, x))),
    "counts": (Enumeration(), lambda x: (Poisson(5 * x), NegativeBinomial(5 + 0 * x, x / 3))),
}

def waits(estimator, build, size):
    with pretended() as found:
        for _ in range(2):  # the first copies constants
            x = torch.linspace(0.5, 2.0, PART).repeat(size // PART).to(NAME).requires_grad_()
            found.clear()
            estimator.estimate(*build(x)).value.sum().backward()
        return found.num_waits

with pretended():  # before any backward pass
    pass
print(json.dumps({name: [waits(*case, size) for size in (PART, 4 * PART, 16 * PART)] for name, case in CASES.items()}))
"""


@pytest.fixture(scope="module")
def found():
    return run(CODE)


@pytest.mark.long
@pytest.mark.parametrize("name", ["kinks", "half line"])
def test_quadrature_waits_at_most_four_times_as_often_for_any_batch_as_for_a_small_one(found, name):
    small, large, larger = found[name]
    assert 15 <= small <= 150  # as its docstring says
    assert small < large == larger <= 4 * small


@pytest.mark.long
def test_a_sum_over_all_counts_waits_as_often_for_any_batch(found):
    small, large, larger = found["counts"]
    assert small == large == larger <= 10
