"""The VAE loss and its terms, against formulas by hand."""

import math

import pytest
import torch
from torch.distributions import (
    Bernoulli,
    Independent,
    MultivariateNormal,
    Normal,
)
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits

from torch_klloss import AutoKL, ELBOLoss, ELBOTerms, MonteCarloKL, diagonal_normal, standard_normal_like
from torch_klloss.schedules import Linear

N, PIXELS, LATENT = 6, 5, 3
LIKELIHOODS = ("bernoulli", "bernoulli_logits", "gaussian")
every_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def tensors(likelihood="bernoulli_logits", dtype=torch.float32, shape=(N,)):
    """Return recon, x, mean and logvar, all leaves but x."""
    recon, x = torch.randn(*shape, PIXELS, dtype=dtype), torch.rand(*shape, PIXELS, dtype=dtype)
    recon = recon.sigmoid() if likelihood == "bernoulli" else recon
    mean, logvar = torch.randn(2, *shape, LATENT, dtype=dtype)
    return recon.requires_grad_(), x, mean.clone().requires_grad_(), logvar.clone().requires_grad_()


def nll_by_hand(recon, x, likelihood):
    if likelihood == "bernoulli":
        return binary_cross_entropy(recon, x, reduction="none")
    if likelihood == "bernoulli_logits":
        return binary_cross_entropy_with_logits(recon, x, reduction="none")
    return -Normal(recon, torch.ones_like(recon)).log_prob(x)


def kl_by_hand(mean, logvar):
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar)


def loss_by_hand(recon, x, mean, logvar, likelihood, beta=1.0):
    return (nll_by_hand(recon, x, likelihood).sum() + beta * kl_by_hand(mean, logvar).sum()) / len(x)


def assert_same(value, truth, ulps=32):
    """Sums of a few dozen terms: each rounds a few times, and so do their partial sums."""
    eps, value, truth = torch.finfo(value.dtype).eps, value.detach().double(), truth.detach().double()
    assert torch.allclose(value, truth, rtol=ulps * eps, atol=ulps * eps * truth.abs().max().item())


# Values and gradients


@every_likelihood
@both_dtypes
def test_the_loss_from_tensors_is_the_one_by_hand_in_value_and_gradient(likelihood, dtype):
    leaves = recon, _, mean, logvar = tensors(likelihood, dtype)
    terms = ELBOLoss(beta=2.5).from_tensors(*leaves, likelihood=likelihood)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    truth = loss_by_hand(*wide, likelihood, beta=2.5)
    assert terms.loss.dtype == dtype
    assert_same(terms.loss, truth)
    assert_same(terms.reconstruction, nll_by_hand(wide[0], wide[1], likelihood).sum() / N)
    assert_same(terms.kl, kl_by_hand(wide[2], wide[3]).sum() / N)
    assert_same(terms.kl_per_dimension, kl_by_hand(wide[2], wide[3]).mean(0))
    found = torch.autograd.grad(terms.loss, (recon, mean, logvar))
    for grad, true in zip(found, torch.autograd.grad(truth, (wide[0], wide[2], wide[3])), strict=True):
        assert_same(grad, true)
    twice = loss_by_hand(*wide, likelihood, beta=2.5**2)  # β applied twice
    over_latent = nll_by_hand(wide[0], wide[1], likelihood).sum() / N + 2.5 * kl_by_hand(wide[2], wide[3]).mean()
    assert not torch.allclose(terms.loss.double(), twice, rtol=1e-2)
    assert not torch.allclose(terms.loss.double(), over_latent, rtol=1e-2)


@every_likelihood
@pytest.mark.parametrize("term", ["loss", "reconstruction", "kl", "kl_per_dimension"])
def test_every_term_carries_its_own_gradient(likelihood, term):
    """The terms come out of one node of the graph: each has to be differentiated as the formula that it is."""
    leaves = recon, _, mean, logvar = tensors(likelihood)
    value = getattr(ELBOLoss(beta=3.0).from_tensors(*leaves, likelihood=likelihood), term)
    weights = torch.arange(1.0, 1 + value.numel()).reshape(value.shape)
    found = torch.autograd.grad((weights * value).sum(), (recon, mean, logvar), allow_unused=True)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    nll, kl = nll_by_hand(wide[0], wide[1], likelihood).sum() / N, kl_by_hand(wide[2], wide[3]).mean(0)
    truth = {"loss": nll + 3 * kl.sum(), "reconstruction": nll, "kl": kl.sum(), "kl_per_dimension": kl}[term]
    true = torch.autograd.grad((weights * truth).sum(), (wide[0], wide[2], wide[3]), allow_unused=True)
    for grad, expected in zip(found, true, strict=True):
        zero = torch.zeros(())
        assert_same(zero if grad is None else grad, zero if expected is None else expected)


