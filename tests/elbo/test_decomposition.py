"""The KL over a data set: mutual information, total correlation and dimension-wise KL, against integrals."""

import math

import pytest
import torch
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    TanhTransform,
    TransformedDistribution,
)

from torch_klloss import AnalyticKL, diagonal_normal, standard_normal_like
from torch_klloss.elbo import decompose_kl


def posteriors():
    """Return five posteriors in the plane, whose two dimensions depend on one another over the data."""
    mean = torch.tensor([[-2.0, -1.5], [-1.0, -1.0], [0.0, 0.2], [1.0, 0.8], [2.5, 1.5]], dtype=torch.float64)
    logvar = torch.tensor([[-1.0, -0.5], [-1.5, 0.0], [-1.0, -1.0], [0.0, -2.0], [-0.5, -1.0]], dtype=torch.float64)
    return diagonal_normal(mean, logvar)


def parts_by_quadrature(q, points=601):
    """Return the three parts by the trapezoidal rule over the plane, in which all densities vanish at ±9."""
    z = torch.linspace(-9, 9, points, dtype=torch.float64)
    area, base = (z[1] - z[0]) ** 2, q.base_dist
    each = base.log_prob(z.view(-1, 1, 1))  # [points, N, 2]
    joint = each[:, None, :, 0] + each[None, :, :, 1]  # [points, points, N]
    log_n, count = math.log(5), 5
    log_aggregate = joint.logsumexp(-1) - log_n
    marginals = each.logsumexp(1) - log_n  # [points, 2]
    log_product = marginals[:, None, 0] + marginals[None, :, 1]
    log_prior = Normal(0.0, 1.0).log_prob(z)
    log_prior = log_prior[:, None] + log_prior[None, :]
    weights = joint.exp() * area / count
    information = (weights * (joint - log_aggregate.unsqueeze(-1))).sum()
    aggregate = log_aggregate.exp() * area
    correlation = (aggregate * (log_aggregate - log_product)).sum()
    step = z[1] - z[0]
    each_dimension = (marginals.exp() * step * (marginals - Normal(0.0, 1.0).log_prob(z).unsqueeze(-1))).sum(0)
    return information, correlation, each_dimension


def test_the_parts_are_the_integrals_within_their_errors():
    q = posteriors()
    parts = decompose_kl(q, standard_normal_like(q), num_samples=4000)
    information, correlation, each = parts_by_quadrature(q)
    truths = {
        "mutual_information": information,
        "total_correlation": correlation,
        "dimension_wise": each.sum(),
        "dimension_wise_each": each,
        "kl": AnalyticKL()(q, standard_normal_like(q)),
    }
    assert truths["kl"] == pytest.approx(float(information + correlation + each.sum()), rel=1e-6)
    assert min(information, correlation, each.min()) > 0.05
    for name, truth in truths.items():
        estimate = getattr(parts, name)
        assert ((estimate.value - truth).abs() < 5 * estimate.std_error).all(), name
        assert (estimate.std_error < 0.02).all()


def test_the_parts_add_up():
    q = posteriors()
    parts = decompose_kl(q, standard_normal_like(q))
    total = parts.mutual_information.value + parts.total_correlation.value + parts.dimension_wise.value
    assert torch.allclose(total, parts.kl.value)
    assert torch.allclose(parts.dimension_wise_each.value.sum(), parts.dimension_wise.value)


def test_a_part_of_the_data_has_another_aggregate():
    """The twin: a minibatch taken for the data set knows less of what it could be."""
    q = posteriors()
    half = diagonal_normal(q.base_dist.loc[:2], q.base_dist.logvar[:2])
    truth = parts_by_quadrature(q)[0]
    estimate = decompose_kl(half, standard_normal_like(half), num_samples=4000).mutual_information
    assert abs(estimate.value - truth) > 20 * estimate.std_error


