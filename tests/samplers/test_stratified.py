"""Latin hypercubes: one draw a stratum in every dimension, unbiased, with an error from replicates alone."""

import pytest
import torch
from torch.distributions import Independent, Normal, Uniform

from torch_klloss.samplers import IID, Stratified, stratified

F64 = torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("n", [1, 2, 7, 64, 100])
def test_every_stratum_of_every_dimension_holds_one_draw(n, dtype):
    q = Independent(Uniform(torch.zeros(3, 4, dtype=dtype), 1.0), 1)
    x = Stratified().draw(q, n, differentiable=False).x
    # A cell that lies across a boundary of strata belongs to the one it begins in.
    bits = 52 if dtype == F64 else 23
    strata = ((x.double() - 0.5 * 2.0**-bits + 2.0**-bits) * n).floor().clamp(max=n - 1)
    assert torch.equal(strata.sort(0).values.long(), torch.arange(n).reshape(n, 1, 1).expand(n, 3, 4))


@pytest.mark.parametrize("bits", [4, 5])
@pytest.mark.parametrize("n", [1, 3, 4, 7])
def test_all_strata_and_places_in_them_make_the_full_grid(n, bits):
    stratum, jitter = torch.meshgrid(torch.arange(n), torch.arange(2**bits), indexing="ij")
    k = stratified._within(stratum, jitter, n, bits)
    assert torch.equal(k.flatten().bincount(), torch.full((2**bits,), n))


def test_expectations_are_unbiased_and_those_of_sums_have_little_variance():
    torch.manual_seed(0)
    q = Independent(Normal(torch.zeros(4000, 5, dtype=F64), 1.0), 1)
    f = [(s.draw(q, 32, differentiable=False).x ** 2).sum(-1).mean(0) for s in (Stratified(), IID())]
    assert abs(f[0].mean() - 5) < 6 * f[0].std() / 4000**0.5
    assert f[1].var() / f[0].var() > 8


def test_dimensions_and_batch_elements_are_not_in_step():
    torch.manual_seed(0)
    q = Independent(Normal(torch.zeros(4000, 8, 2, dtype=F64), 1.0), 1)
    means = Stratified().draw(q, 16, differentiable=False).x.exp().prod(-1).mean(0)
    assert means.sum(1).var() / (8 * means.var()) == pytest.approx(1.0, abs=0.15)
    truth = torch.tensor(1.0, dtype=F64).exp()  # that the two dimensions are independent
    assert abs(means.mean() - truth) < 6 * means.std() / 32_000**0.5


def test_the_error_from_replicates_is_that_of_repetitions_and_the_spread_of_the_draws_is_not():
    torch.manual_seed(1)
    points = Stratified(4).draw(Normal(torch.zeros(20_000, dtype=F64), 0.5), 32, differentiable=False)
    f = points.x.exp()
    spread = points.expectation(f).var()
    assert (points.std_error(f) ** 2).mean() / spread == pytest.approx(1.0, abs=0.1)
    assert f.var(0).mean() / 32 / spread > 5


def test_a_single_hypercube_tells_no_error():
    points = Stratified().draw(Normal(torch.zeros(3), 1.0), 8, differentiable=False)
    assert points.std_error(points.x).isnan().all()


def test_a_number_of_draws_that_the_replicates_cannot_share_is_refused():
    with pytest.raises(ValueError, match=r"Stratified\(replicates=3\) needs .* got 8; use 9"):
        Stratified(3).draw(Normal(0.0, 1.0), 8, differentiable=False)
