"""Correct KL losses, in the styles of those who write them by hand.

`CORRECT` is in the order of this file. To add a loss, write it under `@correct(...)`; `test_corpus.py` proves it.
"""

import importlib.util
import math
import warnings
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 -- as everybody writes it
from torch import nn
from torch.distributions import (
    Categorical,
    Independent,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

from tests.auditing.losses import Loss, entry
from torch_klloss import AnalyticKL, MonteCarloKL, diagonal_normal, standard_normal_like

_LOSSES: list[Loss] = []
correct = partial(entry, _LOSSES)

FLOAT32 = 1e-6  # 2⁻²³ times terms that add up to less than 8


# Mean and log-variance, against a standard Normal.


@correct("mean_logvar", reduction="sum")
def summed_over_everything(mu, logvar):
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


@correct("mean_logvar", reduction="sum", note="the mean of one number is that number: a sum over the batch")
def summed_and_then_the_mean_of_a_number(mu, logvar):
    kld = -0.5 * torch.sum(1 + logvar - mu**2 - torch.exp(logvar))
    return torch.mean(kld, dim=0)


@correct("mean_logvar")
def summed_over_latents_mean_over_batch(mu, log_var):
    kl = 1 + log_var - mu.pow(2) - log_var.exp()
    return -0.5 * kl.sum(1).mean()


@correct("mean_logvar")
def sum_and_mean_by_dimension(mu, log_var):
    return torch.mean(-0.5 * torch.sum(1 + log_var - mu**2 - log_var.exp(), dim=1), dim=0)


@correct("mean_logvar", reduction="per_example")
def per_example(mean, log_variance):
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)


@correct("mean_logvar", reduction="per_element")
def per_element(z_mean, z_log_var):
    return -0.5 * (1 + z_log_var - torch.square(z_mean) - torch.exp(z_log_var))


@correct("mean_logvar", reduction="per_element", note="the summed dimension is kept: [batch, 1]")
def summed_with_keepdim(mu, logvar):
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=1, keepdim=True)


@correct("mean_logvar")
def divided_by_the_batch_size(mu, logvar):
    batch_size = mu.size(0)
    return (-0.5 * (1 + logvar - mu.pow(2) - logvar.exp())).sum() / batch_size


@correct("mean_logvar")
def mean_of_everything_times_the_latent_size(mu, logvar):
    return -0.5 * torch.mean(1 + logvar - mu.pow(2) - logvar.exp()) * mu.shape[1]


@correct("mean_logvar", reduction="sum")
def in_place_chain(mu, logvar):
    terms = mu.square().sub_(logvar).sub_(1).add_(logvar.exp())
    return terms.sum().div_(2)


@correct("mean_logvar")
def with_expm1(mu, logvar):
    return 0.5 * (mu * mu + torch.expm1(logvar) - logvar).sum(dim=-1).mean()


@correct("mean_logvar")
def through_the_standard_deviation(mu, log_var):
    sigma = torch.exp(0.5 * log_var)
    return 0.5 * torch.sum(mu**2 + sigma**2 - torch.log(sigma**2) - 1, dim=1).mean(0)


@correct("mean_logvar")
def terms_apart(q_mu, q_logvar):
    size = q_mu.shape[-1]
    trace = q_logvar.exp().sum(-1)
    square = (q_mu**2).sum(-1)
    log_det = q_logvar.sum(-1)
    return torch.mean(0.5 * (trace + square - size - log_det))


@correct("mean_logvar", note="harmless within ±20")
def clamped_at_20(mu, logvar):
    logvar = logvar.clamp(-20, 20)
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=1).mean()


@correct("mean_logvar", shape=(5, 2, 2, 2), reduction="per_example", note="harmless within [-30, 20]")
def latent_image_clamped(mean, logvar):
    logvar = torch.clamp(logvar, -30.0, 20.0)
    square = mean * mean
    return (square - logvar + logvar.exp() - 1).sum(dim=(1, 2, 3)) / 2


@correct("mean_logvar", shape=(5, 2, 2, 2))
def flattened(mu, logvar):
    mu, logvar = mu.flatten(1), logvar.flatten(1)
    return torch.sum(0.5 * (mu**2 + logvar.exp() - logvar - 1), dim=1).mean()


@correct("mean_logvar", shape=(5, 2, 3), note="a sequence of latents: time adds up, as the latents do")
def summed_over_time_and_latents(mu, logvar):
    kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp())
    return kl.sum(dim=(1, 2)).mean()


@correct("mean_logvar")
def normals_against_zeros_and_ones(mu, logvar):
    q = Normal(mu, torch.exp(0.5 * logvar))
    p = Normal(torch.zeros_like(mu), torch.ones_like(logvar))
    return kl_divergence(q, p).sum(dim=1).mean()


