"""Gamma, Beta, Dirichlet, ContinuousBernoulli, VonMises and Wishart, each against its own family: edges and laws."""

import math
from functools import partial

import mpmath
import pytest
import torch
from torch.distributions import (
    Beta,
    Chi2,
    ContinuousBernoulli,
    Dirichlet,
    Distribution,
    Gamma,
    Normal,
    VonMises,
    Wishart,
)
from torch.distributions import kl_divergence as torch_kl

from tests.references.gamma_family import REFERENCES
from tests.references.harness import draw
from torch_klloss import kl_divergence
from torch_klloss.numerics.lgamma import NODES, binet_digamma_difference, binet_trigamma

EPS = torch.finfo(torch.float64).eps

relative = partial(pytest.approx, abs=0)  # without the 1e-12 that pytest would forgive
PAIRS = pytest.mark.parametrize("reference", REFERENCES, ids=lambda reference: reference.name)
SCALAR_PAIRS = pytest.mark.parametrize(  # torch has no Cholesky factors in half precision, and none under vmap
    "reference", [r for r in REFERENCES if r.type_q is not Wishart], ids=lambda reference: reference.name
)


def f64(*values, **kwargs):
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64, **kwargs)


def tensors(reference, *shapes, regime="moderate", dtype=torch.float64):
    """Return parameters of q and of p with the batch shapes, as lists, and how to compute the KL from them."""
    sides = []
    for side, shape in enumerate(shapes):
        params = draw(reference, regime, dtype, max(1, math.prod(shape)), seed=side)[side]
        sides.append([t.detach().reshape(shape + t.shape[1:]) for t in params.values()])
    keys = [list(side) for side in draw(reference, regime, dtype, 1)]

    def kl(*params):
        q, p = params[: len(keys[0])], params[len(keys[0]) :]
        return kl_divergence(*reference.build(dict(zip(keys[0], q, strict=True)), dict(zip(keys[1], p, strict=True))))

    return *sides, kl


# Laws that hold for every pair


