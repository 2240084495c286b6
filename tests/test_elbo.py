"""The VAE loss: what it is made of, against formulas by hand, and what it refuses."""

import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.distributions import (
    Bernoulli,
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Uniform,
)
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits

from tests.processes import run
from torch_klloss import AnalyticKL, AutoKL, ELBOLoss, ELBOTerms, MonteCarloKL, diagonal_normal, standard_normal_like
from torch_klloss.elbo import GECO, PIControl
from torch_klloss.schedules import Constant, Linear

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


# What is refused


def test_x_outside_of_the_support_is_an_error_and_not_an_infinity():
    q = diagonal_normal(torch.zeros(2, 3), torch.zeros(2, 3))
    p = standard_normal_like(q)
    for validate in (True, False):
        binary = Bernoulli(torch.full((2, 1), 0.5), validate_args=validate)
        with pytest.raises(ValueError, match=r"x must lie in the support of the likelihood Bernoulli.*from 0\.3 to 1"):
            ELBOLoss()(binary, torch.tensor([[0.3], [1.0]]), q, p)
        box = Uniform(torch.zeros(2, 1), torch.ones(2, 1), validate_args=validate)
        with pytest.raises(ValueError, match="x must lie in the support of the likelihood Uniform"):
            ELBOLoss()(box, torch.tensor([[0.3], [1.5]]), q, p)
    with pytest.raises(ValueError, match="x must lie in the support of the likelihood Normal"):
        ELBOLoss()(Normal(torch.zeros(2, 1), 1.0), torch.tensor([[0.0], [math.nan]]), q, p)


@pytest.mark.parametrize("options", [{}, {"free_nats": 1.0}])
@pytest.mark.parametrize("likelihood", ["bernoulli", "bernoulli_logits"])
def test_pixels_that_were_not_scaled_are_an_error(likelihood, options):
    recon, x, mean, logvar = tensors(likelihood)
    with pytest.raises(
        ValueError, match=r"x must lie in \[0, 1\] under a Bernoulli likelihood, got values from .*x / 255"
    ):
        ELBOLoss(**options).from_tensors(recon, 255 * x, mean, logvar, likelihood=likelihood)
    with pytest.raises(ValueError, match=r"x must lie in \[0, 1\]"):
        ELBOLoss(**options).from_tensors(recon, x * math.nan, mean, logvar, likelihood=likelihood)


def test_logits_taken_for_probabilities_are_an_error():
    recon, x, mean, logvar = tensors("bernoulli_logits")
    with pytest.raises(ValueError, match=r"recon must lie in \[0, 1\].*bernoulli_logits"):
        ELBOLoss().from_tensors(recon * 10, x, mean, logvar)


def test_a_gaussian_x_that_is_not_finite_is_an_error():
    recon, x, mean, logvar = tensors("gaussian")
    with pytest.raises(ValueError, match="x must be finite"):
        ELBOLoss().from_tensors(recon, x / 0, mean, logvar, likelihood="gaussian")


def test_shapes_that_would_broadcast_are_errors():
    recon, x, mean, logvar = tensors("bernoulli")
    q = diagonal_normal(mean, logvar)
    with pytest.raises(ValueError, match="mean and logvar must have the same shape"):
        ELBOLoss().from_tensors(recon, x, mean, logvar[:1])
    with pytest.raises(ValueError, match="recon and x must have the same shape"):
        ELBOLoss().from_tensors(recon, x[:, :1], mean, logvar)
    with pytest.raises(ValueError, match="recon and x must have the same shape"):
        ELBOLoss().from_tensors(recon[:3], x[:3], mean, logvar)
    with pytest.raises(ValueError, match="x must have the shape of p_x"):
        ELBOLoss()(Normal(recon, 1.0), x[:, :1], q, standard_normal_like(q))
    with pytest.raises(ValueError, match="p_x must have the examples"):
        ELBOLoss()(Normal(recon[:3], 1.0), x[:3], q, standard_normal_like(q))


