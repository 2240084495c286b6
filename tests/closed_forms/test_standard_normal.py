"""The fused sum of the VAE's pair: its digits, and what it keeps for the backward pass."""

import pytest
import torch

from torch_klloss import AutoKL, diagonal_normal, standard_normal_like

SIZES = [(64, 8), (512, 64)]  # the first is small enough for another formula
EPS = torch.finfo(torch.float32).eps


def _kl(mean, logvar, reduction="none"):
    q = diagonal_normal(mean, logvar)
    return AutoKL(reduction=reduction)(q, standard_normal_like(q))


def _log_variances(size):
    """Cover both signs from 1e-8 to the ends of the range of float32."""
    magnitudes = torch.logspace(-8, 1.9, size[0] * size[1] // 2)
    return torch.cat([magnitudes, -magnitudes])[torch.randperm(size[0] * size[1])].reshape(size)


@pytest.mark.parametrize("size", SIZES)
def test_each_gradient_entry_is_good_to_four_units_in_the_last_place(size):
    mean, logvar = torch.randn(size).requires_grad_(), _log_variances(size).requires_grad_()
    by_mean, by_logvar = torch.autograd.grad(_kl(mean, logvar).sum(), (mean, logvar))
    assert torch.equal(by_mean, mean)
    expected = logvar.detach().double().expm1() / 2
    assert ((by_logvar - expected).abs() <= 4 * EPS * expected.abs()).all()
    plain = (logvar.detach().exp() - 1) / 2
    assert not ((plain - expected).abs() <= 4 * EPS * expected.abs()).all()


@pytest.mark.parametrize("size", SIZES)
def test_the_kl_of_rows_that_fade_out_keeps_its_digits(size):
    fading = torch.logspace(0, -8, size[0]).unsqueeze(-1)
    mean, logvar = fading * torch.randn(size), fading * torch.randn(size)
    wide_mean, wide_logvar = mean.double(), logvar.double()
    truth = (wide_mean**2 + wide_logvar.expm1() - wide_logvar).sum(-1) / 2
    allowed = torch.where(truth > 1e-2, 4 * EPS * truth, 1e-8 * size[1])
    assert ((_kl(mean, logvar) - truth).abs() <= allowed).all()


@pytest.mark.parametrize("size", SIZES)
def test_a_retained_graph_gives_the_same_gradient_again(size):
    mean, logvar = torch.randn(size).requires_grad_(), torch.randn(size).requires_grad_()
    kl = _kl(mean, logvar, "mean")
    first = torch.autograd.grad(kl, (mean, logvar), retain_graph=True)
    kept = [g.clone() for g in first]
    for again in (torch.autograd.grad(kl, (mean, logvar), retain_graph=True), torch.autograd.grad(kl, (mean, logvar))):
        for one, other in zip(again, kept, strict=True):
            torch.testing.assert_close(one, other, rtol=4 * EPS, atol=0)
    for one, other in zip(first, kept, strict=True):
        assert torch.equal(one, other)  # and leaves the first one alone


@pytest.mark.parametrize("size", SIZES)
def test_a_second_derivative_is_that_of_the_exponential(size):
    mean, logvar = torch.randn(size).requires_grad_(), torch.randn(size).requires_grad_()
    first = torch.autograd.grad(_kl(mean, logvar).sum(), (mean, logvar), create_graph=True)
    by_mean, by_logvar = torch.autograd.grad(sum(g.sum() for g in first), (mean, logvar))
    assert torch.equal(by_mean, torch.ones(size))
    # torch takes it as (exp(v) - 1) + 1, which rounds at 1
    torch.testing.assert_close(by_logvar, logvar.detach().exp() / 2, rtol=4 * EPS, atol=EPS)


@pytest.mark.usefixtures("unvalidated")
def test_a_row_that_is_not_a_number_leaves_the_others_their_digits():
    logvar = torch.full((4, 8), 1e-4)
    logvar[1] = torch.nan
    kl = _kl(torch.zeros(4, 8), logvar)
    truth = 8 * (torch.tensor(1e-4).double().expm1() - torch.tensor(1e-4).double()) / 2
    assert kl[1].isnan()
    assert (kl[[0, 2, 3]] - truth).abs().max() <= 1e-8 * 8
    assert (kl[[0, 2, 3]] - truth).abs().max() <= 4 * EPS * truth