@PAIRS
@pytest.mark.parametrize(("q_shape", "p_shape"), [((), (2, 3)), ((2, 3), (3,)), ((2, 1), (1, 3))])
def test_batch_shapes_broadcast_against_each_other(reference, q_shape, p_shape):
    q, p, kl = tensors(reference, q_shape, p_shape)
    shape = torch.broadcast_shapes(q_shape, p_shape)
    q, p = ([t.requires_grad_() for t in side] for side in (q, p))
    expanded = [t.expand(shape + t.shape[len(s) :]) for side, s in ((q, q_shape), (p, p_shape)) for t in side]
    value = kl(*q, *p)
    assert value.shape == shape
    torch.testing.assert_close(value, kl(*expanded), rtol=8 * EPS, atol=0)
    for one, other in zip(
        torch.autograd.grad(value.sum(), q + p), torch.autograd.grad(kl(*expanded).sum(), q + p), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@PAIRS
@pytest.mark.parametrize("regime", ["moderate", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_are_zero_at_equality(reference, regime, dtype):
    q, _, kl = tensors(reference, (50,), (50,), regime=regime, dtype=dtype)
    params = [t.clone().requires_grad_() for t in q + q]
    value = kl(*params)
    assert torch.equal(value, torch.zeros(50, dtype=dtype))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(value.sum(), params))


@PAIRS
def test_the_derivatives_can_be_differentiated_at_equality_and_elsewhere(reference):
    q, p, kl = tensors(reference, (3,), (3,))
    for other in (p, q):
        params = [t.clone().requires_grad_() for t in q + other]
        lower = [torch.ones_like(t).tril() if t.dim() == 3 else torch.ones_like(t) for t in params]

        def at(*params, lower=lower):  # no step above the diagonal, where a factor stays zero
            return kl(*(t * mask for t, mask in zip(params, lower, strict=True)))

        torch.autograd.gradcheck(at, params)
        torch.autograd.gradgradcheck(at, params, atol=1e-5)


@PAIRS
def test_a_functional_gradient_is_that_of_backward(reference):
    q, p, kl = tensors(reference, (), ())
    params = [t.requires_grad_() for t in q + p]
    grads = torch.autograd.grad(kl(*params), params)
    for one, other in zip(torch.func.grad(kl, argnums=tuple(range(len(params))))(*params), grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@SCALAR_PAIRS
def test_vmap_gives_what_a_batch_gives(reference, monkeypatch):
    monkeypatch.setattr(Distribution, "_validate_args", False)  # torch's validation looks at values too
    q, p, kl = tensors(reference, (700,), (700,))
    params = [t.requires_grad_() for t in q + p]
    value = kl(*params)
    grads = torch.autograd.grad(value.sum(), params)
    torch.testing.assert_close(torch.func.vmap(kl)(*params), value, rtol=8 * EPS, atol=0)
    by_vmap = torch.func.vmap(torch.func.grad(kl, argnums=tuple(range(len(params)))))(*params)
    for one, other in zip(by_vmap, grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@SCALAR_PAIRS
def test_half_precision_comes_back_as_it_went_in(reference):
    q, p, kl = tensors(reference, (20,), (20,), dtype=torch.float32)
    q, p = ([t.to(torch.bfloat16) for t in side] for side in (q, p))
    value = kl(*q, *p)
    assert value.dtype == torch.bfloat16
    assert torch.equal(value, kl(*(t.float() for t in q + p)).bfloat16())


@PAIRS
def test_a_nan_stays_where_it_is(reference, monkeypatch):
    monkeypatch.setattr(Distribution, "_validate_args", False)
    q, p, kl = tensors(reference, (3,), (3,))
    for i in range(len(q + p)):
        params = [t.clone() for t in q + p]
        params[i][1] = torch.nan
        assert kl(*params).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("family", [Gamma, Beta, VonMises, lambda *c: Dirichlet(torch.stack((*c, c[0]), -1))])
def test_parameters_from_1e_minus_25_to_1e25_give_no_nan_and_finite_gradients(family):
    scales = f64(1e-25, 1e-12, 1e-4, 1.0, 1e6, 1e12, 1e25)
    params = [t.requires_grad_() for t in torch.cartesian_prod(*4 * [scales]).unbind(-1)]
    value = kl_divergence(family(*params[:2]), family(*params[2:]))
    assert value.isfinite().all()
    assert (value >= 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value.sum(), params))


def test_a_double_scalar_beside_single_precision_costs_no_digits():
    shape, rate = f64(5.000001), f64(3.0)
    q = torch.tensor([5.0, 5.5]), torch.tensor([3.0, 3.5])
    value = kl_divergence(Gamma(*q), Gamma(shape, rate))
    assert value.dtype == torch.float64
    assert torch.equal(value, kl_divergence(Gamma(*(t.double() for t in q)), Gamma(shape, rate)))


# Gamma


def test_a_gamma_of_shape_one_is_an_exponential():
    q, p = Gamma(f64(1.0), f64(3.0)), Gamma(f64(1.0), f64(0.5))
    torch.testing.assert_close(kl_divergence(q, p), f64(math.log(6) + 1 / 6 - 1), rtol=4 * EPS, atol=0)


def test_chi2_is_a_gamma_and_inherits():
    expected = kl_divergence(Gamma(f64(1.5), f64(0.5)), Gamma(f64(2.5), f64(0.5)))
    assert torch.equal(kl_divergence(Chi2(f64(3.0)), Chi2(f64(5.0))), expected)


def test_means_that_nearly_agree_keep_their_difference():
    a, b = 1e6 / 3, 1 / 7
    c, d = a * (1 + 1e-6), b * (1 + 1e-6 + 1e-9)
    value = kl_divergence(Gamma(f64(a), f64(b)), Gamma(f64(c), f64(d))).item()
    rounded = (a * d - c * b) / (c * b)  # how far the ratio of the means is from 1
    with mpmath.workdps(60):
        a, b, c, d = (mpmath.mpf(x) for x in (a, b, c, d))
        divergence = mpmath.loggamma(c) - mpmath.loggamma(a) - mpmath.psi(0, a) * (c - a)
        expected = float(divergence + c * mpmath.log(b / d) + a * (d / b - 1))
        exact = float(a * d / (c * b) - 1)
    assert value == relative(expected, rel=64 * EPS)
    assert rounded != relative(exact, rel=1e-9)


# Beta and Dirichlet


def test_a_uniform_against_a_straight_density():
    value = kl_divergence(Beta(f64(1.0), f64(1.0)), Beta(f64(2.0), f64(1.0)))
    torch.testing.assert_close(value, f64(1 - math.log(2)), rtol=8 * EPS, atol=0)


def test_a_beta_is_a_dirichlet_of_two_components_in_either_order():
    q, p = f64(0.3, 40.0), f64(2.0, 7.0)
    value = kl_divergence(Dirichlet(q), Dirichlet(p))
    assert torch.equal(kl_divergence(Beta(*q), Beta(*p)), value)
    assert torch.equal(kl_divergence(Beta(*q.flip(0)), Beta(*p.flip(0))), value)


def test_a_dirichlet_is_a_chain_of_betas():
    q, p = f64(0.3, 40.0, 2.0, 1e-3), f64(2.0, 7.0, 1e-2, 5.0)
    rests_q, rests_p = q.flip(0).cumsum(0).flip(0), p.flip(0).cumsum(0).flip(0)
    links = kl_divergence(Beta(q[:-1], rests_q[1:]), Beta(p[:-1], rests_p[1:]))
    torch.testing.assert_close(kl_divergence(Dirichlet(q), Dirichlet(p)), links.sum(), rtol=1e-14, atol=0)


def test_a_dirichlet_of_one_component_is_certain():
    q, p = f64(3.0).reshape(1).requires_grad_(), f64(5.0).reshape(1)
    value = kl_divergence(Dirichlet(q), Dirichlet(p))
    value.backward()
    assert value.item() == 0
    assert q.grad.item() == 0


def test_a_batch_too_large_for_one_block_keeps_its_shape():
    q, p = (torch.rand(1100, 64, dtype=torch.float64) + 0.1 for _ in range(2))
    value = kl_divergence(Dirichlet(q), Dirichlet(p))
    assert value.shape == (1100,)
    torch.testing.assert_close(value[7], kl_divergence(Dirichlet(q[7]), Dirichlet(p[7])), rtol=8 * EPS, atol=0)


def test_large_betas_near_one_another_where_torch_is_negative():
    q, p = Beta(5000.0, 7000.0), Beta(5002.0, 7003.0)
    with mpmath.workdps(60):
        parts = [(5002, 5000), (7003, 7000), (12005, 12000)]
        a, b, total = (mpmath.loggamma(x) - mpmath.loggamma(y) - mpmath.psi(0, y) * (x - y) for x, y in parts)
        expected = float(a + b - total)
    assert torch_kl(q, p) < 0
    assert kl_divergence(q, p).item() == relative(expected, rel=torch.finfo(torch.float32).eps)


# ContinuousBernoulli


def log_norm(t):
    return math.log(math.sinh(t) / t)


def test_a_uniform_against_a_continuous_bernoulli():
    p = ContinuousBernoulli(logits=f64(3.0))
    for q in (ContinuousBernoulli(probs=f64(0.5)), ContinuousBernoulli(logits=f64(0.0))):
        torch.testing.assert_close(kl_divergence(q, p), f64(log_norm(1.5)), rtol=8 * EPS, atol=0)
    mean = 1 / math.tanh(1.5) - 1 / 1.5
    expected = mean * 1.5 - log_norm(1.5)
    torch.testing.assert_close(kl_divergence(p, q), f64(expected), rtol=32 * EPS, atol=0)


def test_next_to_one_half_where_torch_is_off_by_a_third():
    probs = f64(0.4990001), f64(0.4989999)
    q, p = (ContinuousBernoulli(probs=x) for x in probs)
    gap = math.log1p((probs[1] - probs[0]) / (probs[0] * (1 - probs[1])))
    expected = gap**2 / 24  # the variance is 1/12 but for the square of the logit, 1.6e-5
    assert abs(torch_kl(q, p).item() / expected - 1) > 0.3
    assert kl_divergence(q, p).item() == relative(expected, rel=2e-5)


def test_logits_far_beyond_any_probability_are_taken_as_given():
    q, p = (ContinuousBernoulli(logits=f64(x, requires_grad=True)) for x in (1e4, 2e4))  # exponentials, from the end 1
    value = kl_divergence(q, p)
    torch.testing.assert_close(value, f64(1 - math.log(2)), rtol=8 * EPS, atol=0)
    by_q, by_p = torch.autograd.grad(value, (q.logits, p.logits))
    assert (by_q.item(), by_p.item()) == (relative(-1e4 / 1e8), relative(1e-4 - 0.5e-4))


@pytest.mark.parametrize("expand", [False, True])
def test_the_parametrisation_is_the_given_one_even_when_torch_has_stored_the_other(expand):
    q, p = ContinuousBernoulli(logits=f64(50.0)), ContinuousBernoulli(logits=f64(80.0))
    expected = kl_divergence(q, p)
    assert q.probs.shape == p.probs.shape  # asking is what stores them
    if expand:
        q, p, expected = q.expand((3,)), p.expand((3,)), expected.expand(3)
    assert torch.equal(kl_divergence(q, p), expected)


def test_a_logit_meets_a_probability():
    by_probs, by_logits = ContinuousBernoulli(probs=f64(0.2)), ContinuousBernoulli(logits=f64(math.log(0.25)))
    other = ContinuousBernoulli(logits=f64(1.0))
    for one, another in ((by_probs, other), (other, by_probs)):
        swapped = [by_logits if d is by_probs else d for d in (one, another)]
        torch.testing.assert_close(kl_divergence(one, another), kl_divergence(*swapped), rtol=8 * EPS, atol=0)


# VonMises


def test_opposite_directions_of_equal_concentration():
    kappa = f64(2.0)
    value = kl_divergence(VonMises(f64(0.0), kappa), VonMises(f64(math.pi), kappa))
    resultant = torch.special.i1(kappa) / torch.special.i0(kappa)
    torch.testing.assert_close(value, 2 * kappa * resultant, rtol=8 * EPS, atol=0)


def test_a_whole_turn_changes_nothing_but_what_it_rounds():
    turn, kappa, small = 2 * math.pi, f64(5.0), f64(1e-5)
    value = kl_divergence(VonMises(small + turn, kappa), VonMises(f64(0.0), kappa))
    with mpmath.workdps(60):  # the very angles: a turn, rounded, is 2.4e-16 short of itself
        angle = mpmath.mpf((small + turn).item())
        mean = mpmath.besseli(1, 5) / mpmath.besseli(0, 5)
        expected = float(5 * mean * (1 - mpmath.cos(angle)))
    assert value.item() == relative(expected, rel=8 * EPS)


def test_concentrated_directions_are_normals():
    kappas = f64(1e12, 3e12)
    value = kl_divergence(VonMises(f64(1e-6), kappas[0]), VonMises(f64(0.0), kappas[1]))
    normal = kl_divergence(Normal(f64(1e-6), kappas[0] ** -0.5), Normal(f64(0.0), kappas[1] ** -0.5))
    torch.testing.assert_close(value, normal, rtol=1e-11, atol=0)  # the next term is of order 1/κ


def test_no_concentration_is_a_uniform():
    value = kl_divergence(VonMises(f64(1.0), f64(1e-200)), VonMises(f64(0.0), f64(3.0)))
    torch.testing.assert_close(value, torch.log(torch.special.i0(f64(3.0))), rtol=8 * EPS, atol=0)


# Wishart


def wisharts():
    factors = torch.eye(2, dtype=torch.float64) + 0.3 * torch.randn(3, 2, 2, dtype=torch.float64).tril(-1)
    return Wishart(f64(4.0, 5.0, 6.0), scale_tril=factors), Wishart(
        f64(7.0), scale_tril=2 * torch.eye(2, dtype=torch.float64)
    )


def test_a_wishart_of_one_dimension_is_a_gamma():
    q, p = ((f64(3.0), f64(0.5)), (f64(8.0), f64(2.0)))  # degrees of freedom, factor
    wishart = kl_divergence(*(Wishart(df, scale_tril=scale.view(1, 1)) for df, scale in (q, p)))
    gamma = kl_divergence(*(Gamma(df / 2, 1 / (2 * scale**2)) for df, scale in (q, p)))
    torch.testing.assert_close(wishart, gamma, rtol=16 * EPS, atol=0)


def test_a_batch_of_wisharts_where_torch_is_wrong():
    q, p = wisharts()
    one_by_one = torch.stack([torch_kl(Wishart(q.df[i], scale_tril=q.scale_tril[i]), p) for i in range(3)])
    assert not torch.allclose(torch_kl(q, p.expand((3,))), one_by_one, rtol=0.1)
    torch.testing.assert_close(kl_divergence(q, p), one_by_one, rtol=1e-13, atol=0)


def test_both_wisharts_get_a_gradient_where_torch_leaves_the_first_without():
    def by_q(kl):
        df, scale_tril = f64(5.0, requires_grad=True), torch.eye(2, dtype=torch.float64).requires_grad_()
        p = Wishart(f64(7.0, requires_grad=True), scale_tril=2 * torch.eye(2, dtype=torch.float64))
        return torch.autograd.grad(kl(Wishart(df, scale_tril=scale_tril), p), (df, scale_tril), allow_unused=True)

    assert by_q(torch_kl) == (None, None)
    by_df, by_factor = by_q(kl_divergence)
    # ½ (tr M - d) - ½ (ν_p - ν_q)/2 Σψ'((ν_q - j)/2), and (ν_q/4 - ν_p) on the diagonal
    slope = (2 / 4 - 2) / 2 - (7 - 5) / 4 * float(mpmath.psi(1, 2.5) + mpmath.psi(1, 2))
    assert by_df.item() == relative(slope, rel=16 * EPS)
    torch.testing.assert_close(by_factor, (5 / 4 - 7) * torch.eye(2, dtype=torch.float64), rtol=16 * EPS, atol=0)


def test_covariance_and_precision_lead_to_the_same_wishart():
    q, p = wisharts()
    by_covariance = Wishart(q.df, covariance_matrix=q.covariance_matrix)
    by_precision = Wishart(q.df, precision_matrix=q.precision_matrix)
    for other in (by_covariance, by_precision):
        torch.testing.assert_close(kl_divergence(other, p), kl_divergence(q, p), rtol=1e-13, atol=0)


def test_a_common_linear_map_does_not_change_the_divergence():
    q, p = wisharts()
    mapped = torch.tensor([[3.0, 0.0], [-50.0, 0.01]], dtype=torch.float64)
    value = kl_divergence(*(Wishart(d.df, scale_tril=mapped @ d.scale_tril) for d in (q, p)))
    torch.testing.assert_close(value, kl_divergence(q, p), rtol=1e-12, atol=0)


# What they are made of


def test_the_nodes_are_the_gauss_rule_of_stirlings_series():
    for j in range(12):
        moment = sum(w / k ** (j + 2) for k, w in NODES)  # Σ wᵢ τᵢʲ
        expected = float((-1) ** j * mpmath.bernoulli(2 * j + 2) / ((2 * j + 2) * (2 * j + 1)))
        assert moment == relative(expected, rel=1e-13)
    moment = sum(w / k**14 for k, w in NODES)
    assert moment != relative(float(mpmath.bernoulli(26) / (26 * 25)), rel=1e-3)


def test_trigamma_has_the_digits_that_polygamma_lacks():
    x = torch.logspace(-4, 6, 200, dtype=torch.float64)
    with mpmath.workdps(40):
        expected = f64(*(float(mpmath.psi(1, v) - 1 / mpmath.mpf(v)) for v in x.tolist()))
    torch.testing.assert_close(binet_trigamma(x), expected, rtol=32 * EPS, atol=0)
    is_small = x < 1  # where the subtraction costs nothing
    assert (((torch.polygamma(1, x) - 1 / x) / expected - 1).abs()[is_small] > 1e-12).any()


def test_a_difference_of_digammas_keeps_its_digits_where_the_subtraction_has_none():
    b = torch.logspace(-4, 6, 200, dtype=torch.float64)
    a = b * (1 + 1e-9)
    with mpmath.workdps(40):
        excess = [[mpmath.psi(0, x) - mpmath.log(x) for x in t.tolist()] for t in (a, b)]
        expected = f64(*(float(x - y) for x, y in zip(*excess, strict=True)))
    torch.testing.assert_close(binet_digamma_difference(a - b, a, b), expected, rtol=32 * EPS, atol=0)
    subtracted = (torch.digamma(a) - a.log()) - (torch.digamma(b) - b.log())
    assert (subtracted / expected - 1).abs().median() > 1e-9
