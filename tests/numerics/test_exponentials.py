"""Exponentials less the first terms of their series, of many numbers, against 40 digits."""

import mpmath
import pytest
import torch

from torch_klloss.numerics import exponentials
from torch_klloss.numerics.exponentials import NEAR, decay, growth, lead_into, lost_into

pytestmark = pytest.mark.usefixtures("no_grad")
SOME = torch.cat([s * torch.logspace(-14, 2, 1500) for s in (-1.0, 1.0)])  # float32, so many that thrice they are many


@pytest.fixture
def no_grad():
    """As in the forward of a formula, whose derivative is written by hand."""
    with torch.no_grad():
        yield


def off(found, exact, x):
    """Return the largest relative error in units of float32's last place; denormal results are left out."""
    with mpmath.workdps(40):
        right = [exact(mpmath.mpf(v)) for v in x.double().tolist()]
        errors = [abs(f / r - 1) for f, r in zip(found.double().tolist(), right, strict=True) if 1e-37 < abs(r) < 3e38]
        return float(max(errors)) * 2**23


def lead(x):
    return mpmath.expm1(x) - x


@pytest.mark.parametrize("x", [SOME, SOME[:1500]], ids=["all", "negative"])
def test_many_numbers_keep_their_digits_by_a_bound_from_below(x):
    lost, excess = growth(x.repeat(6))
    assert off(lost[: len(x)], mpmath.expm1, x) <= 1
    assert off(excess[: len(x)], lead, x) <= 2
    if (x <= 0).all():
        again = decay(x.repeat(6))
        assert torch.equal(again[0], lost)
        assert torch.equal(again[1], excess)


def test_without_the_raised_unit_the_rounding_of_the_exponential_is_taken_for_the_rest(monkeypatch):
    monkeypatch.setattr(exponentials, "_ABOVE_ONE", dict.fromkeys(NEAR, 1.0))  # the known-wrong twin
    lost, excess = (t[:3000] for t in growth(SOME.repeat(3)))
    assert max(off(lost, mpmath.expm1, SOME), off(excess, lead, SOME)) > 100


def test_the_excess_of_differences_is_that_of_what_was_not_rounded():
    a = torch.randn(20_000)
    b = a + 1e-6 * torch.randn(20_000)
    x = (a.double() - b.double())[:2000]
    lost, excess = (t[:2000] for t in growth(a, b))
    assert off(lost, mpmath.expm1, x) <= 1
    assert off(excess, lead, x) <= 2
    assert not growth(a, a)[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_near", [True, False])
def test_what_is_written_has_the_digits_of_float32(dtype, is_near):
    x = SOME[SOME.abs() <= NEAR[dtype]] if is_near else SOME[SOME < 80]
    x = x.to(dtype)
    out, work = torch.empty_like(x), torch.empty_like(x)
    assert off(lead_into(x, out, work, is_near=is_near), lead, x) <= 8
    assert off(lost_into(x, out), mpmath.expm1, x) <= 2


def test_infinite_and_missing_exponents_come_through():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan]).repeat(10_000)
    lost, excess = growth(x)
    assert lost[:3].tolist()[:2] == [torch.inf, -1.0]
    assert excess[1] == torch.inf
    assert lost[2].isnan()
    assert excess[2].isnan()
