"""Masks and lengths: of examples, and of the steps of sequences [batch, time, latent]."""

import math

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal

from torch_klloss import AnalyticKL, AutoKL, ELBOLoss, MonteCarloKL, diagonal_normal, standard_normal_like

BATCH, TIME, PIXELS, LATENT = 4, 5, 3, 2
LENGTHS = torch.tensor([5, 2, 0, 3])
STEPS = torch.arange(TIME) < LENGTHS.unsqueeze(-1)
OPTIONS = {
    "plain": {},
    "example": {"free_nats": 2.0},
    "dimension": {"free_nats": 0.5, "free_nats_per": "dimension"},
    "capacity": {"capacity": 3.0},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def sequences():
    """Return recon, x, mean and logvar `[batch, time, …]`, NaN in every step that does not count."""
    recon, x = torch.randn(2, BATCH, TIME, PIXELS)
    mean, logvar = torch.randn(2, BATCH, TIME, LATENT)
    tensors = [torch.where(STEPS.unsqueeze(-1), t, math.nan) for t in (recon, x, mean, logvar)]
    return [t.requires_grad_() if t is not tensors[1] else t for t in tensors]


def by_hand(recon, x, mean, logvar):
    """Return -log p(x) and the KL of every step, zero where it does not count."""
    keep = STEPS.unsqueeze(-1)
    recon, x, mean, logvar = (torch.where(keep, t, 0.0) for t in (recon, x, mean, logvar))
    nll = 0.5 * (recon - x) ** 2 + 0.5 * math.log(2 * math.pi)
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)
    return torch.where(STEPS, nll.sum(-1), 0.0), torch.where(STEPS, kl.sum(-1), 0.0)


@pytest.mark.parametrize("as_lengths", [True, False])
@pytest.mark.parametrize(("batch_dims", "count"), [(1, 3), (2, 10)])
def test_an_example_is_a_sequence_or_a_step_and_what_is_masked_counts_for_nothing(batch_dims, count, as_lengths):
    """Three of the four sequences have a step; ten steps count in all."""
    leaves = recon, x, mean, logvar = sequences()
    which = {"lengths": LENGTHS} if as_lengths else {"mask": STEPS}
    nll, kl = by_hand(*leaves)
    truth = (nll.sum() + 2 * kl.sum()) / count
    loss = ELBOLoss(AutoKL(batch_dims=batch_dims), beta=2.0)
    q = diagonal_normal(mean.nan_to_num(), logvar.nan_to_num(), 2)
    p_x = Independent(Normal(recon.nan_to_num(), 1.0), 1)
    for terms in (
        loss.from_tensors(*leaves, likelihood="gaussian", **which),
        loss(p_x, x, q, standard_normal_like(q), **which),
    ):
        assert torch.allclose(terms.loss, truth, rtol=1e-6)
        assert torch.allclose(terms.kl, kl.sum() / count, rtol=1e-6)
        assert torch.allclose(terms.kl_per_dimension.sum(), terms.kl, rtol=1e-6)
        found = torch.autograd.grad(terms.loss, (recon, mean, logvar), retain_graph=True)
        for grad, true in zip(found, torch.autograd.grad(truth, (recon, mean, logvar), retain_graph=True), strict=True):
            assert not grad.isnan().any()
            assert torch.allclose(grad, true.nan_to_num(), rtol=1e-5, atol=1e-6)
            assert (grad[~STEPS] == 0).all()


def test_padding_that_counts_changes_the_loss():
    """The twin: a mask that is forgotten."""
    leaves = [t.detach().nan_to_num() for t in sequences()]
    loss = ELBOLoss(AutoKL(batch_dims=2))
    masked = loss.from_tensors(*leaves, likelihood="gaussian", lengths=LENGTHS).loss
    assert not torch.allclose(masked, loss.from_tensors(*leaves, likelihood="gaussian").loss, rtol=1e-2)


