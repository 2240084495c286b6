"""The importance-weighted bound: exact where the posterior is, tighter with K, and its gradients without bias."""

import itertools
import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.distributions import (
    AffineTransform,
    Bernoulli,
    Beta,
    Categorical,
    Independent,
    MultivariateNormal,
    Normal,
    SigmoidTransform,
    TanhTransform,
    TransformedDistribution,
    Uniform,
)

from torch_klloss import AutoKL, ELBOLoss, MonteCarloKL, diagonal_normal, standard_normal_like
from torch_klloss.elbo import IWAELoss

STANDARD = Independent(Normal(torch.zeros(1, dtype=torch.float64), 1.0), 1)


def leaves(n=1):
    """Return the parameters of q, the mean of p and a scale of the decoder: x = 1, z of one dimension, nothing fits."""
    values = (0.3, -0.4, -0.5, 1.3)
    return [torch.full((n, 1), v, dtype=torch.float64, requires_grad=True) for v in values]


def model(mean, logvar, loc, weight):
    q = Independent(Normal(mean, (logvar / 2).exp()), 1)
    p = Independent(Normal(loc, torch.ones_like(loc)), 1)
    x = torch.ones_like(mean)
    return (lambda z: Independent(Normal(weight * z, torch.ones_like(z)), 1)), x, q, p


def exact_bound(num_samples, points=2001):
    """Return the bound of K = 2 samples and its gradients, by the trapezoidal rule over both draws' noise."""
    parameters = leaves()
    likelihood, x, q, p = model(*parameters)
    noise = torch.linspace(-9, 9, points, dtype=torch.float64)
    density = Normal(0.0, 1.0).log_prob(noise).exp() * (noise[1] - noise[0])
    z = q.base_dist.loc + q.base_dist.scale * noise.unsqueeze(-1)
    log_weight = likelihood(z.unsqueeze(1)).log_prob(x) + p.log_prob(z.unsqueeze(1)) - q.log_prob(z.unsqueeze(1))
    log_weight = log_weight.squeeze(-1)
    if num_samples == 1:
        bound = (density * log_weight).sum()
    else:
        pairs = torch.logaddexp(log_weight.unsqueeze(0), log_weight.unsqueeze(1)) - math.log(2)
        bound = (density.unsqueeze(0) * density.unsqueeze(1) * pairs).sum()
    return bound.detach(), torch.autograd.grad(-bound, parameters)


@pytest.mark.parametrize("num_samples", [1, 2])
@pytest.mark.parametrize("gradient", ["doubly_reparameterized", "pathwise"])
def test_value_and_gradient_are_unbiased_against_quadrature(num_samples, gradient):
    """Every one of n copies draws its own noise: their mean is off by its standard error."""
    bound, gradients = exact_bound(num_samples)
    n = 200_000
    parameters = leaves(n)
    loss = IWAELoss(num_samples, gradient=gradient, reduction="none")
    value = loss(*model(*parameters))
    assert abs(value.mean() + bound) < 5 * value.std() / n**0.5
    for grad, true in zip(torch.autograd.grad(value.sum(), parameters), gradients, strict=True):
        assert abs(grad.mean() - true) < 5 * grad.std() / n**0.5 + 1e-12


def test_weights_that_are_not_squared_show_in_the_gradient():
    """The twin: sticking the landing without the second weight, which is biased from K = 2 on."""
    _, gradients = exact_bound(2)
    n = 200_000
    mean, logvar, loc, weight = leaves(n)
    likelihood, x, q, p = model(mean, logvar, loc, weight)
    z = q.rsample((2,))
    stopped = Independent(Normal(mean.detach(), (logvar.detach() / 2).exp()), 1)
    log_weight = likelihood(z).log_prob(x) + p.log_prob(z) - stopped.log_prob(z)
    (grad,) = torch.autograd.grad(-log_weight.logsumexp(0).sum(), logvar)
    assert abs(grad.mean() - gradients[1]) > 20 * grad.std() / n**0.5