def test_the_mutual_information_of_posteriors_apart_is_the_logarithm_of_their_number():
    mean = 50 * torch.arange(7.0).unsqueeze(-1).expand(7, 3)
    q = diagonal_normal(mean, torch.zeros(7, 3))
    parts = decompose_kl(q, standard_normal_like(q))
    assert parts.mutual_information.value == pytest.approx(math.log(7), rel=1e-5)
    assert parts.total_correlation.value == pytest.approx(2 * math.log(7), rel=1e-5)


def test_a_collapsed_posterior_knows_nothing():
    q = diagonal_normal(torch.zeros(50, 3), torch.zeros(50, 3))
    parts = decompose_kl(q, standard_normal_like(q))
    for part in parts:
        assert (part.value.abs() < 1e-5).all()


@pytest.mark.parametrize("chunk_size", [1, 17, 10**6])
def test_chunks_change_nothing(chunk_size):
    q = posteriors()
    torch.manual_seed(0)
    whole = decompose_kl(q, standard_normal_like(q))
    torch.manual_seed(0)
    parts = decompose_kl(q, standard_normal_like(q), chunk_size=chunk_size)
    for one, other in zip(parts, whole, strict=True):
        assert torch.allclose(one.value, other.value, rtol=1e-12)


def test_a_single_sweep_has_no_error_to_tell():
    q = posteriors()
    assert decompose_kl(q, standard_normal_like(q), num_samples=1).kl.std_error.isnan()
    assert decompose_kl(q, standard_normal_like(q), num_samples=2).kl.dof == 1


def test_a_generator_repeats_the_draws():
    q = posteriors()
    values = {
        decompose_kl(q, standard_normal_like(q), generator=torch.Generator().manual_seed(1)).kl.value.item()
        for _ in range(2)
    }
    assert len(values) == 1


def test_no_gradient_is_recorded():
    mean = torch.zeros(5, 2, requires_grad=True)
    q = diagonal_normal(mean, torch.zeros(5, 2))
    assert not decompose_kl(q, standard_normal_like(q)).kl.value.requires_grad


def test_what_does_not_split_or_is_no_data_set_is_refused():
    q = MultivariateNormal(torch.zeros(4, 2), torch.eye(2))
    with pytest.raises(NotImplementedError, match="independent dimensions"):
        decompose_kl(q, standard_normal_like(q))
    good = posteriors()
    mixture = MixtureSameFamily(Categorical(torch.ones(2)), Independent(Normal(torch.zeros(2, 2).double(), 1.0), 1))
    with pytest.raises(NotImplementedError, match="MixtureSameFamily"):
        decompose_kl(good, mixture)
    flat = Normal(torch.zeros(4, 2), 1.0)
    with pytest.raises(ValueError, match=r"batch shape \[N\] and event shape \[latent\], got \(4, 2\)"):
        decompose_kl(flat, flat)
    with pytest.raises(ValueError, match="num_samples and chunk_size must be at least 1, got 0"):
        decompose_kl(good, standard_normal_like(good), num_samples=0)


@pytest.mark.parametrize("chunk_size", [2**22, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saturated_posterior_has_the_parts_of_the_space_it_was_drawn_in(dtype, chunk_size):
    """A map of every dimension changes no part, and tanh rounds to 1 long before 20."""
    mean = torch.tensor([[20.0, -20.0], [20.5, 20.0], [18.0, 30.0]], dtype=dtype)
    base_q, base_p = Normal(mean, 0.5), Normal(torch.zeros(2, dtype=dtype), 10.0)
    parts = []
    for transforms in ([], [TanhTransform()]):
        q, p = (Independent(TransformedDistribution(d, transforms) if transforms else d, 1) for d in (base_q, base_p))
        torch.manual_seed(0)
        parts.append(decompose_kl(q, p, num_samples=6, chunk_size=chunk_size))
    for found, expected in zip(*reversed(parts), strict=True):
        torch.testing.assert_close(found.value, expected.value, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.std_error, expected.std_error, rtol=1e-3, atol=1e-4)
