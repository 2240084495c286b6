"""Errors and warnings of the VAE loss."""

import math

import pytest
import torch
from torch.distributions import (
    Bernoulli,
    Independent,
    Normal,
    Uniform,
)

from tests.elbo.test_loss import N, assert_same, kl_by_hand, tensors
from torch_klloss import ELBOLoss, diagonal_normal, standard_normal_like


def test_x_outside_of_the_support_is_an_error_and_not_an_infinity():
    q = diagonal_normal(torch.zeros(2, 3), torch.zeros(2, 3))
    p = standard_normal_like(q)
    for validate in (True, False):
        binary = Bernoulli(torch.full((2, 1), 0.5), validate_args=validate)
        logits = Independent(Bernoulli(logits=torch.zeros(2, 1), validate_args=validate), 1)
        for likelihood in (binary, logits):
            with pytest.raises(ValueError, match=r"x must lie in the support of .*Bernoulli.*from 0\.3 to 1"):
                ELBOLoss()(likelihood, torch.tensor([[0.3], [1.0]]), q, p)
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


def test_the_tensors_of_a_loss_function_are_told_of_from_tensors():
    recon, x, mean, logvar = torch.rand(4, 6), torch.rand(4, 6), torch.zeros(4, 2), torch.zeros(4, 2)
    with pytest.raises(TypeError, match=r"takes distributions, got a tensor as q.*from_tensors\(recon, x, mean"):
        ELBOLoss()(recon, x, mean, logvar)


def test_a_posterior_without_a_prior_is_told_of_the_standard_one():
    q = diagonal_normal(torch.zeros(4, 2), torch.zeros(4, 2))
    with pytest.raises(TypeError, match=r"a posterior q needs its prior p: .*standard_normal_like\(q\)"):
        ELBOLoss()(Independent(Normal(torch.zeros(4, 6), 1.0), 1), torch.zeros(4, 6), q)