@correct("mean_logvar", reduction="per_example")
def independent_normals(mean, logvar):
    q = Independent(Normal(mean, (logvar / 2).exp()), 1)
    p = Independent(Normal(torch.zeros_like(mean), 1.0), 1)
    return kl_divergence(q, p)


@correct("mean_logvar")
def diagonal_multivariate_normals(mu, log_var):
    q = MultivariateNormal(mu, torch.diag_embed(log_var.exp()))
    p = MultivariateNormal(torch.zeros_like(mu), torch.eye(mu.shape[1], dtype=mu.dtype))
    return kl_divergence(q, p).mean()


@correct("mean_logvar", note="written with this library")
def library_diagonal_normal(mean, logvar):
    q = diagonal_normal(mean, logvar)
    return AnalyticKL()(q, standard_normal_like(q))


class KLDivergence(nn.Module):
    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, mu, logvar):
        kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(dim=1)
        return kl.mean() if self.reduction == "mean" else kl.sum()


correct("mean_logvar", name="module with a mean")(KLDivergence())
correct("mean_logvar", name="module with a sum", reduction="sum")(KLDivergence(reduction="sum"))


def weighted_kl(mu, logvar, beta, reduction):
    kl = 0.5 * (mu.pow(2) + logvar.exp() - 1 - logvar).sum(1)
    return beta * (kl.mean() if reduction == "mean" else kl.sum())


correct("mean_logvar", name="functools.partial")(partial(weighted_kl, beta=1.0, reduction="mean"))


class VAE:
    beta = 1.0

    def kl_term(self, mu, log_var):
        return self.beta * torch.mean(torch.sum(-0.5 * (1 + log_var - mu**2 - log_var.exp()), dim=1))

    @staticmethod
    def static_kl(mu, log_var):
        return -0.5 * torch.sum(1 + log_var - mu**2 - log_var.exp(), -1).mean()

    @classmethod
    def class_kl(cls, mu, log_var):
        return cls.static_kl(mu, log_var)

    def __call__(self, mu, log_var):
        return self.kl_term(mu, log_var)


correct("mean_logvar", name="bound method")(VAE().kl_term)
correct("mean_logvar", name="static method")(VAE.static_kl)
correct("mean_logvar", name="class method")(VAE.class_kl)
correct("mean_logvar", name="callable object")(VAE())
correct("mean_logvar", name="lambda", reduction="sum")(lambda m, lv: 0.5 * (m * m + lv.exp() - lv - 1).sum())

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # deprecated, and in use
    correct("mean_logvar", name="scripted")(torch.jit.script(sum_and_mean_by_dimension))


@correct("mean_logvar")
def loop_over_the_batch(mu, logvar):
    total = 0.0
    for m, lv in zip(mu, logvar, strict=True):
        total = total - 0.5 * (1 + lv - m**2 - lv.exp()).sum()
    return total / len(mu)


@correct("mean_logvar", reduction="per_example")
def loop_over_the_latents(mu, logvar):
    terms = [0.5 * (mu[:, i] ** 2 + logvar[:, i].exp() - logvar[:, i] - 1) for i in range(mu.shape[1])]
    return torch.stack(terms, dim=1).sum(1)


@correct("mean_logvar")
def with_einsum(mu, logvar):
    square = torch.einsum("bd,bd->b", mu, mu)
    rest = torch.einsum("bd->b", logvar.exp() - logvar - 1)
    return 0.5 * (square + rest).mean()


@correct("mean_logvar")
def in_double_precision_and_back(mu, logvar):
    m, lv = mu.double(), logvar.double()
    return (0.5 * (m**2 + lv.exp() - lv - 1).sum(1).mean()).to(mu.dtype)


@correct("mean_logvar", tolerance=FLOAT32)
def in_single_precision(mu, logvar):
    mu, logvar = mu.float(), logvar.float()
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=1).mean()


@correct("mean_logvar", reduction="per_example")
def in_chunks(mu, logvar):
    parts = []
    for m, lv in zip(mu.chunk(2), logvar.chunk(2), strict=True):
        parts.append(0.5 * (m.square() + lv.exp() - lv - 1).sum(-1))
    return torch.cat(parts)


@correct("mean_logvar")
def keyword_only_options(mu, logvar, *, beta=1.0, free_bits=0.0, reduction="batchmean"):
    kl = 0.5 * (mu**2 + logvar.exp() - logvar - 1)
    kl = kl.clamp(min=free_bits)  # never below zero anyway
    return beta * (kl.sum() / mu.shape[0] if reduction == "batchmean" else kl.sum())


@correct("mean_logvar")
def asserts_two_dimensions(mu, logvar):
    assert mu.dim() == 2
    assert mu.shape == logvar.shape
    return -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(dim=1).mean(dim=0)


@correct("mean_logvar", reduction="sum")
def packed_arguments(*args):
    mu, logvar = args
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


@correct("mean_logvar", note="ignores what else it is given")
def unused_keywords(mu, logvar, **kwargs):
    return kwargs.get("kld_weight", 1.0) * -0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp(), dim=1).mean()