@every_likelihood
def test_second_derivatives_are_those_of_the_formula(likelihood):
    leaves = recon, _, mean, logvar = tensors(likelihood)

    def curvature(loss, recon, mean, logvar):
        grads = torch.autograd.grad(loss, (recon, mean, logvar), create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in grads), (recon, mean, logvar))

    found = curvature(ELBOLoss().from_tensors(*leaves, likelihood=likelihood).loss, recon, mean, logvar)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    true = curvature(loss_by_hand(*wide, likelihood), wide[0], wide[2], wide[3])
    for grad, expected in zip(found, true, strict=True):
        assert_same(grad, expected, ulps=128)


def test_a_kl_near_zero_keeps_its_digits():
    """Where the posterior has collapsed, exp(v) - 1 - v of a float32 v has none left."""
    v = torch.full((N, LATENT), 3e-5)
    recon, x, _, _ = tensors()
    for loss in (ELBOLoss(), ELBOLoss(free_nats=1.0)):  # in one node, and term by term
        kl = loss.from_tensors(recon, x, torch.zeros_like(v), v, likelihood="bernoulli_logits").kl
        wide = v.double()
        truth = (wide**2 / 4 + wide**3 / 12).sum() / N
        assert torch.allclose(kl.double(), truth, rtol=1e-6, atol=0)
    by_hand = -0.5 * torch.sum(1 + v - v.exp()) / N
    assert not torch.allclose(by_hand.double(), truth, rtol=0.5, atol=0)


def test_the_loss_from_distributions_is_that_from_tensors():
    recon, x, mean, logvar = tensors()
    x = x.round()
    q = diagonal_normal(mean, logvar)
    terms = ELBOLoss(beta=0.5)(Independent(Bernoulli(logits=recon), 1), x, q, standard_normal_like(q))
    same = ELBOLoss(beta=0.5).from_tensors(recon, x, mean, logvar, likelihood="bernoulli_logits")
    for one, other in zip(terms[:4], same[:4], strict=True):
        assert_same(one, other)
    assert isinstance(terms, ELBOTerms)
    assert terms.beta == 0.5
    assert terms.kl_per_level == (terms.kl,)


@pytest.mark.parametrize("shape", [(N,), (N, 2)], ids=str)
@pytest.mark.parametrize("batch_dims", [0, 1, 2])
def test_logits_and_the_usual_pair_take_a_short_way_to_the_same(shape, batch_dims):
    """Against the long way, which a mask of ones takes."""
    recon, x, mean, logvar = tensors(shape=shape)
    x = x.round()
    loss = ELBOLoss(AutoKL(batch_dims=batch_dims), beta=2.0)
    q = diagonal_normal(mean, logvar, len(shape))
    arguments = Independent(Bernoulli(logits=recon), 1), x, q, standard_normal_like(q)
    short, long = loss(*arguments), loss(*arguments, mask=torch.ones(shape[:batch_dims], dtype=torch.bool))
    assert short.loss.grad_fn is not None
    for one, other in zip(short[:4], long[:4], strict=True):
        assert_same(one, other)
    gradients = (torch.autograd.grad(terms.loss, (recon, mean, logvar)) for terms in (short, long))
    for one, other in zip(*gradients, strict=True):
        assert_same(one, other)


def test_the_short_way_is_not_taken_where_the_batch_is_none():
    """Two dimensions of one event are no examples."""
    mean, logvar = torch.randn(2, N, LATENT)
    q = diagonal_normal(mean, logvar, batch_dims=0)
    recon, x = torch.randn(PIXELS), torch.ones(PIXELS)
    terms = ELBOLoss()(Independent(Bernoulli(logits=recon), 1), x, q, standard_normal_like(q))
    assert_same(terms.kl, kl_by_hand(mean.double(), logvar.double()).sum())
    assert_same(terms.reconstruction, nll_by_hand(recon.double(), x.double(), "bernoulli_logits").sum())