@pytest.mark.parametrize("value", [-81.0, 81.0])
@pytest.mark.parametrize("options", [{}, {"free_nats": 1.0}])
def test_a_log_variance_beyond_80_warns(value, options):
    recon, x, mean, logvar = tensors("bernoulli")
    with torch.no_grad():
        logvar[0, 0] = value
    with pytest.warns(UserWarning, match="logvar should stay within ±80"):
        terms = ELBOLoss(**options).from_tensors(recon, x, mean, logvar)
    assert_same(terms.kl, kl_by_hand(mean.double(), logvar.double()).sum() / N)
    q = diagonal_normal(mean, logvar)
    with pytest.warns(UserWarning, match="logvar should stay within ±80"):
        ELBOLoss(**options)(Normal(recon, 1.0), x, q, standard_normal_like(q))


def test_parameters_that_are_nan_are_torchs_error():
    recon, x, mean, logvar = tensors("bernoulli")
    with pytest.raises(ValueError, match="loc"):
        ELBOLoss().from_tensors(recon, x, mean * math.nan, logvar)


def test_wrong_kinds_are_errors():
    recon, x, mean, logvar = tensors("bernoulli")
    q = diagonal_normal(mean, logvar)
    with pytest.raises(TypeError, match=r"p_x must be a torch\.distributions\.Distribution.*from_tensors"):
        ELBOLoss()(recon, x, q, standard_normal_like(q))
    with pytest.raises(TypeError, match="kl must be a KLLoss"):
        ELBOLoss(kl=torch.distributions.kl_divergence)
    with pytest.raises(ValueError, match="likelihood must be 'bernoulli', 'bernoulli_logits' or 'gaussian', got 'bce'"):
        ELBOLoss().from_tensors(recon, x, mean, logvar, likelihood="bce")
    with pytest.raises(TypeError, match="beta must be a number"):
        ELBOLoss(beta="1")


# As a module

LOSSES = {
    "plain": ELBOLoss(AnalyticKL(), beta=2.0),
    "schedule": ELBOLoss(beta=Linear(steps=4), free_nats=0.1, free_nats_per="dimension"),
    "capacity": ELBOLoss(beta=100.0, capacity=Constant(2.0)),
    "geco": ELBOLoss(beta=GECO(tolerance=3.0)),
    "pi": ELBOLoss(beta=PIControl(target=3.0)),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@every_loss
def test_the_loss_is_a_plain_module(loss):
    leaves = tensors()
    expected = copy.deepcopy(loss).from_tensors(*leaves, likelihood="bernoulli_logits", step=1).loss
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), nn.Sequential(loss)[0].to(torch.device("cpu"))):
        assert isinstance(twin, nn.Module)
        assert repr(twin) == repr(loss)
        fresh = copy.deepcopy(twin)
        fresh.load_state_dict(loss.state_dict())
        assert torch.equal(fresh.from_tensors(*leaves, likelihood="bernoulli_logits", step=1).loss, expected)


def test_the_settings_are_printed():
    text = repr(ELBOLoss(beta=Linear(steps=4), free_nats=0.1, free_nats_per="dimension", balance=0.8))
    for part in (
        "beta=Linear(start=0.0, stop=1.0, steps=4",
        "nats=0.1, per='dimension'",
        "balance=0.8",
        "(kl): AutoKL(",
    ):
        assert part in text


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss, dtype):
    half = [t.detach().to(dtype) for t in tensors("bernoulli")]
    terms = copy.deepcopy(loss).from_tensors(*half, step=1)
    full = copy.deepcopy(loss).from_tensors(*(t.float() for t in half), step=1)
    assert terms.loss.dtype == torch.float32
    assert torch.equal(terms.loss, full.loss)
    q = diagonal_normal(*half[2:])
    p_x = Independent(Normal(half[0], torch.ones_like(half[0])), 1)
    assert copy.deepcopy(loss)(p_x, half[1], q, standard_normal_like(q), step=1).loss.dtype == torch.float32


