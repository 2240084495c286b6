"""Losses under half precision, autocast and torch.func."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.distributions import Independent, MultivariateNormal, Normal, StudentT

from torch_klloss import AnalyticKL, AutoKL, KLLoss, MonteCarloKL, diagonal_normal, standard_normal_like

STANDARD = Normal(0.0, 1.0)
T = StudentT(4.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [STANDARD, T], ids=["exact", "sampled"])
def test_half_precision_is_computed_in_float32(dtype, p):
    loc = torch.full((64, 3), 2.0, dtype=dtype, requires_grad=True)
    q = Normal(loc, torch.ones((), dtype=dtype))
    value = AutoKL()(q, p)
    assert value.dtype == torch.float32
    value.backward()
    assert loc.grad.dtype == dtype
    wide = Normal(loc.detach().float().requires_grad_(), 1.0)
    assert (
        AutoKL()
        .estimate(q, p, torch.Generator().manual_seed(0))
        .value.equal(AutoKL().estimate(wide, p, torch.Generator().manual_seed(0)).value)
    )
    assert q.loc.dtype == dtype  # the user's distribution is unchanged


def test_double_precision_stays():
    q = Normal(torch.ones(3, dtype=torch.float64), 1.0)
    assert AutoKL()(q, STANDARD).dtype == MonteCarloKL(4)(q, T).dtype == torch.float64


@pytest.mark.parametrize("p", [STANDARD, T], ids=["exact", "sampled"])
def test_autocast_changes_nothing(p):
    mean, logvar = torch.randn(8, 3), torch.randn(8, 3)
    loss, q = AutoKL(), diagonal_normal(mean, logvar)
    p = Independent(p.expand((8, 3)), 1)
    expected = loss(q, p, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = loss(q, p, generator=torch.Generator().manual_seed(0))
        assert torch.is_autocast_enabled("cpu")
        low = nn.Linear(3, 3)(mean)
        assert low.dtype == torch.bfloat16
        assert loss(diagonal_normal(low, low), p).dtype == torch.float32
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def test_autocast_does_not_reach_a_matrix_product_inside():
    factor = torch.randn(8, 4, 4).tril(-1) + 2 * torch.eye(4)
    q, p = (MultivariateNormal(torch.randn(8, 4), scale_tril=f) for f in (factor, factor.flip(0)))
    expected = AutoKL()(q, p)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(AutoKL()(q, p), expected)


# torch.func


def per_example(loss: KLLoss):
    def kl(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
        q = diagonal_normal(mean, logvar, batch_dims=0)
        return loss(q, standard_normal_like(q))

    return kl


def test_it_works_under_vmap_and_grad():
    mean, logvar = torch.randn(5, 3), torch.randn(5, 3)
    q = diagonal_normal(mean, logvar)
    rows = torch.func.vmap(per_example(AutoKL()))(mean, logvar)
    torch.testing.assert_close(rows, AutoKL(reduction="none")(q, standard_normal_like(q)))
    grads = torch.func.vmap(torch.func.grad(per_example(AutoKL()), argnums=(0, 1)))(mean, logvar)
    torch.testing.assert_close(grads, (mean, (logvar.exp() - 1) / 2))


def test_sampling_works_under_vmap_and_grad():
    mean, logvar = torch.randn(5, 3), torch.randn(5, 3)
    kl = per_example(MonteCarloKL(4096))
    q = diagonal_normal(mean, logvar)
    # torch's rsample has no randomness="different".
    rows = torch.func.vmap(kl, randomness="same")(mean, logvar)
    estimate = MonteCarloKL(4096).estimate(q, standard_normal_like(q))
    assert ((rows - AnalyticKL(reduction="none")(q, standard_normal_like(q))).abs() < 6 * estimate.std_error).all()
    grads = torch.func.vmap(torch.func.grad(kl), randomness="same")(mean, logvar)
    # Each draw's gradient to the mean is its noise over σ, plus the mean: the sampled part has the error 1/√S.
    assert ((grads - mean).abs() < 6 * (logvar / 2).exp() * 4096**-0.5).all()


def test_gradients_can_be_differentiated_again():
    mean, logvar = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def kl(mean, logvar):
        q = diagonal_normal(mean, logvar)
        return AutoKL()(q, standard_normal_like(q))

    assert torch.autograd.gradcheck(kl, (mean, logvar))
    assert torch.autograd.gradgradcheck(kl, (mean, logvar))


@pytest.mark.parametrize(
    "build",
    [
        lambda m: (q := diagonal_normal(m, torch.zeros_like(m)), standard_normal_like(q)),
        lambda m: (Normal(m, 1.0), STANDARD),
        lambda m: (Independent(Normal(m, 1.0), 1), Independent(Normal(torch.zeros(4), 1.0), 1)),
    ],
    ids=["vae", "normal", "independent"],
)
def test_forward_mode_takes_the_exact_route_too(build):
    # A Function without a forward derivative raises NotImplementedError; AutoKL must not sample because of it.
    def kl(mean: torch.Tensor) -> torch.Tensor:
        return AutoKL()(*build(mean))

    mean = torch.ones(3, 4)
    value, tangent = torch.func.jvp(kl, (mean,), (torch.ones(3, 4),))
    torch.testing.assert_close(value, torch.tensor(2.0))
    torch.testing.assert_close(tangent, torch.tensor(4.0))
    torch.testing.assert_close(torch.func.jacfwd(kl)(mean), mean / 3)
    torch.testing.assert_close(torch.func.hessian(kl)(mean).reshape(12, 12), torch.eye(12) / 3)
    with forward_ad.dual_level():
        dual = kl(forward_ad.make_dual(mean, torch.ones(3, 4)))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, torch.tensor(4.0))