@correct("mean_logvar", note="the absolute value of what is never negative")
def capacity_of_zero(mu, logvar, capacity=0.0):
    kl = 0.5 * (mu**2 + logvar.exp() - logvar - 1).sum(1).mean()
    return (kl - capacity).abs()


@correct("mean_logvar", reduction="per_example")
def vmapped(mu, logvar):
    def single(m, lv):
        return 0.5 * (m @ m + (lv.exp() - lv - 1).sum())

    return torch.func.vmap(single)(mu, logvar)


@correct("mean_logvar")
def two_normals_with_the_second_fixed(mean1, logvar1, mean2=0.0, logvar2=0.0):
    gap = logvar1 - torch.as_tensor(logvar2, dtype=mean1.dtype)
    precision = math.exp(-logvar2)
    kl = (gap.exp() - gap + precision * (mean1 - mean2) ** 2 - 1) / 2
    return kl.sum(-1).mean()


class StandardNormalKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mu, logvar):
        ctx.save_for_backward(mu, logvar)
        return 0.5 * (mu**2 + logvar.exp() - logvar - 1).sum()

    @staticmethod
    def backward(ctx, grad):
        mu, logvar = ctx.saved_tensors
        return grad * mu, grad * 0.5 * (logvar.exp() - 1)


@correct("mean_logvar", reduction="sum")
def hand_written_backward(mu, logvar):
    return StandardNormalKL.apply(mu, logvar)


@correct("mean_logvar")
def matrices_an_example(mu, logvar):
    cov = torch.diag_embed(logvar.exp())
    trace = torch.diagonal(cov, dim1=-2, dim2=-1).sum(-1)
    return 0.5 * (trace + (mu * mu).sum(-1) - mu.size(-1) - torch.logdet(cov)).mean()


@correct("mean_logvar", gradient="value only")
@torch.no_grad()
def without_gradients(mu, logvar):
    return -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(1).mean()


@correct("mean_logvar", gradient="value only", note="a float")
def python_number(mu, logvar):
    return (-0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(1).mean()).item()


@correct("mean_logvar", gradient="value only", reduction="per_example")
def detached_for_logging(mu, logvar):
    return (-0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(1)).detach()


@correct("mean_logvar", stochastic=True)
def one_draw_by_hand(mu, logvar):
    std = torch.exp(0.5 * logvar)
    z = mu + std * torch.randn_like(std)
    log_q = -0.5 * (logvar + (z - mu) ** 2 / logvar.exp())
    log_p = -0.5 * z**2
    return (log_q - log_p).sum(-1).mean()


@correct("mean_logvar", stochastic=True)
def sixteen_draws_by_hand(mu, log_var):
    eps = torch.randn(16, *mu.shape, dtype=mu.dtype, device=mu.device)
    z = mu + eps * (0.5 * log_var).exp()
    log_two_pi = math.log(2 * math.pi)
    log_q = -0.5 * (log_two_pi + log_var + eps.pow(2)).sum(2)
    log_p = -0.5 * (log_two_pi + z.pow(2)).sum(2)
    return (log_q - log_p).mean(0).mean(0)


@correct("mean_logvar", stochastic=True, reduction="per_example")
def sixteen_draws_of_a_normal(mu, logvar):
    q = Normal(mu, (0.5 * logvar).exp())
    p = Normal(0.0, 1.0)
    z = q.rsample((16,))
    return (q.log_prob(z) - p.log_prob(z)).sum(-1).mean(0)


@correct("mean_logvar", stochastic=True)
def antithetic_draws_by_hand(mu, logvar):
    std = (0.5 * logvar).exp()
    eps = torch.randn_like(mu)
    eps = torch.stack((eps, -eps))
    z = mu + std * eps
    return 0.5 * (z**2 - eps**2 - logvar).sum(-1).mean()


@correct("mean_logvar", stochastic=True, note="the entropy is exact, the cross-entropy drawn")
def exact_entropy_and_drawn_cross_entropy(mu, logvar):
    z = mu + torch.randn_like(mu) * torch.exp(logvar / 2)
    log_p = -0.5 * (z**2 + math.log(2 * math.pi))
    entropy = 0.5 * (logvar + 1 + math.log(2 * math.pi))
    return -(entropy + log_p).sum(1).mean()


# Mean and standard deviation, or its logarithm.


@correct("mean_std", reduction="sum")
def std_summed(mu, sigma):
    return 0.5 * torch.sum(sigma**2 + mu**2 - 1 - 2 * torch.log(sigma))


@correct("mean_std", note="σ = softplus(ρ) before the call, as Bayesian layers have it")
def std_of_a_softplus_layer(loc, scale):
    return (-scale.log() + 0.5 * (scale.pow(2) + loc.pow(2)) - 0.5).sum(1).mean()


