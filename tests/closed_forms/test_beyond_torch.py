"""The same-family pairs that torch lacks: numbers known by hand, extremes, and relations to other pairs."""

import math

import pytest
import torch
from torch.distributions import (
    Beta,
    Categorical,
    Exponential,
    Geometric,
    Gumbel,
    LKJCholesky,
    Multinomial,
    NegativeBinomial,
    Weibull,
    Wishart,
)

from tests.closed_forms.checks import DTYPES, INF, check, t64, value_and_gradients
from torch_klloss import kl_divergence


def test_weibulls_of_shape_one_are_exponentials_and_their_logarithms_gumbels():
    a, k, b, m = t64(0.5, 3.0), t64(2.0, 0.7), t64(1.5, 2.0), t64(2.5, 3.0)
    one = torch.ones_like(a)
    torch.testing.assert_close(
        kl_divergence(Weibull(a, one), Weibull(b, one)), kl_divergence(Exponential(1 / a), Exponential(1 / b))
    )
    q, p = (Gumbel(-scale.log(), 1 / shape) for scale, shape in ((a, k), (b, m)))
    torch.testing.assert_close(kl_divergence(Weibull(a, k), Weibull(b, m)), kl_divergence(q, p))


@DTYPES
def test_weibulls_far_apart_overflow_to_inf_and_never_to_nan(dtype):
    scale, shape = (torch.tensor(x, dtype=dtype) for x in ([1e-6, 1e6, 1.0, 1e6], [1e-3, 1e3, 1e3, 1e3]))
    for i in range(4):
        kl = kl_divergence(Weibull(scale, shape), Weibull(scale.roll(i), shape.roll(i)))
        assert not kl.isnan().any()
        assert (kl >= 0).all()
    check(kl_divergence(Weibull(scale[1:2], shape[1:2]), Weibull(scale[:1], shape[1:2])), INF)


def test_a_large_weibull_keeps_its_digits_where_gamma_and_the_power_nearly_cancel():
    q, p = Weibull(t64(1.0), t64(1.0)), Weibull(t64(50.0), t64(140.0))
    moment = math.factorial(140) / 50**140  # of integers, rounded once
    rest = 140 * math.log(50) - math.log(140) + 139 * 0.5772156649015329 - 1
    torch.testing.assert_close(kl_divergence(q, p), t64(moment + rest), rtol=1e-14, atol=0)


def test_one_failure_of_a_negative_binomial_makes_a_geometric():
    q, p = t64(0.3, 0.9, 0.0), t64(0.5, 0.2, 0.4)
    one = torch.ones_like(q)
    counts = kl_divergence(NegativeBinomial(one, q), NegativeBinomial(one, p))
    torch.testing.assert_close(counts, kl_divergence(Geometric(1 - q), Geometric(1 - p)))
    mixed = kl_divergence(NegativeBinomial(one, q), NegativeBinomial(one, logits=p.logit()))
    torch.testing.assert_close(mixed, counts)
    mixed = kl_divergence(NegativeBinomial(one[:2], logits=q[:2].logit()), NegativeBinomial(one[:2], p[:2]))
    torch.testing.assert_close(mixed, counts[:2])


def test_a_negative_binomial_at_the_ends_of_its_parameters():
    def build(q, p):
        return NegativeBinomial(t64(2.0), q), NegativeBinomial(t64(2.0), p)

    value, by_q, by_p = value_and_gradients(build, t64(0.0, 0.5, 0.0), t64(0.5, 0.0, 0.0))
    check(value, 2 * math.log(2), INF, 0.0)
    assert not (by_q.isnan() | by_p.isnan()).any()
    assert (by_q[1], by_p[1]) == (0, 0)
    zero = NegativeBinomial(t64(0.0), t64(0.5)), NegativeBinomial(t64(0.0), t64(0.1))
    check(kl_divergence(*zero), 0.0)


def test_a_multinomial_is_so_many_categoricals():
    a, b = t64(0.2, 0.3, 0.5), t64(0.6, 0.2, 0.2)
    one = kl_divergence(Categorical(a), Categorical(b))
    torch.testing.assert_close(kl_divergence(Multinomial(7, a), Multinomial(7, b)), 7 * one)
    check(kl_divergence(Multinomial(0, a), Multinomial(0, t64(1.0, 0.0, 0.0))), 0.0)


def test_multinomials_of_unlike_numbers_of_trials_share_no_outcome():
    q, p = Multinomial(7, torch.ones(2, 3)), Multinomial(6, torch.ones(3))
    assert kl_divergence(q, p).tolist() == [INF, INF]


def test_a_correlation_of_two_dimensions_is_a_beta():
    q, p = t64(0.5, 2.0, 300.0), t64(1.5, 2.0, 200.0)
    torch.testing.assert_close(
        kl_divergence(LKJCholesky(2, q), LKJCholesky(2, p)), kl_divergence(Beta(q, q), Beta(p, p))
    )


def test_lkj_matrices_of_unlike_size_do_not_meet():
    with pytest.raises(ValueError, match="share an event shape"):
        kl_divergence(LKJCholesky(3, 1.0), LKJCholesky(4, 1.0))


@pytest.mark.parametrize("dim", [2, 3, 40])
def test_the_log_determinant_has_the_mean_that_the_gradient_says(dim):
    """By the exponential family of log det, the derivative by p is the difference of the means of it."""
    q, p = t64(1.2), t64(3.0, requires_grad=True)
    (by_p,) = torch.autograd.grad(kl_divergence(LKJCholesky(dim, q), LKJCholesky(dim, p)), p)

    def mean_log_det(eta):
        levels = torch.arange(1, dim, dtype=torch.float64)  # of 1 - r², with (1 + r)/2 ~ Beta(b, b)
        b = eta + (levels - 1) / 2
        return (levels * (2 * (torch.digamma(b) - torch.digamma(2 * b)) + 2 * math.log(2))).sum()

    torch.testing.assert_close(by_p, mean_log_det(p.detach()) - mean_log_det(q), rtol=1e-12, atol=0)


def test_a_wishart_is_mapped_over_its_scale_where_torchs_constructor_does_not_look_at_values():
    factors = torch.stack([torch.eye(2), 2 * torch.eye(2)])

    def kl(a, b):
        return kl_divergence(Wishart(4.0, scale_tril=a), Wishart(5.0, scale_tril=b))

    expected = kl(factors, 2 * factors)
    torch.testing.assert_close(torch.func.vmap(kl)(factors, 2 * factors), expected)
    gradient = torch.func.grad(lambda a, b: kl(a, b).sum())(factors, 2 * factors)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(kl))(factors, 2 * factors), gradient)