def test_the_doubly_reparameterised_gradient_agrees_with_the_pathwise_one_at_64_samples_and_is_quieter():
    n, spread = 20_000, {}
    means = {}
    for gradient in ("doubly_reparameterized", "pathwise"):
        parameters = leaves(n)
        value = IWAELoss(64, gradient=gradient, reduction="none")(*model(*parameters))
        grads = torch.autograd.grad(value.sum(), parameters[:2])
        means[gradient] = torch.stack([g.mean() for g in grads])
        spread[gradient] = torch.stack([g.std() / n**0.5 for g in grads])
    error = (spread["pathwise"] ** 2 + spread["doubly_reparameterized"] ** 2).sqrt()
    assert ((means["pathwise"] - means["doubly_reparameterized"]).abs() < 5 * error).all()
    assert (spread["doubly_reparameterized"] < spread["pathwise"] / 3).all()


def test_the_exact_posterior_has_weights_that_do_not_vary():
    x = torch.randn(10, 3)
    q = diagonal_normal(x / 2, torch.full((10, 3), 0.5).log())
    loss = IWAELoss(4)
    bound = -loss(lambda z: Independent(Normal(z, 1.0), 1), x, q, standard_normal_like(q))
    assert torch.allclose(bound, Normal(0.0, 2**0.5).log_prob(x).sum(-1).mean(), rtol=1e-5)


def test_the_bound_rises_with_the_number_of_samples_up_to_the_evidence():
    n, bounds = 100_000, []
    for num_samples in (1, 2, 4, 16):
        with torch.no_grad():
            values = -IWAELoss(num_samples, reduction="none")(*model(*leaves(n)))
        bounds.append((values.mean(), values.std() / n**0.5))
    for (low, low_error), (high, high_error) in itertools.pairwise(bounds):
        assert high - low > 3 * (low_error**2 + high_error**2) ** 0.5
    # x = w z + ε with z ~ N(loc, 1)
    loc, weight = -0.5, 1.3
    evidence = Normal(loc * weight, (1 + weight**2) ** 0.5).log_prob(torch.tensor(1.0))
    assert bounds[-1][0] < evidence
    assert evidence - bounds[-1][0] < 0.02


def test_one_sample_is_the_elbo_with_a_sampled_kl():
    parameters = leaves(50_000)
    likelihood, x, q, p = model(*parameters)
    torch.manual_seed(3)
    one = IWAELoss(1)(likelihood, x, q, p)
    two = ELBOLoss(MonteCarloKL(1))(likelihood(q.rsample()), x, q, p).loss
    assert torch.allclose(one, two, atol=0.05)