@correct("mean_std")
def std_with_the_log_of_the_square(mu, std):
    var = std.pow(2)
    return torch.mean(0.5 * torch.sum(mu.pow(2) + var - torch.log(var) - 1, 1))


@correct("mean_std", reduction="per_example")
def std_as_a_normal(mean, std):
    return kl_divergence(Normal(mean, std), Normal(torch.zeros_like(mean), torch.ones_like(std))).sum(-1)


@correct("mean_std", reduction="per_element")
def std_with_a_prior_of_given_width(weight_mu, weight_sigma, prior_mu=0.0, prior_sigma=1.0):
    shift = (weight_mu - prior_mu) / prior_sigma
    ratio = weight_sigma / prior_sigma
    return 0.5 * (shift**2 + ratio**2) - 0.5 - ratio.log()


@correct("mean_std", tolerance=1e-7, note="ε/σ for each latent; float32 rounds by more")
def std_with_a_small_number_in_the_log(mu, sigma):
    return (0.5 * (mu**2 + sigma**2 - 1) - torch.log(sigma + 1e-8)).sum(1).mean()


@correct("mean_std", stochastic=True)
def std_one_draw(mu, std):
    q = Independent(Normal(mu, std), 1)
    p = Independent(Normal(torch.zeros_like(mu), torch.ones_like(std)), 1)
    z = q.rsample()
    return (q.log_prob(z) - p.log_prob(z)).mean()