@every_option
def test_masking_examples_is_leaving_them_out(options):
    torch.manual_seed(2)
    x, mean, logvar = torch.randn(6, PIXELS), torch.randn(6, LATENT), torch.randn(6, LATENT)
    keep, loss = torch.tensor([1, 0, 1, 1, 0, 1]).bool(), ELBOLoss(**options)
    tensors = [0 * x, x, mean, logvar]
    alone = loss.from_tensors(*(t[keep] for t in tensors), likelihood="gaussian")
    broken = [torch.where(keep.unsqueeze(-1), t, math.nan) for t in tensors]
    masked = loss.from_tensors(*broken, likelihood="gaussian", mask=keep)
    for one, other in zip(masked[:4], alone[:4], strict=True):
        assert torch.allclose(one, other, rtol=1e-6)


@every_option
def test_a_weight_of_two_is_an_example_that_comes_twice(options):
    tensors = [torch.zeros(3, PIXELS), *(torch.randn(3, n) for n in (PIXELS, LATENT, LATENT))]
    loss = ELBOLoss(**options)
    weighted = loss.from_tensors(*tensors, likelihood="gaussian", mask=torch.tensor([2.0, 1.0, 0.0]))
    twice = loss.from_tensors(*(t[[0, 0, 1]] for t in tensors), likelihood="gaussian")
    for one, other in zip(weighted[:4], twice[:4], strict=True):
        assert torch.allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("kl", [AnalyticKL(), MonteCarloKL(2000)])
def test_other_pairs_are_masked_alike(kl):
    mean = torch.where(STEPS.unsqueeze(-1), torch.ones(BATCH, TIME, LATENT), 7.0)
    q, p = MultivariateNormal(mean, torch.eye(LATENT)), MultivariateNormal(torch.zeros(LATENT), torch.eye(LATENT))
    x = torch.zeros(BATCH, TIME)
    terms = ELBOLoss(kl)(Normal(x, 1.0), x, q, p, lengths=LENGTHS)
    assert terms.kl == pytest.approx(10 / 3, abs=1e-6 if isinstance(kl, AnalyticKL) else 0.3)


def test_a_hierarchy_of_sequences_takes_one_mask():
    _, x, mean, logvar = sequences()
    q = diagonal_normal(mean.nan_to_num(), logvar.nan_to_num(), 2)
    p_x, x = Independent(Normal(torch.zeros_like(x), 1.0), 1), x.nan_to_num()
    one = ELBOLoss()(p_x, x, q, standard_normal_like(q), lengths=LENGTHS)
    two = ELBOLoss()(p_x, x, [(q, standard_normal_like(q))] * 2, lengths=LENGTHS)
    assert torch.allclose(two.kl, 2 * one.kl)
    assert len(two.kl_per_level) == 2


def test_what_drops_every_step_is_an_error():
    leaves = [t.detach().nan_to_num() for t in sequences()]
    for which in ({"mask": torch.zeros(BATCH, dtype=torch.bool)}, {"lengths": torch.zeros(BATCH, dtype=torch.long)}):
        for kl in (AutoKL(), AutoKL(batch_dims=2), AutoKL(reduction="sum")):
            if "mask" in which and kl.batch_dims == 2:
                continue
            with pytest.raises(ValueError, match="the mask drops every element"):
                ELBOLoss(kl).from_tensors(*leaves, likelihood="gaussian", **which)


def test_masks_and_lengths_that_do_not_fit_are_errors():
    leaves = [t.detach().nan_to_num() for t in sequences()]
    loss, tensors = ELBOLoss(), {"likelihood": "gaussian"}
    with pytest.raises(ValueError, match="give one of them"):
        loss.from_tensors(*leaves, **tensors, mask=STEPS, lengths=LENGTHS)
    with pytest.raises(ValueError, match="lengths must lie between 0 and the number of steps 5, got"):
        loss.from_tensors(*leaves, **tensors, lengths=LENGTHS + 1)
    with pytest.raises(TypeError, match=r"lengths must be a tensor of integers, one a sequence, got torch\.float32"):
        loss.from_tensors(*leaves, **tensors, lengths=LENGTHS.float())
    with pytest.raises(ValueError, match="mask must have, or broadcast to, the shape of the examples"):
        loss.from_tensors(*leaves, **tensors, mask=STEPS[:2])
    flat = diagonal_normal(leaves[2].flatten(1), leaves[3].flatten(1))
    with pytest.raises(ValueError, match=r"diagonal_normal\(mean, logvar, batch_dims=2\)"):
        loss(Normal(leaves[0], 1.0), leaves[1], flat, standard_normal_like(flat), lengths=LENGTHS)