class DigitsVAE(nn.Module):
    """A VAE of 8x8 digits, small enough to train within a test."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
        self.decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64))

    def posterior(self, x):
        return diagonal_normal(*self.encoder(x).chunk(2, -1))

    def likelihood(self, z):
        return Independent(Bernoulli(logits=self.decoder(z)), 1)


def test_on_held_out_digits_the_bound_of_64_samples_is_above_the_elbo_and_rises():
    images = (torch.as_tensor(load_digits().data, dtype=torch.float32) / 16 > 0.5).float()
    train, held_out = images[:1500], images[1500:]
    model, elbo = DigitsVAE(), ELBOLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(20):
        for x in train.split(100):
            q = model.posterior(x)
            optimizer.zero_grad()
            elbo(model.likelihood(q.rsample()), x, q, standard_normal_like(q)).loss.backward()
            optimizer.step()
    with torch.no_grad():
        q = model.posterior(held_out)
        p = standard_normal_like(q)
        each = ELBOLoss(AutoKL(reduction="none"))
        estimates = [lambda: each(model.likelihood(q.sample()), held_out, q, p).loss]
        for k in (2, 8, 64):
            bound = IWAELoss(k, reduction="none")
            estimates.append(lambda bound=bound: bound(model.likelihood, held_out, q, p))
        bounds = [-torch.stack([estimate() for _ in range(16)]).mean(0) for estimate in estimates]
    for low, high in itertools.pairwise(bounds):
        gain = high - low
        assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5
    assert (bounds[-1] - bounds[0]).mean() > 0.5


def test_masked_examples_are_left_out_and_half_precision_is_float32():
    likelihood, x, q, p = model(*leaves(4))
    mask = torch.tensor([True, False, True, True])
    assert IWAELoss(4)(likelihood, x, q, p, mask=mask).isfinite()
    with pytest.raises(ValueError, match="the mask drops every element"):
        IWAELoss(4)(likelihood, x, q, p, mask=mask & ~mask)
    half = diagonal_normal(*torch.zeros(2, 4, 2, dtype=torch.bfloat16))
    value = IWAELoss(4)(lambda z: Normal(z, 1.0), torch.zeros(4, 2), half, standard_normal_like(half))
    assert value.dtype == torch.float32


def test_a_generator_leaves_the_global_stream_alone():
    torch.manual_seed(0)
    after = torch.rand(())
    torch.manual_seed(0)
    args = model(*leaves(4))
    values = {IWAELoss(4)(*args, generator=torch.Generator().manual_seed(7)).item() for _ in range(2)}
    assert len(values) == 1
    assert torch.rand(()) == after


def test_what_cannot_be_differentiated_is_refused_and_can_be_evaluated():
    q = Categorical(torch.ones(4, 3))
    x, p = torch.zeros(4), Categorical(torch.ones(3))
    likelihood = lambda z: Normal(z.float(), 1.0)
    with pytest.raises(NotImplementedError, match=r"needs q\.rsample, which Categorical lacks"):
        IWAELoss(4)(likelihood, x, q, p)
    with torch.no_grad():
        assert IWAELoss(4)(likelihood, x, q, p).isfinite()
    end = torch.ones(4, requires_grad=True)
    with pytest.raises(NotImplementedError, match="whose support moves"):
        IWAELoss(4)(likelihood, x, Uniform(torch.zeros(4), end), Normal(0.0, 1.0))


def test_bad_arguments_are_errors():
    likelihood, x, q, p = model(*leaves(4))
    with pytest.raises(ValueError, match="num_samples must be an integer of at least 1, got 0"):
        IWAELoss(0)
    with pytest.raises(ValueError, match="gradient must be one of 'doubly_reparameterized', 'pathwise', 'none', got"):
        IWAELoss(4, gradient="dreg")
    with pytest.raises(ValueError, match=r"likelihood\(z\) must be a distribution over \(4, 4, 1\)"):
        IWAELoss(4)(lambda z: likelihood(z[0]), x, q, p)
    with pytest.raises(TypeError, match=r"likelihood\(z\) must return"):
        IWAELoss(4)(lambda z: z, x, q, p)


def test_any_posterior_that_can_be_sampled_will_do():
    q = MultivariateNormal(torch.zeros(4, 2), torch.eye(2))
    value = IWAELoss(8)(lambda z: Normal(z, 1.0), torch.zeros(4, 2), q, standard_normal_like(q))
    assert value.isfinite()


def exact_curvature(points=201):
    """Return the second derivatives of the bound of K = 2 samples, by the trapezoidal rule over both draws' noise."""
    noise = torch.linspace(-8, 8, points, dtype=torch.float64)
    density = Normal(0.0, 1.0).log_prob(noise).exp() * (noise[1] - noise[0])

    def bound(theta):
        likelihood, x, q, p = model(*theta.reshape(4, 1, 1))
        z = (q.base_dist.loc + q.base_dist.scale * noise.unsqueeze(-1)).unsqueeze(1)
        log_weight = (likelihood(z).log_prob(x) + p.log_prob(z) - q.log_prob(z)).squeeze(-1)
        pairs = torch.logaddexp(log_weight.unsqueeze(0), log_weight.unsqueeze(1)) - math.log(2)
        return -(density.unsqueeze(0) * density.unsqueeze(1) * pairs).sum()

    return torch.func.hessian(bound)(torch.cat(leaves()).detach().flatten())


def second_derivatives(gradient, of, by, n=100_000):
    """Return one second derivative for each of n copies."""
    parameters = leaves(n)
    torch.manual_seed(0)
    value = IWAELoss(2, gradient=gradient, reduction="sum")(*model(*parameters))
    (first,) = torch.autograd.grad(value, parameters[of], create_graph=True)
    return torch.autograd.grad(first.sum(), parameters[by])[0]


@pytest.mark.parametrize("gradient", ["doubly_reparameterized", "pathwise"])
def test_second_derivatives_are_unbiased_or_refused(gradient):
    exact = exact_curvature()
    for of, by in itertools.product(range(4), repeat=2):
        if gradient == "doubly_reparameterized" and min(of, by) < 2:  # one of them is q's
            with pytest.raises(NotImplementedError, match="gradient='pathwise'"):
                second_derivatives(gradient, of, by, n=2)
        else:
            found = second_derivatives(gradient, of, by)
            assert abs(found.mean() - exact[of, by]) < 5 * found.std() / len(found) ** 0.5 + 1e-9