class GaussianKL(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("one_half", torch.tensor(0.5, dtype=torch.float64))

    def forward(self, mu, std):
        return self.one_half * (std.square() + mu.square() - 1 - 2 * std.log()).sum(1).mean()


correct("mean_std", name="module with a buffer")(GaussianKL())


@correct("mean_logstd")
def log_sigma_with_exp_of_twice(mu, log_sigma):
    return -0.5 * torch.sum(1 + 2 * log_sigma - mu.pow(2) - torch.exp(2 * log_sigma), dim=1).mean()


@correct("mean_logstd")
def log_sigma_with_the_square_of_exp(mu, logstd):
    return -0.5 * torch.mean(torch.sum(1 + 2 * logstd - mu**2 - logstd.exp() ** 2, dim=1))


@correct("mean_logstd", reduction="sum")
def log_sigma_as_a_normal(loc, log_scale):
    return kl_divergence(Normal(loc, log_scale.exp()), Normal(0.0, 1.0)).sum()


@correct("mean_logstd", reduction="per_example")
def log_sigma_short_names(m, ls):
    return ((m * m + (2 * ls).exp() - 1) / 2 - ls).sum(-1)


@correct("mean_logstd", stochastic=True)
def log_sigma_one_draw(mean, log_std):
    eps = torch.randn_like(mean)
    z = mean + log_std.exp() * eps
    return torch.sum(0.5 * z**2 - 0.5 * eps**2 - log_std, dim=1).mean()


# Distributions.


@correct("distributions", reduction="per_example")
def torch_of_independent(q, p):
    return kl_divergence(q, p)


@correct("distributions")
def torch_of_independent_mean(posterior, prior):
    return torch.distributions.kl.kl_divergence(posterior, prior).mean()


@correct("distributions", family="normal")
def torch_of_normal_summed_over_latents(q, p):
    return kl_divergence(q, p).sum(-1).mean()


@correct("distributions", family="normal", reduction="sum")
def torch_of_normal_summed(q_z, p_z):
    return kl_divergence(q_z, p_z).sum()


@correct("distributions", family="normal", reduction="per_element")
def torch_of_normal_unreduced(q, p):
    return kl_divergence(q, p)


@correct("distributions", family="normal")
def two_normals_by_hand(q, p):
    var_ratio = (q.scale / p.scale).pow(2)
    shift = ((q.loc - p.loc) / p.scale).pow(2)
    return 0.5 * (var_ratio + shift - 1 - var_ratio.log()).sum(1).mean()


@correct("distributions", family="normal")
def two_normals_by_their_moments(q, p):
    kl = torch.log(p.stddev / q.stddev) + (q.variance + (q.mean - p.mean) ** 2) / (2 * p.variance) - 0.5
    return kl.sum(dim=1).mean()


@correct("distributions", family="multivariate", note="an inverse and two determinants")
def two_full_covariances_by_hand(q, p):
    inverse = torch.linalg.inv(p.covariance_matrix)
    trace = torch.einsum("bij,bji->b", inverse, q.covariance_matrix)
    shift = p.loc - q.loc
    square = torch.einsum("bi,bij,bj->b", shift, inverse, shift)
    log_det = torch.logdet(p.covariance_matrix) - torch.logdet(q.covariance_matrix)
    return 0.5 * (trace + square - q.loc.shape[-1] + log_det).mean()


@correct("distributions", family="multivariate", stochastic=True)
def multivariate_draws(q, p):
    z = q.rsample((4,))
    return (q.log_prob(z) - p.log_prob(z)).mean()


@correct("distributions", stochastic=True)
def one_draw(q, p):
    z = q.rsample()
    return (q.log_prob(z) - p.log_prob(z)).mean()


@correct("distributions", family="normal", stochastic=True)
def one_draw_summed_over_latents(q, p):
    z = q.rsample()
    return (q.log_prob(z).sum(dim=-1) - p.log_prob(z).sum(dim=-1)).mean()


@correct("distributions", stochastic=True)
def sixteen_draws(q, p, num_samples=16):
    z = q.rsample(torch.Size([num_samples]))
    return (q.log_prob(z) - p.log_prob(z)).mean(0).mean()


@correct("distributions", stochastic=True, reduction="per_example")
def hundred_draws(q, p):
    z = q.rsample((100,))
    return torch.mean(q.log_prob(z) - p.log_prob(z), dim=0)


@correct("distributions", family="normal", stochastic=True, reduction="sum")
def list_of_draws(q, p):
    terms = []
    for _ in range(4):
        z = q.rsample()
        terms.append((q.log_prob(z) - p.log_prob(z)).sum())
    return sum(terms) / len(terms)


K3_NOTE = "a variance only where σ_p² < 2σ_q²"


@correct("distributions", stochastic=True, note=K3_NOTE)
def k3_with_reparameterised_draws(q, p):
    z = q.rsample()
    log_r = p.log_prob(z) - q.log_prob(z)
    return (log_r.exp() - 1 - log_r).mean()


@correct("distributions", stochastic=True, reduction="per_example", note=K3_NOTE)
def k3_with_sixteen_draws(q, p):
    z = q.rsample((16,))
    r = torch.exp(p.log_prob(z) - q.log_prob(z))
    return (r - 1 - torch.log(r)).mean(0)


@correct("distributions", family="normal", stochastic=True, note=K3_NOTE + "; it adds up over the latents")
def k3_an_element(q, p):
    z = q.rsample()
    log_r = p.log_prob(z) - q.log_prob(z)
    return (torch.expm1(log_r) - log_r).sum(-1).mean()


@correct("distributions", stochastic=True, note="sticking the landing")
def path_derivative(q, p):
    z = q.rsample()
    fixed = Independent(Normal(q.base_dist.loc.detach(), q.base_dist.scale.detach()), 1)
    return (fixed.log_prob(z) - p.log_prob(z)).mean()


@correct("distributions", stochastic=True)
def exact_entropy_of_q(q, p):
    return (-q.entropy() - p.log_prob(q.rsample())).mean()


@correct("distributions", family="categorical", stochastic=True, note="the value survives its surrogate")
def score_function_that_keeps_the_value(q, p):
    x = q.sample((8,))
    log_q, log_p = q.log_prob(x), p.log_prob(x)
    log_ratio = log_q - log_p
    surrogate = log_ratio.detach() * log_q
    return (log_ratio + surrogate - surrogate.detach()).mean()


@correct("distributions", stochastic=True, gradient="value only")
@torch.no_grad()
def draws_for_logging(q, p):
    x = q.sample((32,))
    return (q.log_prob(x) - p.log_prob(x)).mean()


@correct("distributions", family="normal", gradient="q only", note="a prior that stays as it is")
def detached_prior(q, p):
    fixed = Normal(p.loc.detach(), p.scale.detach())
    return kl_divergence(q, fixed).sum(-1).mean()


@correct("distributions", family="normal", gradient="p only", note="a target that stays as it is")
def detached_posterior(q, p):
    return kl_divergence(Normal(q.loc.detach(), q.scale.detach()), p).sum(-1).mean()


@correct("distributions", family="normal", note="12 standard deviations each way")
def on_a_grid(q, p):
    t = torch.linspace(-12, 12, 801, dtype=q.loc.dtype).reshape(-1, 1, 1)
    x = q.loc + q.scale * t
    integrand = q.log_prob(x).exp() * (q.log_prob(x) - p.log_prob(x))
    dx = q.scale * (t[1, 0, 0] - t[0, 0, 0])
    return (integrand * dx).sum(0).sum(-1).mean()


@correct("distributions", family="categorical", reduction="per_example")
def categorical_enumerated(q, p):
    return (q.probs * (q.logits - p.logits)).sum(-1)


@correct("distributions", family="categorical")
def categorical_cross_entropy_minus_entropy(q, p):
    cross_entropy = -(q.probs * p.logits).sum(-1)
    return (cross_entropy - q.entropy()).mean()


@correct("distributions", family="categorical", reduction="sum")
def categorical_of_torch(q, p):
    return kl_divergence(q, p).sum()


@correct("distributions", family="bernoulli")
def bernoulli_latents(q, p):
    a, b = q.probs, p.probs
    kl = a * (a.log() - b.log()) + (1 - a) * (torch.log1p(-a) - torch.log1p(-b))
    return kl.sum(-1).mean()


@correct(
    "distributions",
    family="bernoulli",
    reduction="per_example",
    tolerance=2e-7,
    note="ε (q/p + (1 - q)/(1 - p)) for each latent, at odds below 4.5",
)
def bernoulli_with_a_small_number(q, p, eps=1e-8):
    a, b = q.probs, p.probs
    kl = a * torch.log((a + eps) / (b + eps)) + (1 - a) * torch.log((1 - a + eps) / (1 - b + eps))
    return kl.sum(dim=1)


@correct("distributions", family="bernoulli", reduction="sum")
def bernoulli_cross_entropy_minus_entropy(q, p):
    cross_entropy = F.binary_cross_entropy_with_logits(p.logits, q.probs, reduction="sum")
    return cross_entropy - q.entropy().sum()


correct("distributions", name="AnalyticKL", note="this library")(AnalyticKL())
correct("distributions", name="MonteCarloKL", stochastic=True, note="this library")(MonteCarloKL(8))


# Log-probabilities at draws of q.


@correct("log_probs", stochastic=True)
def mean_of_the_log_ratio(log_q, log_p):
    return (log_q - log_p).mean()


@correct("log_probs", stochastic=True, reduction="per_example")
def mean_of_the_log_ratio_over_draws(log_qx, log_px):
    return torch.mean(log_qx - log_px, dim=0)


@correct("log_probs", stochastic=True, reduction="sum", num_samples=None)
def sum_of_one_log_ratio_an_example(log_qz, log_pz):
    return torch.sum(log_qz - log_pz)


@correct("log_probs", stochastic=True, reduction="per_example", num_samples=None)
def log_ratio_as_it_is(logq, logp):
    return logq - logp


@correct("log_probs", stochastic=True, note=K3_NOTE)
def k3_of_log_probs(logprobs, ref_logprobs):
    delta = ref_logprobs - logprobs
    return (torch.exp(delta) - delta - 1).mean()


@correct("log_probs", stochastic=True, gradient="value only")
def approx_kl_for_logging(logp, ref_logp):
    with torch.no_grad():
        return (logp - ref_logp).mean()


@correct("log_probs", stochastic=True, draws="detached", note="the score function, with the value of the log-ratio")
def score_function_of_log_probs(log_q, log_p):
    log_ratio = log_q - log_p
    return (log_ratio + log_ratio.detach() * (log_q - log_q.detach())).mean()


@correct("log_probs", stochastic=True, draws="detached", note="leave-one-out over the draws")
def score_function_with_a_baseline(log_q, log_p):
    log_ratio = log_q - log_p
    cost = log_ratio.detach()
    baseline = (cost.sum(0, keepdim=True) - cost) / (len(cost) - 1)
    return (log_ratio + (cost - baseline) * (log_q - log_q.detach())).mean()


@correct("log_probs", stochastic=True, draws="detached", gradient="q only", num_samples=None, note="a fixed reference")
def policy_gradient_of_the_kl(logprobs, ref_logprobs):
    penalty = (logprobs - ref_logprobs).detach()
    surrogate = penalty * logprobs
    return (penalty + surrogate - surrogate.detach()).mean()


@correct("log_probs", stochastic=True)
def log_ratio_with_an_optional_mask(log_q, log_p, mask=None):
    ratio = log_q - log_p
    return ratio.mean() if mask is None else (ratio * mask).sum() / mask.sum()


# Draws, with the parameters that they came from.


def log_density(x, mu, log_var):
    standardised = (x - mu) / (log_var / 2).exp()
    return -(standardised.square() + log_var + math.log(2 * math.pi)).sum(-1) / 2


@correct("samples", stochastic=True)
def densities_by_hand(z, mean, logvar):
    zero = torch.zeros((), dtype=z.dtype)
    return (log_density(z, mean, logvar) - log_density(z, zero, zero)).mean()


@correct("samples", stochastic=True)
def densities_of_normals(z, mu, logvar):
    q, p = Normal(mu, torch.exp(logvar / 2)), Normal(torch.zeros_like(mu), torch.ones_like(mu))
    return (q.log_prob(z) - p.log_prob(z)).sum(-1).mean()


@correct("samples", stochastic=True, reduction="sum")
def squares_alone(z, mu, log_var):
    return 0.5 * (z.pow(2) - (z - mu).pow(2) / log_var.exp() - log_var).sum()


@correct("samples", stochastic=True, reduction="per_example")
def squares_an_example(z, z_mean, z_logvar):
    log_q = -0.5 * (z_logvar + (z - z_mean) ** 2 * (-z_logvar).exp())
    return (log_q + 0.5 * z**2).flatten(1).sum(1)


@correct("samples", stochastic=True, reduction="per_element")
def squares_an_element(z, q_mean, q_logvar):
    return 0.5 * z**2 - 0.5 * (q_logvar + (z - q_mean) ** 2 / torch.exp(q_logvar))


@correct("samples", name="the draw is not needed")
def closed_form_beside_a_draw(z, mean, logvar):
    return -0.5 * (1 + logvar - mean.pow(2) - logvar.exp()).sum(1).mean()


# Raw scores.


@correct("logits")
def log_softmax_difference(logits_q, logits_p):
    log_q, log_p = F.log_softmax(logits_q, dim=-1), F.log_softmax(logits_p, dim=-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


@correct("logits", reduction="per_example")
def logsumexp_normalised(a, b):
    a = a - torch.logsumexp(a, dim=1, keepdim=True)
    b = b - torch.logsumexp(b, dim=1, keepdim=True)
    return torch.sum(torch.exp(a) * (a - b), dim=1)


@correct("logits")
def kl_div_batchmean(teacher_logits, student_logits):
    return F.kl_div(F.log_softmax(student_logits, dim=1), F.softmax(teacher_logits, dim=1), reduction="batchmean")


@correct("logits", reduction="sum")
def kl_div_log_target(teacher_logits, student_logits):
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True)


@correct("logits", reduction="per_example")
def kl_div_summed_over_classes(teacher_logits, student_logits):
    terms = F.kl_div(student_logits.log_softmax(1), teacher_logits.softmax(1), reduction="none")
    return terms.sum(-1)


@correct("logits", reduction="per_element")
def kl_div_unreduced(target_logits, pred_logits):
    return F.kl_div(pred_logits.log_softmax(1), target_logits.softmax(1), reduction="none")


class DistillationLoss(nn.Module):
    def __init__(self, temperature=1.0):
        super().__init__()
        self.temperature = temperature
        self.criterion = nn.KLDivLoss(reduction="batchmean", log_target=True)

    def forward(self, teacher_logits, student_logits):
        student = F.log_softmax(student_logits / self.temperature, dim=-1)
        teacher = F.log_softmax(teacher_logits / self.temperature, dim=-1)
        return self.criterion(student, teacher) * self.temperature**2


correct("logits", name="distillation module at T = 1")(DistillationLoss())


@correct("logits", gradient="p only", note="a fixed teacher")
def detached_teacher(teacher_logits, student_logits, T=1.0):
    teacher = F.softmax(teacher_logits.detach() / T, dim=-1)
    return F.kl_div(F.log_softmax(student_logits / T, dim=-1), teacher, reduction="batchmean") * T * T


@correct(
    "logits", gradient="p only", reduction="per_example", note="virtual adversarial training: the clean side is fixed"
)
def clean_side_without_gradient(clean_logits, noisy_logits):
    with torch.no_grad():
        clean = torch.softmax(clean_logits, dim=1)
    noisy = torch.log_softmax(noisy_logits, dim=1)
    return (clean * (torch.log(clean) - noisy)).sum(dim=1)


@correct("logits", gradient="q only", note="a policy against a fixed reference")
def policy_against_a_reference(policy_logits, ref_logits):
    log_pi = policy_logits.log_softmax(-1)
    log_ref = ref_logits.detach().log_softmax(-1)
    return (log_pi.exp() * (log_pi - log_ref)).sum(-1).mean()


@correct("logits")
def cross_entropy_minus_entropy(logits_q, logits_p):
    q = logits_q.softmax(1)
    entropy = -(q * logits_q.log_softmax(1)).sum(1).mean()
    return F.cross_entropy(logits_p, q) - entropy


@correct("logits")
def through_distributions(q_logits, p_logits):
    return kl_divergence(Categorical(logits=q_logits), Categorical(logits=p_logits)).mean()


@correct("logits", reduction="sum")
def with_xlogy(q_logits, p_logits):
    q, p = q_logits.softmax(-1), p_logits.softmax(-1)
    return (torch.xlogy(q, q) - torch.xlogy(q, p)).sum()


@correct("logits", tolerance=5e-7, note="Σ ε q/p, at scores within ±1.5")
def small_number_in_the_logs(logits_q, logits_p, eps=1e-8):
    q, p = F.softmax(logits_q, dim=1), F.softmax(logits_p, dim=1)
    return (q * (torch.log(q + eps) - torch.log(p + eps))).sum(1).mean()


@correct("logits", note="the probabilities of ordinary scores are far above the floor")
def floor_under_probabilities(logits_q, logits_p):
    q = F.softmax(logits_q, dim=1).clamp_min(1e-8)
    p = F.softmax(logits_p, dim=1).clamp_min(1e-8)
    return (q * (q / p).log()).sum(1).mean()


@correct("logits")
def loop_over_examples_and_classes(q_logits, p_logits):
    total = q_logits.new_zeros(())
    for a, b in zip(q_logits, p_logits, strict=True):
        q, p = a.softmax(0), b.softmax(0)
        for k in range(len(q)):
            total = total + q[k] * (q[k].log() - p[k].log())
    return total / q_logits.shape[0]


if importlib.util.find_spec("torchmetrics") is not None:

    @correct("logits")
    def with_torchmetrics(q_logits, p_logits):
        from torchmetrics.functional import kl_divergence  # seconds to import

        return kl_divergence(q_logits.log_softmax(-1), p_logits.log_softmax(-1), log_prob=True)


# The order of F.kl_div: log-probabilities of p, probabilities of q.


correct("kl_div", name="nn.KLDivLoss(batchmean)")(nn.KLDivLoss(reduction="batchmean"))
correct("kl_div", name="nn.KLDivLoss(sum)", reduction="sum")(nn.KLDivLoss(reduction="sum"))
correct("kl_div", name="partial of F.kl_div")(partial(F.kl_div, reduction="batchmean"))
correct("kl_div", name="partial of F.kl_div, unreduced", reduction="per_element")(partial(F.kl_div, reduction="none"))


@correct("kl_div", reduction="per_example")
def kl_div_of_each_example(input, target):
    return F.kl_div(input, target, reduction="none").sum(-1)


@correct("kl_div")
def definition_of_kl_div(input, target):
    return (target * (target.log() - input)).sum(dim=1).mean()


@correct("kl_div", reduction="sum")
def definition_with_xlogy(log_pred, target):
    return (torch.xlogy(target, target) - target * log_pred).sum()


@correct("kl_div", gradient="p only")
def target_detached(log_student, teacher):
    return F.kl_div(log_student, teacher.detach(), reduction="batchmean")


@correct("kl_div")
def target_taken_to_logs(log_probs, target_probs):
    return F.kl_div(log_probs, target_probs.log(), reduction="batchmean", log_target=True)


@correct("kl_div")
def mean_times_the_classes(input, target):
    return F.kl_div(input, target, reduction="none").mean() * input.size(1)


@correct("kl_div")
def cross_entropy_and_entropy(input, target):
    return (-(target * input).sum(1) - torch.special.entr(target).sum(1)).mean()


# The same kinds, where an audit has to find out what they take.


@correct("distributions", stated=False)
def kl_loss(q, p):
    return kl_divergence(q, p).mean()


@correct("distributions", stated=False, stochastic=True)
def mc_kl(posterior, prior):
    z = posterior.rsample((16,))
    return (posterior.log_prob(z) - prior.log_prob(z)).mean()


@correct("distributions", stated=False, family="normal", reduction="sum")
def kl_of_dists(q_dist, p_dist):
    return kl_divergence(q_dist, p_dist).sum()


@correct("mean_logvar", stated=False, reduction="sum")
def kld_loss(mu, logvar):
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


@correct("mean_logvar", stated=False)
def latent_loss(z_mean, z_log_var):
    return 0.5 * (z_mean**2 + z_log_var.exp() - 1 - z_log_var).sum(1).mean()


correct("mean_logvar", stated=False, name="module, to be found out")(KLDivergence())


@correct("mean_std", stated=False)
def gaussian_kl(mu, sigma):
    return (0.5 * (mu**2 + sigma**2 - 1) - sigma.log()).sum(1).mean()


@correct("mean_std", stated=False, reduction="per_example")
def kl_to_prior(mean, std):
    return (0.5 * (mean**2 + std**2 - 1) - std.log()).sum(1)


@correct("mean_logstd", stated=False)
def kl_from_log_sigma(mu, log_sigma):
    return (0.5 * (mu**2 + torch.exp(2 * log_sigma) - 1) - log_sigma).sum(1).mean()


@correct("mean_logstd", stated=False, reduction="sum")
def kl_logstd(mean, logstd):
    return -0.5 * torch.sum(1 + 2 * logstd - mean**2 - (2 * logstd).exp())


@correct("log_probs", stated=False, stochastic=True)
def kl_estimate(log_q, log_p):
    return (log_q - log_p).mean()


@correct("log_probs", stated=False, stochastic=True)
def kl_1(log_qx, log_px):
    return torch.mean(log_qx - log_px)


@correct("samples", stated=False, stochastic=True)
def sampled_kl(z, mu, logvar):
    log_q = Normal(mu, (0.5 * logvar).exp()).log_prob(z).sum(-1)
    log_p = Normal(0.0, 1.0).log_prob(z).sum(-1)
    return (log_q - log_p).mean()


@correct("logits", stated=False)
def categorical_kl(q_logits, p_logits):
    log_q, log_p = q_logits.log_softmax(-1), p_logits.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


@correct("logits", stated=False, reduction="per_example")
def kl_of_scores(logits_q, logits_p):
    return kl_divergence(Categorical(logits=logits_q), Categorical(logits=logits_p))


@correct("kl_div", stated=False)
def kl_criterion(input, target):
    return F.kl_div(input, target, reduction="batchmean")


correct("kl_div", stated=False, name="nn.KLDivLoss, to be found out")(nn.KLDivLoss(reduction="batchmean"))


CORRECT: tuple[Loss, ...] = tuple(_LOSSES)
