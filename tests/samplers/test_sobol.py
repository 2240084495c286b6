"""Scrambled nets with a random digital shift: proofs over all shifts, and the twins that they reject."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, Normal, Uniform

from torch_klloss.samplers import IID, Sobol, sobol
from torch_klloss.samplers.sobol import MAX_DIMENSION, sobol_net
from torch_klloss.samplers.transport import Cells, cells_of, midpoints

F64 = torch.float64
BITS = 4


@dataclass(frozen=True)
class EveryShift(Cells):
    """Integer noise that is no longer random: a batch of all shifts, one an element."""

    def random(self, n: int) -> Tensor:
        shifts = torch.arange(2**self.bits, dtype=self.dtype)
        return torch.cartesian_prod(*[shifts] * self.shape[-1]).reshape(1, -1, self.shape[-1])


def over_every_shift(monkeypatch, q_of_batch, d, num_samples):
    """Return the points of a sampler `[S, 2^(b d), …]` whose batch elements are all shifts of b bits."""
    cells = EveryShift(BITS, torch.int32, (2 ** (BITS * d), d), torch.device("cpu"))
    monkeypatch.setattr(sobol, "cells_of", lambda q: cells)
    return Sobol().draw(q_of_batch(2 ** (BITS * d)), num_samples, differentiable=False).x


def grid() -> Tensor:
    return (torch.arange(2**BITS, dtype=F64) + 0.5) / 2**BITS


def rough(x: Tensor) -> Tensor:
    return (x**3).sin() + (x > 0.3) * x.exp()


@pytest.mark.parametrize("num_samples", [1, 3, 8, 16])
def test_the_mean_over_all_shifts_is_that_of_the_full_grid(monkeypatch, num_samples):
    x = over_every_shift(monkeypatch, lambda n: Normal(torch.zeros(n, dtype=F64), 1.0), 1, num_samples)
    truth = rough(Normal(torch.zeros(1, dtype=F64), 1.0).icdf(grid().float())).mean()
    torch.testing.assert_close(rough(x).mean(1), truth.expand(num_samples), rtol=0, atol=1e-14)


def test_the_mean_over_all_shifts_of_two_dimensions_is_that_of_the_full_grid(monkeypatch):
    def q(n):
        return Independent(Uniform(torch.zeros(n, 2, dtype=F64), 1.0), 1)

    x = over_every_shift(monkeypatch, q, 2, 4)
    u, v = torch.meshgrid(grid(), grid(), indexing="ij")
    truth = rough(u * 3 + v**2).mean()
    torch.testing.assert_close(rough(x[..., 0] * 3 + x[..., 1] ** 2).mean(1), truth.expand(4), rtol=0, atol=1e-14)
    diagonal = rough(
        grid() * 3 + grid() ** 2
    ).mean()  # what a shift shared by the dimensions would give at its first point
    assert abs(diagonal - truth) > 0.01


def test_the_mean_over_all_shifts_tells_cells_without_their_half(monkeypatch):
    x = over_every_shift(monkeypatch, lambda n: Uniform(torch.zeros(n, dtype=F64), 1.0), 1, 8)
    no_half = x - 0.5 / 2**BITS
    assert abs(x.mean() - 0.5) < 1e-15
    assert abs(no_half.mean() - 0.5) > 0.03
    assert no_half.min() == 0  # whose icdf is -inf


@pytest.mark.parametrize(("bits", "dtype"), [(23, torch.float32), (52, torch.float64)])
def test_the_first_and_last_cell_are_strictly_inside(bits, dtype):
    k = torch.tensor([0, 2**bits - 1], dtype=torch.int32 if bits == 23 else torch.int64)
    u = midpoints(k, bits)
    assert u.dtype == dtype
    assert u[0] > 0
    assert u[1] < 1
    assert u[0] == 1 - u[1]  # exactly
    assert Normal(torch.zeros((), dtype=dtype), 1.0).icdf(u).isfinite().all()
    without_half = k.to(dtype) / 2**bits
    assert without_half[0] == 0


@pytest.mark.parametrize("bits", [23, 52])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 3), (64, 32), (1024, 2)])
def test_every_dimension_of_a_net_has_one_point_in_every_stratum(n, d, bits):
    net = sobol_net(n, d, bits)
    assert net.shape == (n, d)
    assert ((net >= 0) & (net < 2**bits)).all()
    strata = (net.long() * n) >> bits
    assert torch.equal(strata.sort(0).values, torch.arange(n).unsqueeze(1).expand(n, d))


def test_two_dimensions_of_a_net_share_out_every_elementary_rectangle():
    net = sobol_net(64, 2, 23).long()
    for rows in (1, 2, 4, 8, 16, 32, 64):
        boxes = ((net[:, 0] * rows) >> 23) * (64 // rows) + ((net[:, 1] * (64 // rows)) >> 23)
        assert boxes.unique().numel() == 64


def test_a_net_is_made_once_and_touches_no_random_stream():
    state = torch.get_rng_state()
    assert sobol_net(32, 3, 23) is sobol_net(32, 3, 23)
    assert torch.equal(torch.get_rng_state(), state)


def test_more_dimensions_than_there_are_direction_numbers_for_are_refused():
    with pytest.raises(ValueError, match=r"at most 21201 dimensions, got 21202"):
        sobol_net(2, MAX_DIMENSION + 1, 23)


def values(q, sampler, num_samples):
    x = sampler.draw(q, num_samples, differentiable=False).x
    return x.exp().mean(0)


def test_batch_elements_are_independent():
    torch.manual_seed(0)
    q = Normal(torch.zeros(4000, 8, dtype=F64), 1.0)
    means = values(q, Sobol(), 16)
    # If eight neighbours are independent, the variance of their sum is eight times that of one.
    ratio = means.sum(1).var() / (8 * means.var())
    assert ratio == pytest.approx(1.0, abs=0.15)
    shared = means[:, :1].expand(-1, 8)
    assert shared.sum(1).var() / (8 * shared.var()) > 7


def test_the_error_from_replicates_is_that_of_repetitions_and_the_spread_within_a_net_is_not():
    torch.manual_seed(1)
    q = Normal(torch.zeros(20_000, dtype=F64), 0.5)
    points = Sobol(4).draw(q, 32, differentiable=False)
    f = points.x.exp()
    spread = points.expectation(f).var()
    assert (points.std_error(f) ** 2).mean() / spread == pytest.approx(1.0, abs=0.1)
    within = f.var(0).mean() / 32
    assert within / spread > 5


def test_a_single_net_tells_no_error():
    points = Sobol().draw(Normal(torch.zeros(3), 1.0), 8, differentiable=False)
    assert points.num_replicates == 1
    assert points.std_error(points.x).isnan().all()


def test_the_expectation_is_unbiased_with_far_less_variance_than_independent_draws():
    torch.manual_seed(2)
    q = Normal(torch.zeros(4000, dtype=F64), 0.5)
    truth = math.exp(0.125)
    means = values(q, Sobol(), 64)
    assert abs(means.mean() - truth) < 6 * means.std() / 4000**0.5
    assert values(q, IID(), 64).var() / means.var() > 25


def test_dimensions_of_one_event_share_a_net_and_batch_elements_do_not():
    q = Independent(Uniform(torch.zeros(3, 2), 1.0), 1)
    assert cells_of(q).shape == (3, 2)
    assert cells_of(Uniform(torch.zeros(3, 2), 1.0)).shape == (3, 2, 1)


def test_a_number_of_draws_that_the_replicates_cannot_share_is_refused():
    with pytest.raises(ValueError, match=r"multiple of 8, got 12; use 16"):
        Sobol(8).draw(Normal(0.0, 1.0), 12, differentiable=False)
    with pytest.raises(ValueError, match=r"at least 1, got 0"):
        Sobol(0)


def test_discrete_points_carry_no_gradient():
    q = Categorical(torch.tensor([0.25, 0.75]))
    with pytest.raises(NotImplementedError, match="carry no gradient"):
        Sobol().draw(q, 8, differentiable=True)
    points = Sobol().draw(q.expand((5,)), 8, differentiable=False)
    assert (points.x.double().mean(0) == 0.75).all()
