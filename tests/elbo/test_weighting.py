"""Free nats, capacity and balancing: each against its definition, and against common mistakes."""

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from torch_klloss import AutoKL, ELBOLoss, MonteCarloKL, diagonal_normal, kl_divergence, standard_normal_like
from torch_klloss.elbo import GECO
from torch_klloss.schedules import Linear

N, LATENT = 8, 6


def posterior():
    """Return mean and logvar with KLs on both sides of any floor near one."""
    scale = torch.linspace(0.1, 2, LATENT)
    return (torch.randn(N, LATENT) * scale).requires_grad_(), (torch.randn(N, LATENT) * 0.5).requires_grad_()


def penalty(mean, logvar, **options):
    """Return what β weighs, as the loss has it."""
    x = torch.zeros(N, 1)
    terms = ELBOLoss(beta=4.0, **options).from_tensors(x, x, mean, logvar, likelihood="gaussian")
    assert torch.allclose(terms.kl, kl_each(mean, logvar).sum() / N)  # the true KL, whatever the loss made of it
    return (terms.loss - terms.reconstruction) / 4


def kl_each(mean, logvar):
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar)


FLOORS = {
    "example": (
        {"free_nats": 5.0},
        lambda kl: kl.sum(1).clamp(min=5.0).mean(),
        lambda kl: kl.sum(1).mean().clamp(min=5.0),  # the mean first
    ),
    "dimension": (
        {"free_nats": 0.7, "free_nats_per": "dimension"},
        lambda kl: kl.mean(0).clamp(min=0.7).sum(),
        lambda kl: kl.clamp(min=0.7).sum(1).mean(),  # each example clamped where the batch mean is due
    ),
    "group": (
        {"free_nats": 1.5, "free_nats_per": "group", "free_nats_groups": 3},
        lambda kl: kl.mean(0).view(3, 2).sum(1).clamp(min=1.5).sum(),
        lambda kl: kl.mean(0).view(2, 3).sum(0).clamp(min=1.5).sum(),  # every third dimension, not each run of two
    ),
    "level": (
        {"free_nats": 7.0, "free_nats_per": "group"},
        lambda kl: kl.sum(1).mean().clamp(min=7.0),
        lambda kl: kl.sum(1).clamp(min=7.0).mean(),
    ),
    "capacity": (
        {"capacity": 5.0},
        lambda kl: (kl.sum(1).mean() - 5.0).abs(),
        lambda kl: (kl.sum(1) - 5.0).abs().mean(),  # of each example
    ),
}


