"""Wrong KL losses, as they are met in the wild, and broken ones.

`WRONG` are functions that return a number which is not the KL, or whose gradient is not the KL's; each says in words
what is wrong with it. `BROKEN` are functions that no number could save. To add a loss, write it under `@wrong(...)` or
`@broken(...)`; `test_corpus.py` proves that it is what it says.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 -- as everybody writes it
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

from tests.auditing.losses import Loss, entry

_WRONG: list[Loss] = []
_BROKEN: list[Loss] = []
wrong = partial(entry, _WRONG)
broken = partial(entry, _BROKEN)


# What some of them return in expectation; q and p are not peeled.


def example_kls(q, p):
    kl = kl_divergence(q, p)
    return kl if kl.dim() == 1 else kl.flatten(1).sum(1)


def mean_kl(q, p):
    return example_kls(q, p).mean()


def reverse_kl(q, p):
    return mean_kl(p, q)


def mean_over_elements(q, p):
    return kl_divergence(q, p).mean()


def mean_over_classes(q, p):
    return mean_kl(q, p) / q.logits.shape[-1]


def symmetrised_kl(q, p):
    return (mean_kl(q, p) + mean_kl(p, q)) / 2


def zero(q, p):
    return torch.zeros((), dtype=torch.float64)


def cross_entropy(q, p):
    kl, entropy = example_kls(q, p), q.entropy()
    return (kl + (entropy if entropy.dim() == 1 else entropy.flatten(1).sum(1))).mean()


def times(factor, of=mean_kl):
    return lambda q, p: factor * of(q, p)


def plus(constant):
    """Return the KL with a constant added for each latent."""
    return lambda q, p: mean_kl(q, p) + constant * kl_divergence(q, p)[0].numel()


# Mean and log-variance, against a standard Normal.


@wrong("mean_logvar", "mean-over-latent", expectation=mean_over_elements)
def mean_over_everything(mu, logvar):
    return -0.5 * torch.mean(1 + logvar - mu.pow(2) - logvar.exp())


@wrong("mean_logvar", "mean-over-latent", expectation=mean_over_elements)
def mean_of_means(mu, logvar):
    return -0.5 * torch.mean(torch.mean(1 + logvar - mu.pow(2) - logvar.exp(), 1))


@wrong("mean_logvar", "mean-over-latent", expectation=mean_over_elements)
def in_place_chain_with_a_mean(mu, logvar):
    terms = mu.square().sub_(logvar).sub_(1).add_(logvar.exp())
    return terms.mean().div_(2)


@wrong("mean_logvar", "mean-over-latent", reduction="per_example", expectation=lambda q, p: kl_divergence(q, p).mean(1))
def mean_along_the_last_axis(z_mean, z_log_var):
    return -0.5 * torch.mean(1 + z_log_var - z_mean.square() - z_log_var.exp(), dim=-1)


@wrong("mean_logvar", "mean-over-latent", expectation=lambda q, p: kl_divergence(q, p).sum(0).mean())
def summed_along_the_batch(mu, logvar):
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=0)
    return kl.mean()


@wrong("mean_logvar", "missing-half", "mean-over-latent", expectation=times(2, mean_over_elements))
def mean_without_the_half(mu, log_var):
    return -torch.mean(1 + log_var - mu.pow(2) - log_var.exp())


@wrong("mean_logvar", "missing-half", expectation=times(2))
def without_the_half(mu, logvar):
    return torch.sum(logvar.exp() + mu**2 - 1 - logvar, 1).mean()


@wrong("mean_logvar", "half-twice", expectation=times(0.5))
def half_in_both_places(mu, logvar):
    element = 0.5 * (mu**2 + logvar.exp() - logvar - 1)
    return 0.5 * element.sum(1).mean()


@wrong("mean_logvar", "sum-without-dimension", reduction="per_example")
def total_for_every_example(mu, logvar):
    loss = torch.zeros(mu.shape[0], dtype=mu.dtype)
    return loss - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


@wrong("mean_logvar", "sum-without-dimension", reduction="sum", expectation=lambda q, p: 5 * example_kls(q, p).sum())
def total_added_once_an_example(mu, logvar):
    loss = 0
    for _ in range(len(mu)):
        loss = loss - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return loss


@wrong("mean_logvar", "broadcast-over-batch", reduction="sum", expectation=lambda q, p: 5 * example_kls(q, p).sum())
def column_plus_row(mu, logvar):
    square = mu.pow(2).sum(1, keepdim=True)
    rest = (logvar.exp() - logvar - 1).sum(1)
    return 0.5 * (square + rest).sum()


@wrong("mean_logvar", "extra-normaliser", expectation=times(1 / 784))
def divided_by_batch_and_pixels(mu, logvar, batch_size=None):
    kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return kld / ((batch_size or mu.shape[0]) * 784)


@wrong("mean_logvar", "extra-normaliser", expectation=times(1 / 60_000))
def divided_by_the_data_set_as_well(mu, logvar, num_data=60_000):
    kld = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(-1).mean()
    return kld / num_data


@wrong("mean_logvar", "extra-normaliser", expectation=times(1 / 5))
def divided_by_the_batch_twice(mu, logvar):
    kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=1).mean()
    return kld / mu.size(0)


@wrong("mean_logvar", "hidden-weight", expectation=times(0.00025))
def small_weight_left_inside(mu, log_var):
    kld_weight = 0.00025
    return kld_weight * torch.mean(-0.5 * torch.sum(1 + log_var - mu**2 - log_var.exp(), dim=1))


@wrong("mean_logvar", "logvar-as-logstd")
def log_variance_read_as_log_sigma(mu, logvar):
    sigma = logvar.exp()
    return ((sigma**2 + mu**2 - 1) / 2 - sigma.log()).sum(1).mean()


@wrong("mean_logvar", "logvar-as-logstd", "mean-over-latent")
def log_variance_doubled_and_averaged(mu, logvar):
    return -0.5 * torch.mean(1 + 2 * logvar - mu**2 - torch.exp(2 * logvar))


@wrong("mean_logvar", "logvar-as-scale", note="at a softplus of it, for it may be negative")
def log_variance_made_a_scale(mu, logvar):
    q = Normal(mu, F.softplus(logvar))
    return kl_divergence(q, Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum(1).mean()


@wrong("mean_logvar", "variance-as-scale")
def exp_without_the_half(mu, logvar):
    q = Independent(Normal(mu, logvar.exp()), 1)
    p = Independent(Normal(torch.zeros_like(mu), torch.ones_like(mu)), 1)
    return kl_divergence(q, p).mean()


@wrong("mean_logvar", "variance-squared")
def variance_squared(mu, logvar):
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp().pow(2), dim=1).mean()


@wrong("mean_logvar", "exp-forgotten")
def variance_without_exp(mu, logvar):
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar, dim=1).mean()


@wrong("mean_logvar", "log-forgotten")
def variance_in_place_of_its_log(mu, logvar):
    var = logvar.exp()
    return 0.5 * (mu**2 + var - var - 1).sum(1).mean()


@wrong("mean_logvar", "sign", expectation=times(-1))
def minus_forgotten(mu, logvar):
    return 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=1).mean()


@wrong("mean_logvar", "sign", "mean-over-latent", expectation=times(-1, mean_over_elements))
def elbo_term_as_a_loss(mu, logvar):
    return torch.mean(0.5 * (1 + logvar - mu.pow(2) - logvar.exp()))


@wrong("mean_logvar", "term-sign")
def plus_the_square(mu, logvar):
    return -0.5 * torch.sum(1 + logvar + mu.pow(2) - logvar.exp(), dim=1).mean()


@wrong("mean_logvar", "term-sign")
def plus_the_log(mu, logvar):
    return 0.5 * torch.sum(mu.pow(2) + logvar.exp() + logvar - 1, dim=1).mean()


@wrong("mean_logvar", "power-lost")
def mean_not_squared(mu, logvar):
    return -0.5 * torch.sum(1 + logvar - mu - logvar.exp(), dim=1).mean()


@wrong("mean_logvar", "misplaced-parenthesis")
def half_of_two_terms_only(mu, logvar):
    return (-0.5 * (1 + logvar) + mu.pow(2) + logvar.exp()).sum(1).mean()


@wrong("mean_logvar", "misplaced-parenthesis")
def square_of_the_sum(mu, logvar):
    return 0.5 * (mu.sum(1) ** 2 + (logvar.exp() - logvar - 1).sum(1)).mean()


@wrong("mean_logvar", "wrong-constant", gradient_wrong=False, expectation=plus(0.5))
def one_forgotten(mu, logvar):
    return 0.5 * torch.sum(mu.pow(2) + logvar.exp() - logvar, dim=1).mean()


@wrong("mean_logvar", "wrong-constant", gradient_wrong=False, expectation=lambda q, p: mean_kl(q, p) + 0.5 * 2)
def one_an_example_not_a_latent(mu, logvar):
    return (0.5 * torch.sum(mu**2 + logvar.exp() - logvar, 1) - 0.5).mean()


@wrong("mean_logvar", "wrong-constant", gradient_wrong=False, expectation=plus(-0.5))
def two_for_one(mu, logvar):
    return (0.5 * (mu**2 + logvar.exp() - logvar - 2)).sum(1).mean()


@wrong("mean_logvar", "floor", note="perhaps on purpose, and not the KL")
def free_bits_by_default(mu, logvar, free_bits=0.5):
    kl = 0.5 * (mu**2 + logvar.exp() - logvar - 1)
    return torch.clamp(kl, min=free_bits).sum(1).mean()


@wrong("mean_logvar", "ceiling")
def loss_clipped_from_above(mu, logvar):
    kl = 0.5 * (mu**2 + logvar.exp() - logvar - 1).sum(1)
    return kl.clamp(max=1.0).mean()


@wrong("mean_logvar", "epsilon-too-large")
def variance_kept_from_zero_too_well(mu, logvar):
    var = logvar.exp() + 0.1
    return 0.5 * (mu**2 + var - var.log() - 1).sum(1).mean()


@wrong("mean_logvar", "clamped-parameters")
def log_variance_clamped_too_early(mu, logvar):
    logvar = logvar.clamp(-0.5, 0.5)
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=1).mean()


@wrong("mean_logvar", "always-zero", expectation=zero)
def posterior_against_itself(mu, logvar):
    std = torch.exp(0.5 * logvar)
    return kl_divergence(Normal(mu, std), Normal(mu, std)).sum(1).mean()


@wrong("mean_logvar", "dims-fixed", shape=(5, 2, 2, 2, 2))
def dims_of_an_image_for_a_video(mean, logvar):
    return 0.5 * torch.sum(mean.pow(2) + logvar.exp() - 1.0 - logvar, dim=[1, 2, 3]).mean()


@wrong("mean_logvar", "dims-fixed", shape=(5, 2, 3))
def last_dim_alone_for_a_sequence(mu, logvar):
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=-1).mean()


@wrong("mean_logvar", "gradient-cut", value_wrong=False)
def mean_detached(mu, logvar):
    mu = mu.detach()
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=1).mean()


@wrong("mean_logvar", "gradient-cut", value_wrong=False, reduction="sum")
def variance_from_data(mu, logvar):
    var = logvar.data.exp()
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - var)


@wrong("mean_logvar", "draws-without-gradient", value_wrong=False, stochastic=True)
def draws_under_no_grad(mu, logvar):
    std = (0.5 * logvar).exp()
    with torch.no_grad():
        z = mu + std * torch.randn_like(std)
    log_q = -0.5 * (logvar + (z - mu) ** 2 / logvar.exp())
    return (log_q + 0.5 * z**2).sum(1).mean()


@wrong("mean_logvar", "draws-too-wide", stochastic=True)
def noise_times_the_variance(mu, logvar):
    z = mu + logvar.exp() * torch.randn_like(mu)
    log_q = -0.5 * (logvar + (z - mu) ** 2 / logvar.exp())
    return (log_q + 0.5 * z**2).sum(1).mean()


@wrong("mean_logvar", "uniform-noise", stochastic=True, reduction="per_example")
def rand_for_randn(mu, logvar):
    z = mu + (0.5 * logvar).exp() * torch.rand_like(mu)
    log_q = -0.5 * (logvar + (z - mu) ** 2 / logvar.exp())
    return (log_q + 0.5 * z**2).sum(1)


@wrong("mean_logvar", "clamped-estimate", stochastic=True)
def one_draw_never_negative(mu, logvar):
    eps = torch.randn_like(mu)
    z = mu + (0.5 * logvar).exp() * eps
    return F.relu(0.5 * (z**2 - eps**2 - logvar).sum(1)).mean()


@wrong("mean_logvar", "nan-at-extremes", inputs="extreme", note="the square of a tiny σ is zero")
def log_of_a_square_that_underflows(mu, logvar):
    sigma = torch.exp(0.5 * logvar)
    return 0.5 * torch.sum(mu**2 + sigma**2 - torch.log(sigma**2) - 1, dim=1).mean()


class KLLoss(nn.Module):
    def __init__(self, reduce=torch.mean):
        super().__init__()
        self.reduce = reduce

    def forward(self, mu, logvar):
        return self.reduce((mu * mu + logvar.exp() - logvar - 1) / 2)


wrong("mean_logvar", "mean-over-latent", name="module that averages", expectation=mean_over_elements)(KLLoss())
wrong("mean_logvar", "mean-over-latent", stated=False, name="module that averages, to be found out")(KLLoss())


# Mean and standard deviation, or its logarithm.


@wrong("mean_std", "std-as-logvar")
def std_read_as_log_variance(mu, std):
    return -0.5 * torch.sum(1 + std - mu.pow(2) - std.exp(), dim=1).mean()


@wrong("mean_std", "std-as-logvar", "mean-over-latent")
def std_read_as_log_variance_and_averaged(mean, stddev):
    return -0.5 * torch.mean(1 + stddev - mean**2 - torch.exp(stddev), dim=-1).mean()


@wrong("mean_std", "std-as-variance")
def std_read_as_variance(mu, sigma):
    return 0.5 * (sigma + mu**2 - 1 - torch.log(sigma)).sum(1).mean()


@wrong("mean_std", "std-as-logstd")
def std_read_as_log_std(mu, sigma):
    return 0.5 * (torch.exp(2 * sigma) + mu**2 - 1 - 2 * sigma).sum(1).mean()


@wrong("mean_std", "variance-as-scale")
def normal_of_a_variance(mu, std):
    return kl_divergence(Normal(mu, std**2), Normal(0.0, 1.0)).sum(1).mean()


@wrong("mean_std", "log-term-halved")
def log_of_sigma_not_doubled(mu, sigma):
    return 0.5 * torch.sum(mu**2 + sigma**2 - 1 - torch.log(sigma), dim=1).mean()


@wrong("mean_std", "power-misplaced")
def square_outside_the_log(mu, sigma):
    return 0.5 * (mu**2 + sigma**2 - 1 - sigma.log() ** 2).sum(1).mean()


@wrong("mean_std", "power-lost")
def sigma_not_squared(mu, sigma):
    return 0.5 * (mu**2 + sigma - 1 - 2 * sigma.log()).sum(1).mean()


@wrong("mean_std", "log-forgotten")
def sigma_in_place_of_its_log(mu, sigma):
    return 0.5 * (mu**2 + sigma**2 - 1 - 2 * sigma).sum(1).mean()


@wrong("mean_std", "missing-half", "term-sign")
def half_and_sign_lost(mu, std):
    return (mu**2 + std**2 - 1 + torch.log(std**2)).sum(1).mean()


@wrong("mean_std", "epsilon-too-large")
def large_number_in_the_log(mu, sigma):
    return (0.5 * (mu**2 + sigma**2 - 1) - torch.log(sigma + 0.05)).sum(1).mean()


@wrong("mean_logstd", "power-lost")
def exp_of_log_sigma_not_squared(mu, logstd):
    sigma = logstd.exp()
    return ((mu**2 + sigma - 1) / 2 - logstd).sum(1).mean()


@wrong("mean_logstd", "logstd-as-logvar")
def log_sigma_read_as_log_variance(mu, log_sigma):
    return -0.5 * torch.sum(1 + log_sigma - mu**2 - log_sigma.exp(), dim=-1).mean()


@wrong("mean_logstd", "extra-normaliser", expectation=times(1 / 5))
def divided_by_the_nodes_as_well(mu, logstd):
    nodes = mu.size(0)
    return -(0.5 / nodes) * (1 + 2 * logstd - mu**2 - logstd.exp() ** 2).sum(1).mean()


@wrong("mean_logstd", "mean-over-latent", expectation=mean_over_elements)
def log_sigma_averaged(mu, log_sigma):
    sigma = log_sigma.exp()
    return ((mu**2 + sigma**2 - 1) / 2 - log_sigma).mean()


# Distributions.


@wrong("distributions", "density-weighted-twice", stochastic=True)
def weighted_by_the_density_again(q, p):
    x = q.rsample((4,))
    log_q, log_p = q.log_prob(x), p.log_prob(x)
    return (log_q.exp() * (log_q - log_p)).mean()


@wrong("distributions", "swapped-arguments", expectation=reverse_kl)
def arguments_swapped(q, p):
    return kl_divergence(p, q).mean()


@wrong("distributions", "swapped-arguments", "mean-over-latent", family="normal")
def arguments_swapped_and_averaged(posterior, prior):
    return kl_divergence(prior, posterior).mean()


@wrong("distributions", "swapped-arguments", family="categorical", reduction="per_example", stated=False)
def categorical_swapped(q, p):
    return (p.probs * (p.logits - q.logits)).sum(-1)


@wrong("distributions", "mean-over-latent", family="normal", expectation=mean_over_elements)
def normals_averaged(q, p):
    return kl_divergence(q, p).mean()


@wrong("distributions", "mean-over-latent", family="bernoulli", expectation=mean_over_elements)
def bernoullis_averaged(q, p):
    return torch.distributions.kl_divergence(q, p).mean(dim=1).mean(dim=0)


@wrong("distributions", "mean-over-latent", family="normal", stochastic=True, expectation=mean_over_elements)
def draws_averaged_over_latents(q, p):
    z = q.rsample((8,))
    return (q.log_prob(z) - p.log_prob(z)).mean()


@wrong("distributions", "joint-against-per-dimension", family="normal", stochastic=True)
def one_density_summed_and_one_not(q, p):
    z = q.rsample()
    log_q = q.log_prob(z)
    log_p = p.log_prob(z).sum(-1, keepdim=True)
    return (log_q - log_p).mean()


@wrong("distributions", "sample-for-rsample", value_wrong=False, stochastic=True, expectation=mean_kl)
def sample_in_place_of_rsample(q, p):
    z = q.sample((4,))
    return (q.log_prob(z) - p.log_prob(z)).mean()


@wrong("distributions", "sample-for-rsample", "k3-gradient", value_wrong=False, stochastic=True)
def k3_of_detached_draws(q, p):
    z = q.sample()
    log_r = p.log_prob(z) - q.log_prob(z)
    return (log_r.exp() - 1 - log_r).mean()


@wrong("distributions", "detached-draws", value_wrong=False, stochastic=True, reduction="per_example")
def rsample_and_detach(q, p):
    z = q.rsample((16,)).detach()
    return (q.log_prob(z) - p.log_prob(z)).mean(0)


@wrong("distributions", "score-function-missing", family="categorical", value_wrong=False, stochastic=True)
def categorical_draws_without_score(q, p):
    x = q.sample((8,))
    return (q.log_prob(x) - p.log_prob(x)).mean()


@wrong("distributions", "stopped-gradient-with-k3", value_wrong=False, stochastic=True)
def sticking_the_landing_with_k3(q, p):
    z = q.rsample()
    fixed = Independent(Normal(q.base_dist.loc.detach(), q.base_dist.scale.detach()), 1)
    log_r = p.log_prob(z) - fixed.log_prob(z)
    return (log_r.exp() - 1 - log_r).mean()


@wrong("distributions", "k3-upside-down", stochastic=True, reduction="per_example")
def k3_with_the_ratio_inverted(q, p):
    z = q.rsample((16,))
    log_ratio = q.log_prob(z) - p.log_prob(z)
    return (log_ratio.exp() - 1 - log_ratio).mean(0)


@wrong("distributions", "k2-as-value", stochastic=True)
def half_the_squared_log_ratio(q, p):
    z = q.rsample((4,))
    return (0.5 * (q.log_prob(z) - p.log_prob(z)) ** 2).mean()


@wrong("distributions", "squared", stochastic=True)
def squared_log_ratio(q, p):
    z = q.rsample()
    return F.mse_loss(q.log_prob(z), p.log_prob(z))


@wrong("distributions", "absolute-value", stochastic=True)
def absolute_log_ratio(q, p):
    z = q.rsample((8,))
    return (q.log_prob(z) - p.log_prob(z)).abs().mean()


@wrong("distributions", "clamped-estimate", stochastic=True)
def log_ratio_never_negative(q, p):
    z = q.rsample((16,))
    return torch.clamp(q.log_prob(z) - p.log_prob(z), min=0).mean()


@wrong("distributions", "draws-of-p", "sign", stochastic=True, expectation=times(-1, reverse_kl))
def drawn_from_the_prior(q, p):
    z = p.rsample((4,))
    return (q.log_prob(z) - p.log_prob(z)).mean()


@wrong("distributions", "draws-of-p", "swapped-arguments", stochastic=True, expectation=reverse_kl)
def drawn_and_taken_the_other_way(q, p):
    z = p.rsample()
    return (p.log_prob(z) - q.log_prob(z)).mean()


@wrong("distributions", "sign", stochastic=True, expectation=times(-1))
def log_p_minus_log_q(q, p):
    z = q.rsample()
    return (p.log_prob(z) - q.log_prob(z)).mean()


@wrong("distributions", "cross-entropy", stochastic=True, expectation=cross_entropy)
def negative_log_likelihood(q, p):
    return -p.log_prob(q.rsample()).mean()


@wrong("distributions", "entropy-sign", stochastic=True)
def entropy_added(q, p):
    z = q.rsample()
    return (q.entropy() - p.log_prob(z)).mean()


@wrong("distributions", "symmetrised", expectation=symmetrised_kl)
def both_directions_averaged(q, p):
    return 0.5 * (kl_divergence(q, p) + kl_divergence(p, q)).mean()


@wrong("distributions", "symmetrised", expectation=times(2, symmetrised_kl))
def jeffreys(q, p):
    return (kl_divergence(q, p) + kl_divergence(p, q)).mean()


@wrong("distributions", "prior-ignored", family="normal", reduction="per_example")
def standard_normal_whatever_the_prior(q, p):
    return kl_divergence(q, Normal(torch.zeros_like(q.loc), torch.ones_like(q.scale))).sum(-1)


@wrong("distributions", "variance-as-scale", family="normal")
def rebuilt_from_variances(q, p):
    return kl_divergence(Normal(q.mean, q.variance), Normal(p.mean, p.variance)).sum(1).mean()


@wrong("distributions", "one-draw-for-the-batch", "mean-over-latent", family="normal", stochastic=True)
def first_example_for_all(q, p):
    z = q.rsample()[:1]
    return (q.log_prob(z) - p.log_prob(z)).mean()


@wrong(
    "distributions",
    "surrogate-as-value",
    family="categorical",
    stochastic=True,
    gradient="q only",
    gradient_wrong=False,
)
def reinforce_surrogate(q, p):
    x = q.sample((8,))
    cost = (q.log_prob(x) - p.log_prob(x)).detach()
    return (cost * q.log_prob(x)).mean()


@wrong("distributions", "self-including-baseline", family="categorical", value_wrong=False, stochastic=True)
def baseline_with_its_own_draw(q, p):
    x = q.sample((2,))
    log_ratio = q.log_prob(x) - p.log_prob(x)
    advantage = (log_ratio - log_ratio.mean(0)).detach()
    surrogate = advantage * q.log_prob(x)
    return (log_ratio + surrogate - surrogate.detach()).mean()


@wrong("distributions", "unweighted-grid", family="normal")
def plain_mean_over_a_grid(q, p):
    x = torch.linspace(-5, 5, 200, dtype=q.loc.dtype).reshape(-1, 1, 1)
    return (q.log_prob(x) - p.log_prob(x)).mean(0).sum(1).mean()


@wrong("distributions", "grid-without-width", family="normal")
def weighted_grid_without_its_step(q, p):
    x = torch.linspace(-8, 8, 400, dtype=q.loc.dtype).reshape(-1, 1, 1)
    log_q, log_p = q.log_prob(x), p.log_prob(x)
    return (log_q.exp() * (log_q - log_p)).mean(0).sum(1).mean()


@wrong("distributions", "mean-over-classes", family="categorical", expectation=mean_over_classes)
def categorical_averaged(q, p):
    return (q.probs * (q.probs.log() - p.probs.log())).mean()


@wrong("distributions", "unweighted-classes", family="categorical")
def categorical_without_weights(q, p):
    return (q.logits - p.logits).sum(-1).mean()


@wrong("distributions", "term-missing", family="bernoulli")
def bernoulli_ones_alone(q, p):
    a, b = q.probs, p.probs
    return (a * (a.log() - b.log())).sum(1).mean()


@wrong("distributions", "misplaced-parenthesis", family="bernoulli")
def bernoulli_wrongly_bracketed(q, p):
    a, b = q.probs, p.probs
    ones = a * a.log() - b.log()
    zeros = (1 - a) * (torch.log1p(-a) - torch.log1p(-b))
    return (ones + zeros).sum(1).mean()


@wrong("distributions", "cross-entropy", family="bernoulli", expectation=cross_entropy)
def bernoulli_cross_entropy(q, p):
    return F.binary_cross_entropy(p.probs, q.probs, reduction="none").sum(1).mean()


@wrong("distributions", "log-determinant-missing", family="multivariate")
def full_covariances_without_determinants(q, p):
    inverse = torch.linalg.inv(p.covariance_matrix)
    shift = (p.loc - q.loc).unsqueeze(-1)
    trace = (inverse @ q.covariance_matrix).diagonal(dim1=-2, dim2=-1).sum(-1)
    return 0.5 * (trace + (shift.mT @ inverse @ shift).flatten() - q.loc.shape[-1]).mean()


# Log-probabilities at draws of q.


@wrong("log_probs", "density-weighted-twice", stochastic=True)
def questions_own_line(log_qx, log_px):
    return (log_qx.exp() * (log_qx - log_px)).mean()


@wrong("log_probs", "density-weighted-twice", stochastic=True, num_samples=None, stated=False)
def questions_line_on_a_batch(log_q, log_p):
    return torch.mean(torch.exp(log_q) * (log_q - log_p))


@wrong("log_probs", "sign", stochastic=True, expectation=times(-1))
def reference_minus_policy(logprobs, ref_logprobs):
    return (ref_logprobs - logprobs).mean()


@wrong("log_probs", "kl-div-on-draws", "swapped-arguments", stochastic=True)
def kl_div_of_log_probs(log_q, log_p):
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).mean()


@wrong("log_probs", "detached-samples-k1", value_wrong=False, stochastic=True, draws="detached")
def k1_at_detached_draws(log_q, log_p):
    return (log_q - log_p).mean()


@wrong("log_probs", "detached-samples-k3", value_wrong=False, stochastic=True, draws="detached")
def k3_at_detached_draws(logp, ref_logp):
    delta = ref_logp - logp
    return (delta.exp() - delta - 1).mean()


@wrong("log_probs", "k2-as-value", stochastic=True, draws="detached", gradient="q only", gradient_wrong=False)
def k2_at_detached_draws(logp, ref_logp):
    return 0.5 * (logp - ref_logp.detach()).pow(2).mean()


@wrong("log_probs", "k2-as-value", stochastic=True)
def k2_along_the_path(log_q, log_p):
    return ((log_q - log_p) ** 2 / 2).mean()


@wrong("log_probs", "absolute-value", stochastic=True, gradient="value only", gradient_wrong=False)
def approx_kl_made_positive(logp, logp_old):
    return (logp - logp_old).detach().abs().mean()


@wrong("log_probs", "sum-over-draws", stochastic=True, reduction="per_example")
def summed_over_the_draws(log_q, log_p):
    return (log_q - log_p).sum(0)


@wrong("log_probs", "clamped-estimate", stochastic=True)
def log_ratio_clipped(log_q, log_p):
    return torch.clamp(log_q - log_p, -1.0, 1.0).mean()


@wrong("log_probs", "k3-upside-down", stochastic=True, num_samples=16)
def k3_with_the_ratio_of_the_other_side(logp, ref_logp):
    delta = logp - ref_logp
    return (torch.exp(delta) - delta - 1).mean()


@wrong("log_probs", "log-term-missing", stochastic=True, expectation=zero)
def ratio_less_one(log_q, log_p):
    return (torch.exp(log_p - log_q) - 1).mean()


@wrong("log_probs", "swapped-arguments", stochastic=True, expectation=reverse_kl)
def importance_weighted_the_other_way(log_q, log_p):
    ratio = torch.exp(log_p - log_q)
    return (ratio * (log_p - log_q)).mean()


@wrong("log_probs", "exp-forgotten", stochastic=True)
def log_probs_as_weights(log_q, log_p):
    return (log_q * (log_q - log_p)).mean()


@wrong("log_probs", "gradient-cut", value_wrong=False, stochastic=True, gradient="q only", note="z moves log p as well")
def fixed_reference_detached_with_its_path(log_q, log_p):
    return (log_q - log_p.detach()).mean()


@wrong("log_probs", "gradient-cut", value_wrong=False, stochastic=True)
def entropy_cut_off(log_q, log_p):
    return (log_q.detach() - log_p).mean()


# Draws, with the parameters that they came from.


@wrong("samples", "mean-over-latent", stochastic=True, expectation=mean_over_elements)
def log_densities_averaged(z, mean, logvar):
    log_q = Normal(mean, (0.5 * logvar).exp()).log_prob(z)
    log_p = Normal(torch.zeros_like(mean), torch.ones_like(mean)).log_prob(z)
    return torch.mean(log_q - log_p)


@wrong("samples", "density-weighted-twice", stochastic=True)
def kl_div_of_densities(z, mu, logvar):
    log_q = Normal(mu, (0.5 * logvar).exp()).log_prob(z)
    log_p = Normal(0.0, 1.0).log_prob(z)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


@wrong("samples", "std-as-variance", stochastic=True)
def square_divided_by_sigma(z, mean, logvar):
    std = torch.exp(0.5 * logvar)
    log_q = -0.5 * (logvar + (z - mean) ** 2 / std)
    return (log_q + 0.5 * z**2).sum(1).mean()


@wrong("samples", "log-determinant-missing", stochastic=True)
def squares_without_log_variance(z, mean, logvar):
    return 0.5 * (z**2 - (z - mean) ** 2 / logvar.exp()).sum(1).mean()


@wrong("samples", "detached-draws", value_wrong=False, stochastic=True)
def draw_detached(z, mean, logvar):
    z = z.detach()
    log_q = -0.5 * (logvar + (z - mean) ** 2 / logvar.exp())
    return (log_q + 0.5 * z**2).sum(1).mean()


@wrong(
    "samples", "wrong-constant", stochastic=True, gradient_wrong=False, expectation=plus(0.5 * math.log(2 * math.pi))
)
def two_pi_on_one_side(z, mean, logvar):
    log_q = -0.5 * (logvar + (z - mean) ** 2 / logvar.exp())
    log_p = -0.5 * (math.log(2 * math.pi) + z**2)
    return (log_q - log_p).sum(1).mean()


@wrong("samples", "cross-entropy", stochastic=True, expectation=cross_entropy)
def prior_alone(z, mean, logvar):
    return -Normal(0.0, 1.0).log_prob(z).sum(1).mean()


@wrong("samples", "sign", stochastic=True, stated=False, expectation=times(-1))
def negative_regulariser(z, mu, logvar):
    log_q = -0.5 * (logvar + (z - mu) ** 2 / logvar.exp())
    return (-0.5 * z**2 - log_q).sum(1).mean()


# Raw scores.


@wrong("logits", "probabilities-for-log-probabilities")
def kl_div_of_two_softmaxes(teacher_logits, student_logits):
    return F.kl_div(F.softmax(student_logits, dim=1), F.softmax(teacher_logits, dim=1), reduction="batchmean")


@wrong("logits", "log-probabilities-for-probabilities")
def kl_div_of_two_log_softmaxes(teacher_logits, student_logits):
    return F.kl_div(student_logits.log_softmax(1), teacher_logits.log_softmax(1), reduction="batchmean")


@wrong("logits", "swapped-arguments", expectation=reverse_kl, note="right, were its arguments taken as (p, q)")
def student_first(student_logits, teacher_logits):
    return F.kl_div(F.log_softmax(student_logits, dim=1), F.softmax(teacher_logits, dim=1), reduction="batchmean")


@wrong("logits", "swapped-arguments", "mean-over-classes", expectation=times(1 / 3, reverse_kl))
def student_first_and_averaged(outputs, targets):
    terms = F.kl_div(outputs.log_softmax(-1), targets.log_softmax(-1), reduction="none", log_target=True)
    return terms.mean()


@wrong("logits", "mean-over-classes", expectation=mean_over_classes)
def averaged_over_batch_and_classes(teacher_logits, student_logits):
    teacher = F.softmax(teacher_logits, dim=1)
    return F.kl_div(F.log_softmax(student_logits, dim=1), teacher, reduction="sum") / student_logits.numel()


@wrong("logits", "extra-normaliser", expectation=times(1 / 5))
def batchmean_and_the_batch_again(teacher_logits, student_logits):
    kl = F.kl_div(student_logits.log_softmax(1), teacher_logits.softmax(1), reduction="batchmean")
    return kl / len(student_logits)


@wrong("logits", "softmax-over-batch")
def softmax_along_the_batch(q_logits, p_logits):
    return F.kl_div(p_logits.log_softmax(0), q_logits.softmax(0), reduction="batchmean")


@wrong("logits", "cross-entropy", expectation=cross_entropy)
def soft_cross_entropy(target_logits, pred_logits):
    return -(target_logits.softmax(1) * pred_logits.log_softmax(1)).sum(1).mean()


@wrong("logits", "cross-entropy", gradient="p only", gradient_wrong=False, expectation=cross_entropy)
def soft_cross_entropy_of_a_fixed_teacher(teacher_logits, student_logits):
    return F.cross_entropy(student_logits, teacher_logits.detach().softmax(1))


@wrong("logits", "temperature")
def temperature_without_its_square(teacher_logits, student_logits, T=4.0):
    student = F.log_softmax(student_logits / T, dim=1)
    return F.kl_div(student, F.softmax(teacher_logits / T, dim=1), reduction="batchmean")


@wrong("logits", "temperature")
def temperature_on_one_side(teacher_logits, student_logits, T=2.0):
    student = F.log_softmax(student_logits, dim=1)
    return F.kl_div(student, F.softmax(teacher_logits / T, dim=1), reduction="batchmean")


@wrong("logits", "raw-scores")
def scores_for_log_probabilities(teacher_logits, student_logits):
    return F.kl_div(student_logits, teacher_logits.softmax(1), reduction="batchmean")


@wrong("logits", "raw-scores")
def scores_for_log_targets(teacher_logits, student_logits):
    return F.kl_div(student_logits.log_softmax(1), teacher_logits, reduction="batchmean", log_target=True)


@wrong("logits", "raw-scores")
def difference_of_scores(logits_q, logits_p):
    return (logits_q.softmax(-1) * (logits_q - logits_p)).sum(-1).mean()


@wrong("logits", "softmax-twice")
def log_softmax_of_a_softmax(q_logits, p_logits):
    q, p = q_logits.softmax(1), p_logits.softmax(1)
    return F.kl_div(F.log_softmax(p, dim=1), F.softmax(q, dim=1), reduction="batchmean")


@wrong("logits", "jensen-shannon")
def jensen_shannon(logits_q, logits_p):
    q, p = logits_q.softmax(1), logits_p.softmax(1)
    log_m = (0.5 * (q + p)).log()
    return 0.5 * (F.kl_div(log_m, q, reduction="batchmean") + F.kl_div(log_m, p, reduction="batchmean"))


@wrong("logits", "symmetrised", expectation=symmetrised_kl)
def symmetric_consistency(logits1, logits2):
    a, b = logits1.log_softmax(1), logits2.log_softmax(1)
    one = F.kl_div(a, b, reduction="batchmean", log_target=True)
    other = F.kl_div(b, a, reduction="batchmean", log_target=True)
    return (one + other) / 2


@wrong("logits", "log-forgotten")
def probability_in_place_of_its_log(q_logits, p_logits):
    q, p = q_logits.softmax(-1), p_logits.softmax(-1)
    return (q * (q.log() - p)).sum(-1).mean()


@wrong("logits", "hard-labels")
def most_likely_class_alone(teacher_logits, student_logits):
    return F.cross_entropy(student_logits, teacher_logits.argmax(1))


@wrong("logits", "sigmoid-for-softmax")
def sigmoids_for_classes(q_logits, p_logits):
    q, p = q_logits.sigmoid(), p_logits.sigmoid()
    return (q * (q / p).log()).sum(1).mean()


@wrong("logits", "clamped-terms")
def terms_never_negative(q_logits, p_logits):
    terms = F.kl_div(p_logits.log_softmax(1), q_logits.softmax(1), reduction="none")
    return terms.clamp(min=0).sum(1).mean()


@wrong("logits", "absolute-value")
def terms_made_positive(q_logits, p_logits):
    log_q, log_p = q_logits.log_softmax(1), p_logits.log_softmax(1)
    return (log_q.exp() * (log_q - log_p).abs()).sum(1).mean()


@wrong("logits", "epsilon-too-large")
def large_number_in_the_logs(q_logits, p_logits, eps=1e-1):
    q, p = q_logits.softmax(1), p_logits.softmax(1)
    return (q * torch.log((q + eps) / (p + eps))).sum(1).mean()


@wrong("logits", "bits-for-nats", expectation=times(1 / math.log(2)))
def logarithms_of_base_two(q_logits, p_logits):
    q, p = q_logits.softmax(1), p_logits.softmax(1)
    return (q * (q.log2() - p.log2())).sum(1).mean()


@wrong("logits", "always-zero", expectation=zero)
def teacher_twice(teacher_logits, student_logits):
    student = F.log_softmax(teacher_logits, dim=1)
    teacher = F.softmax(teacher_logits, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean")


@wrong("logits", "entropy-missing-gradient", value_wrong=False, note="the entropy was taken for a constant")
def entropy_without_gradient(logits_q, logits_p):
    q = logits_q.softmax(1)
    with torch.no_grad():
        entropy = torch.special.entr(q).sum(1)
    return (-(q * logits_p.log_softmax(1)).sum(1) - entropy).mean()


@wrong("logits", "nan-at-extremes", inputs="extreme")
def log_of_a_softmax(q_logits, p_logits):
    q, p = F.softmax(q_logits, dim=1), F.softmax(p_logits, dim=1)
    return (q * (torch.log(q) - torch.log(p))).sum(1).mean()


@wrong("logits", "clamped-probabilities", inputs="extreme", note="finite, and far too small")
def floor_under_extreme_probabilities(q_logits, p_logits):
    q, p = F.softmax(q_logits, dim=1).clamp_min(1e-8), F.softmax(p_logits, dim=1).clamp_min(1e-8)
    return (q * (q / p).log()).sum(1).mean()


# The order of F.kl_div: log-probabilities of p, probabilities of q.

DIVIDED_BY_CLASSES = "torch itself warns of this reduction"

wrong("kl_div", "mean-over-classes", name="nn.KLDivLoss()", expectation=mean_over_classes, note=DIVIDED_BY_CLASSES)(
    nn.KLDivLoss()
)
wrong("kl_div", "mean-over-classes", name="F.kl_div", expectation=mean_over_classes, note=DIVIDED_BY_CLASSES)(F.kl_div)
wrong("kl_div", "mean-over-classes", stated=False, name="F.kl_div, to be found out", note=DIVIDED_BY_CLASSES)(F.kl_div)


@wrong("kl_div", "mean-over-classes", expectation=mean_over_classes)
def unreduced_and_averaged(input, target):
    return F.kl_div(input, target, reduction="none").mean()


@wrong("kl_div", "swapped-arguments", expectation=reverse_kl)
def kl_div_swapped(input, target):
    return F.kl_div(target.log(), input.exp(), reduction="batchmean")


@wrong("kl_div", "probabilities-for-log-probabilities")
def kl_div_of_probabilities(input, target):
    return F.kl_div(input.exp(), target, reduction="batchmean")


@wrong("kl_div", "probabilities-for-log-probabilities")
def log_target_of_probabilities(input, target):
    return F.kl_div(input, target, reduction="batchmean", log_target=True)


@wrong("kl_div", "cross-entropy", expectation=cross_entropy)
def target_times_input(input, target):
    return -(target * input).sum(1).mean()


@wrong("kl_div", "log-twice")
def logarithm_of_a_logarithm(input, target):
    return (target * (target.log() - torch.log(input.abs()))).sum(1).mean()


@wrong("kl_div", "sign", expectation=times(-1))
def input_minus_target(input, target):
    return (target * (input - target.log())).sum(1).mean()


@wrong("kl_div", "swapped-arguments", "sign", reduction="sum", expectation=lambda q, p: -example_kls(p, q).sum())
def weights_of_the_input(input, target):
    return (input.exp() * (target.log() - input)).sum()


# Broken: `mistakes` say how, `test_corpus.py` checks each.


@broken("mean_logvar", "raises")
def shapes_that_do_not_fit(mu, logvar):
    return (mu @ logvar).sum()


@broken("distributions", "raises")
def attribute_that_is_not_there(q, p):
    return q.log_probs(p.mean).mean()


@broken("logits", "raises")
def keyword_that_is_not_there(logits_q, logits_p):
    return F.softmax(logits_q, hidden_size=-1).sum()


@broken("mean_logvar", "raises")
def dims_of_an_image_for_a_vector(mean, logvar):
    return 0.5 * torch.sum(mean.pow(2) + logvar.exp() - 1.0 - logvar, dim=[1, 2, 3])


@broken("mean_logvar", "raises", note="wants a third argument")
def needs_a_prior_too(mu, logvar, prior):
    return kl_divergence(Normal(mu, (0.5 * logvar).exp()), prior).sum()


@broken("mean_logvar", "returns-none")
def forgets_to_return(mu, logvar):
    torch.mean(-0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp(), dim=1))


@broken("mean_logvar", "returns-int")
def rounds_to_an_int(mu, logvar):
    return int(-0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp()))


@broken("mean_logvar", "returns-integer-tensor")
def rounds_to_integers(mu, logvar):
    return (-0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp(), dim=1)).long()


@broken("kl_div", "returns-complex")
def complex_logarithms(input, target):
    return (target * (torch.log(target.to(torch.complex128)) - input)).sum(1).mean()


@broken("mean_logvar", "returns-numpy")
def leaves_torch(mu, logvar):
    return (-0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp(), dim=1)).detach().numpy()


@broken("mean_logvar", "returns-list")
def one_float_an_example(mu, logvar):
    return (-0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp(), dim=1)).tolist()


@broken("mean_logvar", "returns-tuple")
def value_and_its_parts(mu, logvar):
    kl = -0.5 * (1 + logvar - mu**2 - logvar.exp())
    return kl.sum(1).mean(), kl.mean(0)


@broken("distributions", "returns-dict")
def losses_by_name(q, p):
    kl = kl_divergence(q, p).mean()
    return {"loss": kl, "kl": kl.detach()}


@broken("mean_logvar", "returns-string")
def formatted_for_the_log(mu, logvar):
    return f"{-0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp()):.3f}"


@broken("mean_logvar", "returns-nan")
def zero_over_zero(mu, logvar):
    mask = torch.zeros_like(mu)
    kl = -0.5 * (1 + logvar - mu**2 - logvar.exp())
    return (kl * mask).sum() / mask.sum()


@broken("mean_logvar", "returns-empty")
def nothing_left(mu, logvar):
    kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(1)
    return kl[kl < 0]


@broken("mean_logvar", "changes-inputs")
def squares_in_place(mu, logvar):
    return -0.5 * torch.sum(1 + logvar - mu.pow_(2) - logvar.exp())


@broken("logits", "changes-inputs")
def normalises_in_place(logits_q, logits_p):
    logits_q -= logits_q.logsumexp(1, keepdim=True)
    logits_p -= logits_p.logsumexp(1, keepdim=True)
    return (logits_q.exp() * (logits_q - logits_p)).sum(1).mean()


@broken("mean_logvar", "consumes-global-rng", note="the value is right, and needs no draw")
def draws_for_nothing(mu, logvar):
    torch.randn_like(mu)
    return -0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp())


@broken("mean_logvar", "reseeds-global-rng", stochastic=True)
def same_draw_every_time(mu, logvar):
    torch.manual_seed(42)
    eps = torch.randn_like(mu)
    z = mu + (0.5 * logvar).exp() * eps
    return 0.5 * (z**2 - eps**2 - logvar).sum(1).mean()


class AnnealedKL:
    """A weight that rises with every call."""

    def __init__(self):
        self.step = 0

    def __call__(self, mu, logvar):
        self.step += 1
        weight = min(1.0, self.step / 1000)
        return -0.5 * weight * torch.sum(1 + logvar - mu**2 - logvar.exp())


broken("mean_logvar", "stateful", name="annealed with every call")(AnnealedKL())


@broken("mean_logvar", "switches-gradients-off")
def forgets_to_switch_gradients_on(mu, logvar):
    torch.set_grad_enabled(False)
    return -0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp())


@broken("mean_logvar", "changes-default-dtype")
def sets_the_default_dtype(mu, logvar):
    torch.set_default_dtype(torch.float64)
    return -0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp())


@broken("mean_logvar", "calls-backward")
def trains_inside(mu, logvar):
    loss = -0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp())
    loss.backward()
    return loss.detach()


WRONG: tuple[Loss, ...] = tuple(_WRONG)
BROKEN: tuple[Loss, ...] = tuple(_BROKEN)
