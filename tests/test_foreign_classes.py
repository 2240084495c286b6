"""Distributions of other libraries, which keep torch's interface in their own way."""

import pytest
import torch
from torch.distributions import Independent, Normal

from torch_klloss import AutoKL
from torch_klloss.elbo import IWAELoss, decompose_kl
from torch_klloss.methods import ClosedForm, Enumeration, MonteCarlo, Quadrature
from torch_klloss.samplers import IID, Antithetic, Sobol, Stratified
from torch_klloss.testing import check_kl


class Sized(Normal):
    """A Normal whose draws need a torch.Size, as a MultivariateNormal of GPyTorch does."""

    def rsample(self, sample_shape=torch.Size()):  # noqa: B008
        sample_shape.numel()
        return super().rsample(sample_shape)

    def sample(self, sample_shape=torch.Size()):  # noqa: B008
        sample_shape.numel()
        return super().sample(sample_shape)

    def log_prob(self, value):
        return super().log_prob(value)


def sized(*shape):
    return Sized(torch.ones(shape), torch.full(shape, 2.0))


@pytest.mark.parametrize("sampler", [IID(), Antithetic(), Stratified(), Sobol()], ids=repr)
@pytest.mark.parametrize("gradient", ["pathwise", "none"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_draws_are_asked_for_by_a_torch_size(sampler, gradient, chunk_size):
    method = MonteCarlo(8, sampler=sampler, gradient=gradient, chunk_size=chunk_size)
    assert method.estimate(sized(3), Normal(0.0, 1.0)).value.isfinite().all()


@pytest.mark.parametrize("gradient", ["pathwise", "none"])
def test_an_iwae_asks_for_its_draws_by_a_torch_size(gradient):
    def likelihood(z):
        return Independent(Normal(z, 1.0), 1)

    loss = IWAELoss(4, gradient=gradient)
    value = loss(
        likelihood, torch.zeros(5, 3), Independent(sized(5, 3), 1), Independent(Normal(torch.zeros(3), 1.0), 1)
    )
    assert torch.as_tensor(value.loss if hasattr(value, "loss") else value).isfinite()


def test_every_other_draw_is_asked_for_by_a_torch_size():
    assert ClosedForm().supports(sized(3), Normal(0.0, 1.0))  # the density of its own is compared with its parent's
    q, p = Independent(sized(16, 3), 1), Independent(Normal(torch.zeros(16, 3), 1.0), 1)
    decompose_kl(q, p)
    check_kl(sized(3), Normal(torch.zeros(3), 1.0))


class Unreadable(Normal):
    """A Normal whose support raises, as a TanhNormal of TorchRL does."""

    @property
    def support(self):
        raise TypeError("'>=' not supported between instances of 'NoneType' and 'float'")


@pytest.mark.parametrize("method", [ClosedForm(), MonteCarlo(64), Enumeration()], ids=repr)
@pytest.mark.parametrize("swap", [False, True])
def test_a_support_that_cannot_be_read_is_an_unknown_one(method, swap):
    q, p = Unreadable(torch.zeros(3), torch.ones(3)), Normal(torch.ones(3), 1.0)
    q, p = (p, q) if swap else (q, p)
    if isinstance(method, Enumeration):
        assert method.supports(q, p) is False
        return
    assert method.estimate(q, p).value.isfinite().all()
    assert AutoKL(fallback=[Quadrature(), MonteCarlo(8)])(q, p).isfinite()
