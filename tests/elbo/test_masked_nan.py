"""NaN behind a mask: it reaches no value and no gradient, whatever the loss and its options."""

import pytest
import torch
from torch.distributions import Bernoulli, Distribution, Independent, MultivariateNormal, Normal, StudentT

from torch_klloss import AutoKL, ELBOLoss, MonteCarloKL, QuadratureKL, diagonal_normal, kl_from_log_probs
from torch_klloss.elbo import IWAELoss
from torch_klloss.methods import MonteCarlo, Quadrature

N, LATENT = 4, 3
MASKS = {
    "bool": torch.tensor([True, False, True, False]),
    "weights": torch.tensor([1.0, 0.0, 0.5, 0.0]),
}


@pytest.fixture(autouse=True)
def without_validation(monkeypatch):
    monkeypatch.setattr(Distribution, "_validate_args", False)


def parameters(value, *, shape=(N, LATENT)):
    """Return means and scales in the unit interval whose masked examples hold a value; they are leaves."""
    generator = torch.Generator().manual_seed(0)
    mean, scale = (0.1 + 0.8 * torch.rand(shape, generator=generator) for _ in range(2))
    for t in (mean, scale):
        t[1::2] = value
    return mean.requires_grad_(), scale.requires_grad_()


def families(mean, scale):
    """Yield pairs of a posterior and a prior."""
    yield diagonal_normal(mean, scale), Independent(Normal(torch.zeros(LATENT), 1.0), 1)
    yield Normal(mean, scale), StudentT(4.0, mean.flip(-1))
    yield (
        MultivariateNormal(mean, scale_tril=torch.diag_embed(scale)),
        MultivariateNormal(torch.zeros(LATENT), torch.eye(LATENT)),
    )


def assert_the_same(loss, mask, *, shape=(N, LATENT)):
    """Assert that the loss and its gradients are those of finite parameters behind the mask, and finite."""
    results = []
    for value in (0.1, float("nan")):
        leaves = parameters(value, shape=shape)
        torch.manual_seed(0)
        total = loss(*leaves, mask)
        gradients = torch.autograd.grad(total.sum(), leaves, allow_unused=True) if total.requires_grad else ()
        results.append((total.detach(), *(g for g in gradients if g is not None)))
    for finite, masked in zip(*results, strict=True):
        assert masked.isfinite().all()
        assert torch.equal(finite, masked)


KL_LOSSES = {
    "auto": AutoKL(),
    "sum": AutoKL(reduction="sum"),
    "none": AutoKL(reduction="none"),
    "quadrature": AutoKL(fallback=[Quadrature(), MonteCarlo(8)]),
    **{g: MonteCarloKL(8, gradient=g) for g in ("pathwise", "sticking_the_landing", "mixed", "score_function", "none")},
    "chunks": MonteCarloKL(8, chunk_size=3),
    "k3": MonteCarloKL(32, value="k3"),
}


@pytest.mark.filterwarnings("ignore::torch_klloss.methods.monte_carlo.tail_diagnostics.HeavyTailWarning")
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("loss", KL_LOSSES.values(), ids=KL_LOSSES)
def test_of_a_kl(loss, mask, which):
    if isinstance(loss, MonteCarloKL) and loss.method.gradient == "mixed" and which == 2:
        pytest.skip("the mixed gradient is for families of single numbers")

    def of_pair(mean, scale, mask):
        return loss(*list(families(mean, scale))[which], mask=mask)

    assert_the_same(of_pair, mask)


def test_of_a_kl_by_quadrature():
    loss = QuadratureKL()
    assert_the_same(lambda m, v, mask: loss(Normal(m, v), StudentT(4.0), mask=mask), MASKS["bool"])


ELBO_OPTIONS = {
    "plain": {},
    "free_nats": {"free_nats": 0.1},
    "dimension": {"free_nats": 0.05, "free_nats_per": "dimension"},
    "capacity": {"capacity": 1.0},
    "sum": {"kl": AutoKL(reduction="sum")},
    "none": {"kl": AutoKL(reduction="none")},
    "sampled": {"kl": MonteCarloKL(8)},
}


@pytest.mark.parametrize("likelihood", ["bernoulli", "bernoulli_logits", "gaussian"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("options", ELBO_OPTIONS.values(), ids=ELBO_OPTIONS)
def test_of_an_elbo_of_tensors(options, mask, likelihood):
    def of_tensors(mean, scale, mask):
        recon, x = mean, mean.detach().flip(-1)
        return ELBOLoss(**options).from_tensors(recon, x, mean, scale, likelihood=likelihood, mask=mask).loss

    assert_the_same(of_tensors, mask)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("options", ELBO_OPTIONS.values(), ids=ELBO_OPTIONS)
def test_of_an_elbo_of_distributions(options, mask, which):
    if "dimension" in options.values() and which:
        pytest.skip("not a KL that splits")

    def of_pair(mean, scale, mask):
        p_x = Independent(Bernoulli(logits=mean), 1)
        x = torch.where(mean.detach().isnan(), mean.detach(), 1.0)
        return ELBOLoss(**options)(p_x, x, *list(families(mean, scale))[which], mask=mask).loss

    assert_the_same(of_pair, mask)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("gradient", ["doubly_reparameterized", "pathwise", "none"])
def test_of_an_importance_weighted_bound(gradient, mask, which, reduction):
    def of_pair(mean, scale, mask):
        q, p = list(families(mean, scale))[which]
        x = torch.where(mean.detach().isnan(), mean.detach(), 1.0)
        loss = IWAELoss(4, gradient=gradient, reduction=reduction)
        # the masked examples have NaN in the decoder as well
        return loss(lambda z: Normal(z + 0 * mean.detach(), 1.0), x, q, p, mask=mask)

    assert_the_same(of_pair, mask)


@pytest.mark.parametrize("gradient", ["pathwise", "score_function", "k2", "none"])
@pytest.mark.parametrize("value", ["k1", "k2", "k3"])
def test_of_log_probabilities(value, gradient):
    def of_logs(log_q, log_p, mask):
        mask = mask.unsqueeze(-1).expand_as(log_q)
        return kl_from_log_probs(log_q, log_p, gradient=gradient, value=value, mask=mask)

    assert_the_same(of_logs, MASKS["bool"], shape=(N, 40))


@pytest.mark.parametrize("kind", ["normal", "multivariate", "elbo"])
def test_parameters_that_several_masked_steps_share_reach_nothing_either(kind):
    """A prior [batch, 1] of a sequence whose steps are all masked."""
    steps = 5

    def loss(mean, scale, mask):
        mask = mask.unsqueeze(-1).expand(N, steps)
        q_mean, scale = mean.unsqueeze(1).expand(N, steps, LATENT), scale.unsqueeze(1)
        if kind == "multivariate":
            q = MultivariateNormal(torch.zeros(N, steps, LATENT), scale_tril=torch.eye(LATENT))
            p = MultivariateNormal(q_mean, scale_tril=torch.diag_embed(scale))
        else:
            q = Independent(Normal(q_mean.detach().nan_to_num(), 1.0), 1)
            p = Independent(Normal(mean.unsqueeze(1), scale), 1)
        if kind == "elbo":
            p_x = Independent(Normal(torch.zeros(N, steps, 2), 1.0), 1)
            return ELBOLoss()(p_x, torch.ones(N, steps, 2), q, p, mask=mask).loss
        return AutoKL(batch_dims=2)(q, p, mask=mask)

    assert_the_same(loss, MASKS["bool"])
