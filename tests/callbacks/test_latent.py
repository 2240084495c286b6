"""The statistics of a latent, against quadrature."""

import math

import pytest
import torch
from torch.distributions import Cauchy, Independent, Normal

from torch_klloss.callbacks.latent import kl_per_unit, mutual_information, posterior_means
from torch_klloss.callbacks.moments import Moments


def quadrature_information(means, scale):
    """I(x; z) of Normals with these means, each as likely, in float64."""
    z = torch.linspace(-40, 40, 2**14 + 1, dtype=torch.float64)
    log_q = Normal(means.double().unsqueeze(-1), scale).log_prob(z)
    log_mixture = log_q.logsumexp(0) - math.log(len(means))
    return (torch.trapezoid(log_q.exp() * (log_q - log_mixture), z).mean()).item()


def test_the_mutual_information_is_unbiased_and_that_of_the_other_examples_alone_is_not():
    """The twin leaves the example itself out of the mixture, as an estimate of q(z) by other examples would."""
    means = torch.tensor([-1.5, -0.5, 0.0, 0.7, 2.0])
    q = Normal(means, 0.8)
    keep = torch.ones(5, dtype=torch.bool)
    estimates = torch.stack([mutual_information(q, keep, 5).double().mean() for _ in range(2000)])
    error = estimates.std().item() / math.sqrt(2000)
    truth = quadrature_information(means, 0.8)
    assert abs(estimates.mean().item() - truth) < 5 * error
    assert estimates.max() <= math.log(5)
    z = q.sample((2000,))
    log_q = q.log_prob(z.unsqueeze(-1))  # [draws, of, under]
    others = log_q.masked_fill(torch.eye(5, dtype=torch.bool), -math.inf).logsumexp(-1) - math.log(4)
    left_out = (log_q.diagonal(dim1=1, dim2=2) - others).mean().item()
    assert abs(left_out - truth) > 50 * error


def test_draws_for_a_part_of_the_examples_are_spread_over_all_and_masked_ones_take_no_part():
    means = torch.arange(9.0) * 100
    keep = torch.tensor([True, False, True, False, True, False, False, False, True])
    assert mutual_information(Normal(means, 1.0), keep, 2).tolist() == pytest.approx([math.log(4)] * 2)
    nobody = mutual_information(Normal(means, 1.0), torch.zeros(9, dtype=torch.bool), 2)
    assert nobody.shape == (0,)


def test_units_of_the_batch_and_of_the_event_are_summed_alike():
    loc = torch.randn(6, 4)
    keep = torch.ones(6, dtype=torch.bool)
    torch.manual_seed(1)
    event = mutual_information(Independent(Normal(loc, 1.0), 1), keep, 6)
    torch.manual_seed(1)
    batch = mutual_information(Normal(loc, 1.0), keep, 6)
    assert torch.allclose(event, batch, rtol=1e-6)
    p = Normal(torch.zeros(4), 1.0)
    assert torch.equal(
        kl_per_unit(Normal(loc, 1.0), p, 1), kl_per_unit(Independent(Normal(loc, 1.0), 1), Independent(p, 1), 1)
    )


def test_a_family_without_a_mean_has_none():
    assert posterior_means(Cauchy(torch.zeros(3), 1.0), 1) is None


@pytest.mark.parametrize("sizes", [[10], [3, 7], [1, 1, 8], [0, 10]])
def test_moments_of_parts_are_those_of_the_whole(sizes):
    values = 1e6 + torch.randn(10, 2, dtype=torch.float64)  # E[x²] - mean² would lose twelve digits
    weights = torch.rand(10, dtype=torch.float64)
    parts = zip(values.split(sizes), weights.split(sizes), strict=True)
    first, *rest = (Moments.of(v, w) for v, w in parts)
    moments = sum(rest, first)
    mean = (weights.unsqueeze(-1) * values).sum(0) / weights.sum()
    assert torch.allclose(moments.mean, mean, rtol=1e-14)
    variance = (weights.unsqueeze(-1) * (values - mean) ** 2).sum(0) / weights.sum()
    # both subtract numbers of 1e6 that are right to 1e-10
    assert torch.allclose(moments.variance, variance, rtol=1e-8)