@pytest.mark.parametrize(("options", "definition", "twin"), FLOORS.values(), ids=FLOORS)
def test_the_kl_is_changed_as_the_paper_says_in_value_and_gradient(options, definition, twin):
    mean, logvar = posterior()
    kl = kl_each(mean, logvar)
    found, truth = penalty(mean, logvar, **options), definition(kl)
    assert torch.allclose(found, truth, rtol=1e-5)
    for grad, true, wrong in zip(
        torch.autograd.grad(found, (mean, logvar)),
        torch.autograd.grad(truth, (mean, logvar), retain_graph=True),
        torch.autograd.grad(twin(kl), (mean, logvar)),
        strict=True,
    ):
        assert torch.allclose(grad, true, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(wrong, true, rtol=1e-2, atol=1e-3)


def test_free_nats_on_both_sides_of_the_floor_are_tested():
    kl = kl_each(*posterior())
    for values, floor in ((kl.sum(1), 5.0), (kl.mean(0), 0.7), (kl.mean(0).view(3, 2).sum(1), 1.5)):
        assert (values < floor).any()
        assert (values > floor).any()


def test_below_the_floor_there_is_no_gradient():
    mean, logvar = posterior()
    floored = penalty(mean, logvar, free_nats=100.0)
    assert floored == 100
    assert all((grad == 0).all() for grad in torch.autograd.grad(floored, (mean, logvar)))


def test_a_floor_of_an_example_is_on_all_levels_together_and_one_of_a_group_on_each():
    q = diagonal_normal(torch.ones(N, 2), torch.zeros(N, 2))
    x = torch.zeros(N, 1)
    pairs = [(q, standard_normal_like(q))] * 2  # one nat each
    for per, expected in (("example", 3.0), ("group", 6.0), ("dimension", 12.0)):
        terms = ELBOLoss(free_nats=3.0, free_nats_per=per)(Normal(x, 1.0), x, pairs)
        assert terms.loss - terms.reconstruction == pytest.approx(expected, abs=1e-5)


def test_groups_of_an_image_latent_are_its_channels():
    mean = torch.zeros(N, 3, 2, 2)
    mean[:, 1] = 1.0
    x = torch.zeros(N, 1)
    loss = ELBOLoss(free_nats=0.5, free_nats_per="group", free_nats_groups=3)
    terms = loss.from_tensors(x, x, mean, torch.zeros_like(mean), likelihood="gaussian")
    assert terms.loss - terms.reconstruction == pytest.approx(0.5 + 2.0 + 0.5, abs=1e-5)
    assert terms.kl_per_dimension.shape == (3, 2, 2)


def test_dimensions_of_a_sampled_kl_are_floored_with_their_gradients():
    mean, logvar = posterior()
    q = diagonal_normal(mean, logvar)
    options = {"free_nats": 0.01, "free_nats_per": "dimension"}
    x = torch.zeros(N, 1)
    sampled = ELBOLoss(MonteCarloKL(4000), **options)(Normal(x, 1.0), x, q, standard_normal_like(q))
    exact = ELBOLoss(**options)(Normal(x, 1.0), x, q, standard_normal_like(q))
    assert torch.allclose(sampled.loss, exact.loss, atol=0.1)
    for one, other in zip(*(torch.autograd.grad(t.loss, (mean, logvar)) for t in (sampled, exact)), strict=True):
        assert torch.allclose(one, other, atol=0.05)


def test_a_capacity_rises_with_its_schedule():
    mean, logvar = posterior()
    kl = kl_each(mean, logvar).sum() / N
    x, loss = torch.zeros(N, 1), ELBOLoss(beta=1000.0, capacity=Linear(0.0, 25.0, steps=100))
    for step, capacity in ((0, 0.0), (50, 12.5), (200, 25.0)):
        terms = loss.from_tensors(x, x, mean, logvar, likelihood="gaussian", step=step)
        assert torch.allclose(terms.loss - terms.reconstruction, 1000 * (kl - capacity).abs(), rtol=1e-4)
    with pytest.raises(ValueError, match="capacity is a schedule"):
        loss.from_tensors(x, x, mean, logvar, likelihood="gaussian")


def learned_pair(kind):
    mean, logvar = posterior()
    loc, log_scale = torch.randn(N, LATENT, requires_grad=True), torch.randn(N, LATENT, requires_grad=True)
    if kind == "normal":
        return (mean, logvar, loc, log_scale), lambda m, v, a, b: (diagonal_normal(m, v), diagonal_normal(a, b))
    return (mean, loc), lambda m, a: (Independent(Categorical(logits=m), 0), Independent(Categorical(logits=a), 0))


@pytest.mark.parametrize("kind", ["normal", "categorical"])
@pytest.mark.parametrize("share", [0.8, 0.0, 1.0])
def test_balancing_is_two_kls_with_a_gradient_stopped_on_either_side(kind, share):
    """α KL(sg(q)‖p) + (1 - α) KL(q‖sg(p)); the twin has its stops the wrong way round."""
    leaves, build = learned_pair(kind)
    x = torch.zeros(N, 1)
    terms = ELBOLoss(beta=2.0, balance=share)(Normal(x, 1.0), x, *build(*leaves))
    stopped = [t.detach() for t in leaves]
    half = len(leaves) // 2
    to_prior = kl_divergence(*build(*stopped[:half], *leaves[half:])).mean()
    to_posterior = kl_divergence(*build(*leaves[:half], *stopped[half:])).mean()
    truth = 2 * (share * to_prior + (1 - share) * to_posterior)
    twin = 2 * ((1 - share) * to_prior + share * to_posterior)
    assert torch.allclose(terms.loss - terms.reconstruction, truth, rtol=1e-5)
    found = torch.autograd.grad(terms.loss, leaves)
    for grad, true, wrong in zip(
        found,
        torch.autograd.grad(truth, leaves, retain_graph=True),
        torch.autograd.grad(twin, leaves),
        strict=True,
    ):
        assert torch.allclose(grad, true, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(wrong, true, rtol=1e-2, atol=1e-4)


def test_balancing_reaches_a_mixture_prior_that_is_sampled():
    mean, logvar = posterior()
    locs = torch.randn(2, LATENT, requires_grad=True)
    q = diagonal_normal(mean, logvar)
    p = MixtureSameFamily(Categorical(torch.ones(2)), Independent(Normal(locs, 1.0), 1))
    x = torch.zeros(N, 1)
    grads = []
    for balance in (None, 0.8):
        torch.manual_seed(5)
        loss = ELBOLoss(balance=balance)(Normal(x, 1.0), x, q, p).loss
        grads.append(torch.autograd.grad(loss, (mean, locs)))
    (by_mean, by_locs), (balanced_by_mean, balanced_by_locs) = grads
    assert torch.allclose(balanced_by_mean, 0.2 * by_mean, rtol=1e-4, atol=1e-6)
    assert torch.allclose(balanced_by_locs, 0.8 * by_locs, rtol=1e-4, atol=1e-6)


def test_a_balanced_gradient_may_have_a_graph_and_is_not_differentiated_again():
    x, leaves = torch.zeros(N, 1), [torch.rand(N, LATENT).requires_grad_() for _ in range(4)]

    def gradients(**options):
        q, p = (Independent(Normal(mean, scale + 0.5), 1) for mean, scale in (leaves[:2], leaves[2:]))
        return torch.autograd.grad(ELBOLoss(balance=0.8)(Normal(x, 1.0), x, q, p).loss, leaves, **options)

    plain, graphed = gradients(), gradients(create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, graphed, strict=True))
    for gradient in graphed:
        with pytest.raises(NotImplementedError, match="balance=None"):
            torch.autograd.grad(gradient.sum(), leaves, retain_graph=True, allow_unused=True)


def test_balancing_with_a_fixed_prior_warns():
    mean, logvar = posterior()
    x, loss = torch.zeros(N, 1), ELBOLoss(balance=0.8)
    with pytest.warns(UserWarning, match=r"balance needs a prior that learns.*multiplied by 0\.2"):
        loss.from_tensors(x, x, mean, logvar, likelihood="gaussian")
    with torch.no_grad():
        loss.from_tensors(x, x, mean, logvar, likelihood="gaussian")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"free_nats": -1.0}, r"free_nats must be finite and at least 0, got -1\.0"),
        ({"free_nats": 1.0, "free_nats_per": "latent"}, "free_nats_per must be 'example', 'dimension' or 'group', got"),
        ({"free_nats": 1.0, "free_nats_groups": 2}, "free_nats_groups needs free_nats_per='group', got 'example'"),
        ({"free_nats_per": "group", "free_nats_groups": 0}, "free_nats_groups must be an integer of at least 1, got 0"),
        ({"capacity": -1.0}, "capacity must be finite and at least 0, got -1"),
        ({"capacity": 1.0, "free_nats": 1.0}, "free_nats and capacity both say how large the KL may stay"),
        ({"balance": 1.5}, r"balance must lie in \[0, 1\].*got 1\.5"),
        ({"kl": AutoKL(reduction="sum"), "capacity": 1.0}, "capacity takes the mean over the batch.*got 'sum'"),
        (
            {"kl": AutoKL(reduction="none"), "free_nats": 1.0, "free_nats_per": "dimension"},
            "free_nats_per='dimension' takes the mean over the batch.*got 'none'",
        ),
        ({"kl": AutoKL(reduction="none"), "beta": GECO(tolerance=1.0)}, "GECO takes the mean over the batch"),
    ],
)
def test_settings_that_make_no_sense_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ELBOLoss(**options)


def test_a_grouping_that_does_not_fit_the_latent_is_an_error():
    mean, logvar = posterior()
    with pytest.raises(ValueError, match="free_nats_groups=4 must divide the number of latent dimensions, which is 6"):
        penalty(mean, logvar, free_nats=1.0, free_nats_per="group", free_nats_groups=4)
    x = torch.zeros(N, 1)
    p = MixtureSameFamily(Categorical(torch.ones(2)), Independent(Normal(torch.zeros(2, LATENT), 1.0), 1))
    loss = ELBOLoss(free_nats=1.0, free_nats_per="dimension")
    with pytest.raises(ValueError, match=r"need a KL that splits into dimensions, which.*MixtureSameFamily.*does not"):
        loss(Normal(x, 1.0), x, diagonal_normal(mean, logvar), p)