@every_loss
def test_autocast_changes_nothing(loss):
    leaves = tensors("bernoulli")
    expected = copy.deepcopy(loss).from_tensors(*leaves, step=1).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(copy.deepcopy(loss).from_tensors(*leaves, step=1).loss, expected)


COMPILED = """
import copy, json, torch
from tests.test_elbo import LOSSES, tensors
torch.set_num_threads(1)
torch.manual_seed(0)
leaves = recon, x, mean, logvar = tensors()
def step(loss):
    return loss.from_tensors(*leaves, likelihood="bernoulli_logits", step=1)
out = {}
for name, loss in LOSSES.items():
    eager = step(copy.deepcopy(loss))
    traced = torch.compile(step, fullgraph=True, backend="aot_eager")(copy.deepcopy(loss))
    grads = [torch.autograd.grad(terms.loss, (recon, mean, logvar)) for terms in (eager, traced)]
    gaps = [(one - other).abs().max() / one.abs().max() for one, other in zip(*grads)]
    out[name] = [((eager.loss - traced.loss) / eager.loss).abs().item(), torch.stack(gaps).max().item()]
"""


@pytest.fixture(scope="module")
def compiled_gaps():
    return run(COMPILED + "print(json.dumps(out))")


@pytest.mark.parametrize("name", LOSSES)
def test_a_compiled_loss_is_the_eager_one(compiled_gaps, name):
    assert max(compiled_gaps[name]) < 64 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("options", [{}, {"free_nats": 1.0}, {"free_nats": 0.1, "free_nats_per": "dimension"}])
def test_whoever_watches_the_kl_sees_every_call_and_changes_nothing(options):
    recon, x, mean, logvar = tensors("bernoulli")
    q = diagonal_normal(mean, logvar)
    calls = {
        "tensors": lambda loss: loss.from_tensors(recon, x, mean, logvar),
        "distributions": lambda loss: loss(Normal(recon, 1.0), x, q, standard_normal_like(q)),
        "masked": lambda loss: loss.from_tensors(recon, x, mean, logvar, mask=torch.arange(N) < 3),
        "mixture": lambda loss: loss(Normal(recon, 1.0), x, q, mixture_prior()),
    }
    for name, call in calls.items():
        if name == "mixture" and options.get("free_nats_per"):
            continue
        alone, watched, seen = ELBOLoss(**options), ELBOLoss(**options), []
        watched.kl.register_forward_hook(lambda module, args, output, seen=seen: seen.append((args, output)))
        torch.manual_seed(3)
        expected, after = call(alone), torch.rand(())
        torch.manual_seed(3)
        found = call(watched)
        assert torch.equal(after, torch.rand(()))
        assert torch.equal(found.loss, expected.loss)
        ((pair, value),) = seen
        assert pair[0].event_shape == q.event_shape
        shares = (torch.arange(N) < 3) if name == "masked" else torch.ones(N)
        assert_same((value * shares).sum() / shares.sum(), expected.kl)


def mixture_prior():
    components = Independent(Normal(torch.tensor([[-1.0] * LATENT, [1.0] * LATENT]), 1.0), 1)
    return MixtureSameFamily(Categorical(torch.ones(2)), components)


def test_the_kl_passed_in_stays_as_it_is():
    kl = AutoKL(reduction="mean")
    loss = ELBOLoss(kl)
    assert kl.reduction == "mean"
    assert loss.kl is not kl
    assert isinstance(loss.kl, AutoKL)


def test_the_loss_needs_torch_alone():
    blocked = ["lightning", "pytorch_lightning", "matplotlib", "scipy", "sklearn"]
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); from torch_klloss import ELBOLoss; ELBOLoss()"
    subprocess.run([sys.executable, "-c", code], check=True)