@pytest.mark.parametrize("event_dims", [0, 1, 3])
def test_all_dimensions_of_x_and_of_the_latent_are_summed_whatever_is_event_and_what_is_batch(event_dims):
    x, mean = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 5)
    p_x = Independent(Normal(torch.zeros_like(x), 1.0), event_dims)
    q, p = Normal(mean, 1.0), Normal(0.0, 1.0)
    terms = ELBOLoss()(p_x, x, q, p)
    assert_same(terms.kl, (mean.double() ** 2 / 2).sum() / 4)
    assert_same(terms.reconstruction, -Normal(0.0, 1.0).log_prob(x).double().sum() / 4)
    assert terms.kl_per_dimension.shape == (2, 5)


def test_a_learned_prior_gets_its_gradient():
    _, x, mean, logvar = tensors()
    loc = torch.randn(N, LATENT, requires_grad=True)
    q, p = diagonal_normal(mean, logvar), diagonal_normal(loc, torch.zeros(N, LATENT))
    terms = ELBOLoss()(Independent(Normal(torch.zeros_like(x), 1.0), 1), x, q, p)
    (by_loc,) = torch.autograd.grad(terms.loss, loc)
    assert_same(by_loc, (loc - mean).detach() / N)
    assert_same(terms.kl_per_dimension.sum(), terms.kl)


def test_a_kl_that_does_not_split_has_no_dimensions():
    x = torch.randn(N, PIXELS)
    q, p = MultivariateNormal(torch.ones(N, 3), torch.eye(3)), MultivariateNormal(torch.zeros(3), torch.eye(3))
    terms = ELBOLoss()(Normal(x, 1.0), x, q, p)
    assert terms.kl_per_dimension is None
    assert_same(terms.kl, torch.tensor(1.5))


def test_a_sampled_kl_trains_by_its_own_draws_and_reports_dimensions_beside_the_random_stream():
    x, mean = torch.randn(2000, PIXELS), torch.randn(2000, LATENT)
    q = diagonal_normal(mean, torch.zeros_like(mean))
    p, p_x = standard_normal_like(q), Normal(x, 1.0)
    truth = (mean**2 / 2).sum(1).mean()
    torch.manual_seed(1)
    terms = ELBOLoss(MonteCarloKL(4))(p_x, x, q, p)
    after = torch.rand(())
    torch.manual_seed(1)
    alone = MonteCarloKL(4)(q, p)
    assert torch.equal(after, torch.rand(()))
    assert_same(terms.kl, alone)
    # log q - log p = ½ (z² - ε²) has the variance μ² a dimension
    error = (mean**2).sum().sqrt() / 2000 / 2
    assert abs(terms.kl - truth) < 5 * error
    assert abs(terms.kl_per_dimension.sum() - truth) < 5 * error


def test_one_set_of_weights_is_counted_once_with_batch_dims_of_zero():
    """A Bayesian regression: the likelihood of all data, and one posterior over its weights."""
    x, loc = torch.randn(20), torch.ones(3)
    terms = ELBOLoss(AutoKL(batch_dims=0))(Normal(torch.zeros(20), 1.0), x, Normal(loc, 1.0), Normal(0.0, 1.0))
    assert_same(terms.kl, torch.tensor(1.5))
    assert_same(terms.reconstruction, -Normal(0.0, 1.0).log_prob(x).sum())


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_reduction_of_the_kl_holds_for_all_terms(reduction):
    leaves = tensors()
    mean_terms = ELBOLoss(beta=2.0).from_tensors(*leaves, likelihood="bernoulli_logits")
    terms = ELBOLoss(AutoKL(reduction=reduction), beta=2.0).from_tensors(*leaves, likelihood="bernoulli_logits")
    for one, mean in zip(terms[:3], mean_terms[:3], strict=True):
        assert one.shape == (() if reduction == "sum" else (N,))
        assert_same(one.sum() / N, mean)


def test_bits_per_dimension_are_of_the_elbo_whatever_beta_is():
    recon, x, mean, logvar = tensors("gaussian")
    terms = ELBOLoss(beta=10.0).from_tensors(recon, x, mean, logvar, likelihood="gaussian")
    truth = (terms.reconstruction + terms.kl) / PIXELS / math.log(2)
    assert_same(terms.bits_per_dimension(PIXELS), truth)
    # The integers 256 x have the density of x, divided by 256 in every dimension.
    assert_same(terms.bits_per_dimension(PIXELS, levels=256), truth + 8)
    with pytest.raises(ValueError, match="num_dimensions and levels must be at least 1, got 0 and 1"):
        terms.bits_per_dimension(0)


