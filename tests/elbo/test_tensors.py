"""`ELBOLoss.from_tensors`: dtypes, probabilities of 0 and 1, and the steps of a single sequence."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, ContinuousBernoulli, Independent, Normal
from torch.nn import functional

from torch_klloss import AutoKL, ELBOLoss, MonteCarloKL, diagonal_normal, standard_normal_like
from torch_klloss.elbo.likelihoods import tensor_nll

STEPS, LATENT = 5, 3
LIKELIHOODS = ("bernoulli", "bernoulli_logits", "gaussian")


def sequence():
    """Return recon, x, mean and logvar of one sequence, and the KL of each of its steps."""
    generator = torch.Generator().manual_seed(0)
    recon, x, mean, logvar = (torch.rand(STEPS, LATENT, generator=generator, dtype=torch.float64) for _ in range(4))
    return recon, x, mean, logvar, 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(-1)


@pytest.mark.parametrize(
    ("which", "weights"),
    [
        ({"mask": torch.tensor([True, True, False, False, True])}, [1.0, 1.0, 0.0, 0.0, 1.0]),
        ({"mask": torch.tensor([1.0, 0.5, 0.0, 2.0, 0.0])}, [1.0, 0.5, 0.0, 2.0, 0.0]),
        ({"lengths": torch.tensor(2)}, [1.0, 1.0, 0.0, 0.0, 0.0]),
    ],
    ids=["bool", "weights", "lengths"],
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"free_nats": 1e-6}, {"free_nats": 1e-6, "free_nats_per": "group"}], ids=str)
def test_the_steps_of_one_sequence_without_a_batch_are_weighed(which, weights, reduction, options):
    if "free_nats_per" in options and reduction != "mean":
        return  # refused
    recon, x, mean, logvar, each = sequence()
    expected = (each * torch.tensor(weights, dtype=torch.float64)).sum()
    loss = ELBOLoss(AutoKL(reduction=reduction, batch_dims=0), **options)
    q = diagonal_normal(mean, logvar)
    terms = loss.from_tensors(recon, x, mean, logvar, **which)
    same = loss(Independent(ContinuousBernoulli(recon), 1), x, q, standard_normal_like(q), **which)
    for t in (terms, same):
        torch.testing.assert_close(t.kl, expected)
        torch.testing.assert_close(t.kl_per_dimension.sum(), expected)
        torch.testing.assert_close(t.loss, t.reconstruction + expected)


def test_a_sampled_kl_weighs_them_too():
    recon, x, mean, logvar, each = sequence()
    loss = ELBOLoss(MonteCarloKL(4096, batch_dims=0, gradient="none"))
    mask = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
    terms = loss.from_tensors(recon, x, mean, logvar, mask=mask, generator=torch.Generator().manual_seed(0))
    assert abs(terms.kl.item() - each[0].item()) < 6 * math.sqrt(2 * LATENT / 4096)


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("of_recon", DTYPES[:4], ids=str)
@pytest.mark.parametrize("of_x", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"free_nats": 0.1}, {"mask": torch.ones(2)}], ids=["plain", "free", "mask"])
def test_recon_and_x_of_any_two_dtypes_are_computed_with_in_the_wider_one(likelihood, of_recon, of_x, options):
    recon = torch.tensor([[0.3, 0.7], [0.9, 0.1]], dtype=torch.float64).to(of_recon).requires_grad_()
    x = torch.tensor([[0, 1], [1, 0]]).to(of_x)
    zeros, mask = torch.zeros(2, 1), options.get("mask")
    loss = ELBOLoss(free_nats=options.get("free_nats", 0.0))
    got = loss.from_tensors(recon, x, zeros, zeros, likelihood=likelihood, mask=mask).reconstruction
    wide = torch.float64 if torch.float64 in (of_recon, of_x) else torch.float32
    assert got.dtype == wide
    expected = ELBOLoss().from_tensors(recon.double(), x.double(), zeros, zeros, likelihood=likelihood).reconstruction
    torch.testing.assert_close(got.double(), expected, rtol=8 * torch.finfo(wide).eps, atol=0)
    assert torch.autograd.grad(got, recon)[0].dtype == of_recon


@pytest.mark.parametrize("of_logits", DTYPES[:4], ids=str)
@pytest.mark.parametrize("of_x", DTYPES, ids=str)
def test_the_same_of_distributions(of_logits, of_x):
    logits = torch.tensor([[0.3, 0.7], [0.9, 0.1]], dtype=torch.float64).to(of_logits)
    x = torch.tensor([[0, 1], [1, 0]])
    q = diagonal_normal(torch.zeros(2, 1), torch.zeros(2, 1))
    p_x = Independent(Bernoulli(logits=logits), 1)
    got = ELBOLoss()(p_x, x.to(of_x), q, standard_normal_like(q)).reconstruction
    wide = torch.float64 if torch.float64 in (of_logits, of_x) else torch.float32
    assert got.dtype == wide
    expected = functional.binary_cross_entropy_with_logits(logits.double(), x.double(), reduction="sum") / 2
    precision = torch.float64 if of_logits is torch.float64 else torch.float32  # torch computes in that of the logits
    torch.testing.assert_close(got.double(), expected, rtol=8 * torch.finfo(precision).eps, atol=0)


@pytest.mark.parametrize(("of_mean", "of_logvar"), [(a, b) for a in DTYPES[:4] for b in DTYPES[:4]])
def test_mean_and_logvar_of_any_two_dtypes(of_mean, of_logvar):
    mean, logvar = torch.full((2, 1), 0.5).to(of_mean), torch.full((2, 1), 0.25).to(of_logvar)
    kl = ELBOLoss().from_tensors(torch.ones(2, 1), torch.ones(2, 1), mean, logvar).kl
    wide = torch.float64 if torch.float64 in (of_mean, of_logvar) else torch.float32
    assert kl.dtype == wide
    torch.testing.assert_close(
        kl.item(), 0.5 * (0.25 + math.expm1(0.25) - 0.25), rtol=8 * torch.finfo(wide).eps, atol=0
    )


# Probabilities at and beside 0 and 1, and x that they equal or miss.
PROBS = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.3, 1.0, 0.0, 1e-30, 1 - 2**-24]).unsqueeze(-1)
X = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.5, 0.25, 0.0, 1.0]).unsqueeze(-1)


@pytest.mark.parametrize(
    "options",
    [{}, {"mask": torch.ones(9)}, {"free_nats": 1e-6}, {"kl": AutoKL(reduction="sum")}, {"beta": 0.0, "capacity": 0.0}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_of_0_and_1_have_torchs_gradient_by_every_way(options, dtype):
    probs, x, mask = PROBS.to(dtype).requires_grad_(), X.to(dtype), options.get("mask")
    loss = ELBOLoss(**{key: option for key, option in options.items() if key != "mask"})
    zeros = torch.zeros(len(x), 1, dtype=dtype)
    terms = loss.from_tensors(probs, x, zeros, zeros, mask=mask)
    expected = functional.binary_cross_entropy(probs, x, reduction="sum")
    if loss.reduction == "mean":
        expected = expected / len(x)
    torch.testing.assert_close(terms.reconstruction, expected)
    torch.testing.assert_close(*(torch.autograd.grad(t, probs)[0] for t in (terms.reconstruction, expected)))


def test_their_gradient_is_finite_under_torch_func_and_in_forward_mode():
    def nll(probs):
        return tensor_nll(probs, X, "bernoulli").sum()

    expected = torch.func.grad(lambda probs: functional.binary_cross_entropy(probs, X, reduction="sum"))(PROBS)
    torch.testing.assert_close(torch.func.grad(nll)(PROBS), expected)
    each = torch.func.vmap(torch.func.grad(lambda p, x: tensor_nll(p, x, "bernoulli").sum()))(PROBS, X)
    torch.testing.assert_close(each, expected)
    tangent = (PROBS == X).float()
    assert torch.func.jvp(nll, (PROBS,), (tangent,))[1] == 0


def test_the_likelihood_of_probabilities_has_second_derivatives_and_one_to_x():
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.rand(6, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(lambda p, x: tensor_nll(p, x, "bernoulli"), leaves)
    assert torch.autograd.gradgradcheck(lambda p, x: tensor_nll(p, x, "bernoulli"), leaves)


def test_a_posterior_beside_the_normal_is_weighed_too():
    """A hierarchy of two levels without a batch dimension."""
    x, mask = torch.zeros(STEPS, 2), torch.tensor([1.0, 0.0, 0.0, 2.0, 0.0])
    levels = [(Normal(torch.ones(STEPS), 1.0), Normal(0.0, 1.0)), (Normal(torch.zeros(STEPS), 1.0), Normal(1.0, 1.0))]
    terms = ELBOLoss(AutoKL(batch_dims=0))(Independent(Normal(x, 1.0), 1), x, levels, mask=mask)
    assert [level.item() for level in terms.kl_per_level] == [1.5, 1.5]