def test_a_graph_of_the_gradient_that_is_not_used_changes_nothing():
    def gradients(**options):
        parameters = leaves(3)
        torch.manual_seed(0)
        return torch.autograd.grad(IWAELoss(4)(*model(*parameters)), parameters, **options)

    for found, expected in zip(gradients(create_graph=True), gradients(), strict=True):
        assert torch.equal(found, expected)

    def value(*parameters):
        torch.manual_seed(0)
        return IWAELoss(4)(*model(*parameters))

    parameters = [t.detach() for t in leaves(3)]
    for found, expected in zip(torch.func.grad(value, argnums=(0, 1, 2, 3))(*parameters), gradients(), strict=True):
        torch.testing.assert_close(found, expected)
    with pytest.raises(NotImplementedError, match="gradient='pathwise'"):
        torch.func.hessian(value)(*parameters)
    with pytest.raises(NotImplementedError, match="gradient='pathwise'"):
        torch.func.jvp(value, tuple(parameters), tuple(parameters))


def saturated(mean, cache=0):
    """Return a tanh policy whose draws round to the end of its support, and the base-space quantities of it."""
    base = Normal(mean, torch.ones_like(mean))
    return Independent(TransformedDistribution(base, [TanhTransform(cache_size=cache)]), 1)


def base_space_bound(mean, num_samples, stopped):
    """Return the bound of a saturated policy under the uniform law, in the space of the draws before tanh.

    With `stopped` log q has fixed parameters, and the gradient to the draws is multiplied by their weights once more.
    """
    u = mean + torch.randn(num_samples, *mean.shape, dtype=mean.dtype)
    if stopped:
        u = u.view_as(u)
    log_slope = 2 * (math.log(2) - u - torch.nn.functional.softplus(-2 * u))
    log_q = Normal(mean.detach() if stopped else mean, 1.0).log_prob(u) - log_slope
    log_likelihood = Normal(u.tanh(), 1.0).log_prob(torch.ones_like(u))
    log_weight = (log_likelihood - math.log(2) - log_q).sum(-1)
    if stopped:
        weights = log_weight.detach().softmax(0).unsqueeze(-1)
        u.register_hook(lambda grad: weights * grad)
    return -(log_weight.logsumexp(0) - math.log(num_samples))


@pytest.mark.parametrize("cache", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gradient", ["doubly_reparameterized", "pathwise", "none"])
def test_a_saturated_posterior_has_the_bound_and_the_gradient_of_the_space_it_was_drawn_in(gradient, dtype, cache):
    mean = torch.full((5, 3), 20.0, dtype=dtype, requires_grad=True)
    p = Independent(Uniform(-torch.ones(5, 3, dtype=dtype), torch.ones(5, 3, dtype=dtype)), 1)
    torch.manual_seed(0)
    found = IWAELoss(8, gradient=gradient, reduction="none")(
        lambda z: Independent(Normal(z, 1.0), 1), torch.ones(5, 3, dtype=dtype), saturated(mean, cache), p
    )
    torch.manual_seed(0)
    expected = base_space_bound(mean, 8, stopped=gradient == "doubly_reparameterized")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if gradient != "none":
        grads = [torch.autograd.grad(value.sum(), mean)[0] for value in (found, expected)]
        assert grads[0].abs().min() > 0.1
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_a_learned_transform_has_the_doubly_reparameterised_gradient_of_its_plain_form():
    """exp(a + b u) is drawn through a learned affine map; a LogNormal of the same parameters has the same gradient."""
    grads = []
    for form in ("transformed", "plain"):
        loc = torch.full((4, 2), 0.3, dtype=torch.float64, requires_grad=True)
        scale = torch.full((4, 2), 0.7, dtype=torch.float64, requires_grad=True)
        base = Normal(torch.zeros_like(loc), torch.ones_like(loc))
        image = TransformedDistribution(base, [AffineTransform(loc, scale), SigmoidTransform()])
        plain = TransformedDistribution(Normal(loc, scale), [SigmoidTransform()])
        q = Independent(image if form == "transformed" else plain, 1)
        p = Independent(Beta(torch.full_like(loc, 2.0), torch.ones_like(loc)), 1)
        torch.manual_seed(0)
        bound = IWAELoss(6)(lambda z: Independent(Normal(z, 1.0), 1), torch.ones_like(loc), q, p)
        grads.append(torch.autograd.grad(bound, [loc, scale]))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected)