@every_likelihood
def test_a_flat_reconstruction_meets_an_image(likelihood):
    recon, x, mean, logvar = tensors(likelihood)
    flat = ELBOLoss().from_tensors(recon, x, mean, logvar, likelihood=likelihood).loss
    image = ELBOLoss().from_tensors(recon, x.view(N, 1, 1, PIXELS), mean, logvar, likelihood=likelihood).loss
    assert torch.equal(flat, image)


def test_probabilities_of_zero_and_one_cost_what_they_cost_in_torch():
    recon, x = torch.tensor([[0.0, 1.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    terms = ELBOLoss().from_tensors(recon, x, torch.zeros(1, 2), torch.zeros(1, 2))
    assert terms.reconstruction == binary_cross_entropy(recon, x, reduction="sum") == 200


# β


def test_beta_is_a_number_that_can_be_set():
    loss, leaves = ELBOLoss(), tensors()
    assert loss.beta == 1.0
    loss.beta = 0.25
    terms = loss.from_tensors(*leaves, likelihood="bernoulli_logits")
    assert terms.beta == loss.beta == 0.25
    assert_same(terms.loss, terms.reconstruction + 0.25 * terms.kl)
    with pytest.raises(ValueError, match="beta must be finite and at least 0, got -1"):
        loss.beta = -1.0


def test_a_schedule_is_driven_by_the_step_or_by_whoever_sets_beta():
    loss, leaves = ELBOLoss(beta=Linear(steps=10)), tensors("bernoulli")
    assert loss.from_tensors(*leaves, step=5).beta == 0.5
    with pytest.raises(ValueError, match=r"beta is a schedule, Linear\(.*\): pass step=…, or let the KLAnnealing"):
        loss.from_tensors(*leaves)
    loss.beta = 0.75
    assert loss.from_tensors(*leaves).beta == 0.75
    assert loss.from_tensors(*leaves, step=2).beta == 0.2  # what is passed wins


@pytest.mark.parametrize("beta", [-1.0, math.nan, math.inf])
def test_a_beta_that_is_no_weight_is_an_error(beta):
    with pytest.raises(ValueError, match="beta must be finite and at least 0"):
        ELBOLoss(beta=beta)


def test_a_schedule_that_goes_below_zero_is_an_error_when_it_does():
    loss = ELBOLoss(beta=Linear(1.0, -1.0, steps=10))
    leaves = tensors("bernoulli")
    assert loss.from_tensors(*leaves, step=5).beta == 0
    with pytest.raises(ValueError, match=r"beta must be finite and at least 0, got -0\.1"):
        loss.from_tensors(*leaves, step=6)


# A list of latents


def hierarchy():
    q1, q2 = diagonal_normal(torch.ones(N, 4), torch.zeros(N, 4)), Normal(torch.full((N, 2), 2.0), 1.0)
    return q1, standard_normal_like(q1), q2, Normal(0.0, 1.0)


def test_a_hierarchy_adds_its_levels_up_and_reports_each():
    q1, p1, q2, p2 = hierarchy()
    x = torch.randn(N, PIXELS)
    terms = ELBOLoss(beta=2.0)(Normal(x, 1.0), x, [(q1, p1), (q2, p2)])
    assert [kl.item() for kl in terms.kl_per_level] == [2.0, 4.0]
    assert terms.kl == 6
    assert [kl.tolist() for kl in terms.kl_per_dimension] == [[0.5] * 4, [2.0] * 2]
    assert_same(terms.loss, terms.reconstruction + 12)
    assert ELBOLoss()(Normal(x, 1.0), x, [q1, q2], [p1, p2]).kl == 6


def test_a_hierarchy_that_does_not_pair_up_is_an_error():
    q1, p1, q2, _ = hierarchy()
    x = torch.randn(N, PIXELS)
    with pytest.raises(ValueError, match="a list of 2 posteriors needs as many priors, got 1 priors"):
        ELBOLoss()(Normal(x, 1.0), x, [q1, q2], [p1])
    with pytest.raises(TypeError, match=r"q must be a list of \(q, p\) pairs"):
        ELBOLoss()(Normal(x, 1.0), x, [q1, q2])
    with pytest.raises(ValueError, match="at least one"):
        ELBOLoss()(Normal(x, 1.0), x, [])
