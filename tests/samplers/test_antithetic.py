"""Mirrored pairs: what they cancel, what they double, and the error over pairs."""

import pytest
import torch
from torch.distributions import Gamma, Normal, Uniform

from torch_klloss.samplers import IID, Antithetic

F64 = torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_two_of_a_pair_mirror_one_another_exactly(dtype):
    x = Antithetic().draw(Uniform(torch.zeros(5, dtype=dtype), 1.0), 8, differentiable=False).x
    assert (x[::2] + x[1::2] == 1).all()
    assert x[::2].unique().numel() == 20


def test_what_is_odd_about_the_median_has_no_error():
    q = Normal(torch.full((6,), 2.0, dtype=F64), 3.0)
    points = Antithetic().draw(q, 4, differentiable=False)
    torch.testing.assert_close(points.expectation(points.x), torch.full((6,), 2.0, dtype=F64), rtol=0, atol=1e-14)
    assert (points.std_error(points.x) < 1e-13).all()


def test_what_is_even_has_twice_the_variance_and_the_error_says_so():
    torch.manual_seed(0)
    q = Normal(torch.zeros(20_000, dtype=F64), 1.0)
    points, plain = (s.draw(q, 16, differentiable=False) for s in (Antithetic(), IID()))
    f = points.x**2
    spread = points.expectation(f).var()
    assert spread / plain.expectation(plain.x**2).var() == pytest.approx(2.0, abs=0.2)
    assert (points.std_error(f) ** 2).mean() / spread == pytest.approx(1.0, abs=0.1)
    as_if_independent = f.var(0).mean() / 16
    assert as_if_independent / spread < 0.6


def test_expectations_are_unbiased():
    torch.manual_seed(1)
    q = Gamma(torch.full((20_000,), 2.0, dtype=F64), 1.5)
    means = Antithetic().draw(q, 2, differentiable=False).x.log().mean(0)
    truth = torch.digamma(torch.tensor(2.0, dtype=F64)) - torch.tensor(1.5, dtype=F64).log()
    assert abs(means.mean() - truth) < 6 * means.std() / 20_000**0.5


def test_a_single_pair_tells_no_error():
    points = Antithetic().draw(Normal(torch.zeros(2), 1.0), 2, differentiable=False)
    assert points.std_error(points.x).isnan().all()


def test_an_odd_number_of_draws_is_refused():
    with pytest.raises(ValueError, match=r"even num_samples, got 5"):
        Antithetic().draw(Normal(0.0, 1.0), 5, differentiable=False)
