"""Pairs whose draws round to the ends of their support, with their KL from the space in which they are drawn.

Every case gives the KL as an integral over the line, in coordinates where nothing rounds, by formulas of its own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributions as dist
from torch.distributions import AffineTransform, ExpTransform, Independent, Normal, TransformedDistribution
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class Case:
    """A pair and its KL, as functions of two numbers: a parameter of q and one of p."""

    name: str
    at: tuple[float, float]
    pair: Callable[[torch.Tensor, torch.Tensor], tuple[dist.Distribution, dist.Distribution]]
    kl: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def line_integral(log_mass, log_ratio, low, high, n=40_001):
    """Return ∫ exp(log_mass) log_ratio over a line, and check that the mass is 1; Simpson's rule."""
    v = torch.linspace(low, high, n, dtype=torch.float64)
    weights = torch.full_like(v, 2.0)
    weights[1::2], weights[0], weights[-1] = 4.0, 1.0, 1.0
    weights = weights * ((high - low) / (n - 1) / 3)
    mass = log_mass(v).exp() * weights
    assert abs(mass.sum().item() - 1) < 1e-8, mass.sum()
    return (mass * log_ratio(v)).sum()


def normal(v, loc, scale):
    return -(((v - loc) / scale) ** 2) / 2 - scale.log() - math.log(2 * math.pi) / 2


def of_normal(log_p, scale=1.0):
    """Return KL(T#Normal(a, scale)‖p), where log_p(z, b) is the log-density of p's preimage."""

    def kl(a, b):
        one = torch.tensor(scale, dtype=torch.float64)
        return line_integral(
            lambda t: normal(t, 0 * one, one / one),
            lambda t: normal(a + scale * t, a, one) - log_p(a + scale * t, b),
            -12.0,
            12.0,
            2_001,
        )

    return kl


def logs(z):
    return logsigmoid(z), logsigmoid(-z)


def squashed(loc, transforms, scale=1.0):
    return TransformedDistribution(Normal(loc, torch.as_tensor(scale).to(loc)), transforms)


def log_sech2(z):
    return 2 * math.log(2) + sum(logs(2 * z))


def beta_at_logit(z, a, b):
    low, high = logs(z)
    return a * low + b * high - (torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b))


def kumaraswamy_at_logit(z, a, b):
    low, high = logs(z)
    far = z > 35
    rest = torch.where(far, a.log() - z, (-torch.expm1(torch.where(far, -1.0, a * low))).log())
    return a.log() + b.log() + a * low + high + (b - 1) * rest


def relaxed_at_logit(z, temperature, logits):
    return temperature.log() + sum(logs(logits - temperature * z))


def log_gamma_at(y, a):
    """Return the log-density of log x of a Gamma of rate 1."""
    return a * y - y.exp() - torch.lgamma(a)


def tanh_uniform(cache):
    def pair(a, b):
        q = Independent(squashed(a.expand(1), [dist.TanhTransform(cache_size=cache)]), 1)
        return q, Independent(dist.Uniform(-b.detach().expand(1), b.detach().expand(1)), 1)

    return pair


def two_policies(a, b):
    """Return two policies with affine maps of their own, of the same value."""
    ends = [torch.tensor(2.0).to(a).requires_grad_() for _ in range(2)]
    laws = [
        squashed(mean, [dist.TanhTransform(), AffineTransform(end * 0 + 0.5, end)])
        for mean, end in zip((a, b), ends, strict=True)
    ]
    return laws[0], laws[1]


def stick(loc):
    return TransformedDistribution(Normal(loc.expand(1), torch.ones(1).to(loc)), [dist.StickBreakingTransform()])


def two(x):
    return torch.stack([x, torch.zeros_like(x)])


def beta_logit_kl(log_p):
    """Return KL(Beta(a, ½)‖p), where log_p(z, b) is the log-density of the logit."""

    def kl(a, b):
        half = torch.tensor(0.5, dtype=torch.float64)
        return line_integral(
            lambda z: beta_at_logit(z, a, half),
            lambda z: beta_at_logit(z, a, half) - log_p(z, b),
            -40 / a.item(),
            100.0,
        )

    return kl


def gamma_kl(log_p):
    def kl(a, b):
        return line_integral(
            lambda y: log_gamma_at(y, a), lambda y: log_gamma_at(y, a) - log_p(y, b), -40 / a.item(), 5.0
        )

    return kl


def kumaraswamy_kl(log_p):
    """Return KL(Kumaraswamy(a, a)‖p), where log_p(z, b) is the log-density of the logit."""

    def kl(a, b):
        reach = 40 / a.item()
        return line_integral(
            lambda z: kumaraswamy_at_logit(z, a, a),
            lambda z: kumaraswamy_at_logit(z, a, a) - log_p(z, b),
            -reach,
            reach,
        )

    return kl


def relaxed_kl(logits, log_p):
    """Return KL(RelaxedBernoulli(a, logits)‖p): z = (logits + s)/a with s logistic."""

    def kl(a, b):
        return line_integral(
            lambda s: sum(logs(s)),
            lambda s: relaxed_at_logit((logits + s) / a, a, logits) - log_p((logits + s) / a, b),
            -60.0,
            60.0,
        )

    return kl


ONE = torch.tensor(1.0, dtype=torch.float64)
MINUS_5 = torch.tensor(-5.0, dtype=torch.float64)
LOG_2 = math.log(2)


CASES = [
    *(
        Case(f"tanh_{a}_uniform_cache_{c}", (a, 1.0), tanh_uniform(c), of_normal(lambda z, b: -LOG_2 + log_sech2(z)))
        for a, c in ((3.0, 1), (8.0, 0), (8.0, 1), (-30.0, 0), (60.0, 1))
    ),
    Case(
        "affine_tanh_uniform",
        (9.0, 3.0),
        lambda a, b: (squashed(a, [dist.TanhTransform(), AffineTransform(0.0, -3.0)]), dist.Uniform(-b, b)),
        of_normal(lambda z, b: -(2 * b).log() + log_sech2(z) + math.log(3)),
    ),
    Case("two_policies", (9.0, 7.0), two_policies, of_normal(lambda z, b: normal(z, b, ONE))),
    Case(
        "tanh_tanh_laplace",
        (9.0, 7.0),
        lambda a, b: (
            squashed(a, [dist.TanhTransform()]),
            TransformedDistribution(dist.Laplace(b, torch.ones_like(b)), [dist.TanhTransform(cache_size=1)]),
        ),
        of_normal(lambda z, b: -(z - b).abs() - LOG_2),
    ),
    *(
        Case(
            f"sigmoid_{a}_beta_{b}",
            (a, b),
            lambda a, b: (squashed(a, [dist.SigmoidTransform()]), dist.Beta(b, b + 1)),
            of_normal(lambda z, b: beta_at_logit(z, b, b + 1)),
        )
        for a, b in ((20.0, 0.5), (-120.0, 2.0), (40.0, 1.0))
    ),
    Case(
        "sigmoid_kumaraswamy",
        (25.0, 0.8),
        lambda a, b: (squashed(a, [dist.SigmoidTransform()]), dist.Kumaraswamy(b, b)),
        of_normal(lambda z, b: kumaraswamy_at_logit(z, b, b)),
    ),
    Case(
        "sigmoid_relaxed",
        (25.0, 0.3),
        lambda a, b: (squashed(a, [dist.SigmoidTransform()]), dist.RelaxedBernoulli(b, logits=torch.ones_like(b))),
        of_normal(lambda z, b: relaxed_at_logit(z, b, ONE)),
    ),
    Case(
        "softplus_gamma",
        (-140.0, 0.5),
        lambda a, b: (squashed(a, [dist.SoftplusTransform()]), dist.Gamma(b, torch.ones_like(b))),
        of_normal(lambda z, b: log_gamma_at(z, b)),
    ),
    Case(
        "exp_weibull",
        (-120.0, 0.5),
        lambda a, b: (dist.LogNormal(a, torch.ones_like(a)), dist.Weibull(torch.ones_like(b), b)),
        of_normal(lambda z, b: b.log() + b * z - (b * z).exp()),
    ),
    Case(
        "exp_exp_lognormal",
        (5.0, 2.0),
        lambda a, b: (
            squashed(a, [ExpTransform(), ExpTransform()], 0.5),
            TransformedDistribution(dist.Gamma(b, torch.full_like(b, 0.01)), [ExpTransform()]),
        ),
        of_normal(lambda z, b: b * (z + math.log(0.01)) - 0.01 * z.exp() - torch.lgamma(b), 0.5),
    ),
    Case(
        "stick_breaking_dirichlet",
        (30.0, 0.7),
        lambda a, b: (stick(a), dist.Dirichlet(torch.stack([b, b + 1]))),
        of_normal(lambda z, b: beta_at_logit(z, b, b + 1)),
    ),
    *(
        Case(
            f"kumaraswamy_{a}_{b}",
            (a, b),
            lambda a, b: (dist.Kumaraswamy(a, a), dist.Kumaraswamy(b, b)),
            kumaraswamy_kl(lambda z, b: kumaraswamy_at_logit(z, b, b)),
        )
        for a, b in ((0.5, 0.8), (0.05, 0.3), (0.01, 1.0))
    ),
    Case(
        "kumaraswamy_beta",
        (0.2, 0.6),
        lambda a, b: (dist.Kumaraswamy(a, a), dist.Beta(b, b)),
        kumaraswamy_kl(lambda z, b: beta_at_logit(z, b, b)),
    ),
    *(
        Case(
            f"relaxed_bernoulli_{a}",
            (a, 1.0),
            lambda a, b: (
                dist.RelaxedBernoulli(a, logits=torch.full_like(a, -5.0)),
                dist.RelaxedBernoulli(b, logits=torch.zeros_like(b)),
            ),
            relaxed_kl(MINUS_5, lambda z, b: relaxed_at_logit(z, b, 0 * ONE)),
        )
        for a in (0.05, 0.005)
    ),
    Case(
        "relaxed_bernoulli_beta",
        (0.02, 0.4),
        lambda a, b: (dist.RelaxedBernoulli(a, logits=torch.full_like(a, -5.0)), dist.Beta(b, b)),
        relaxed_kl(MINUS_5, lambda z, b: beta_at_logit(z, b, b)),
    ),
    Case(
        "relaxed_one_hot",
        (0.01, 1.0),
        lambda a, b: (
            dist.RelaxedOneHotCategorical(a, logits=two(torch.full_like(a, -5.0))),
            dist.RelaxedOneHotCategorical(b, logits=two(torch.zeros_like(b))),
        ),
        relaxed_kl(MINUS_5, lambda z, b: relaxed_at_logit(z, b, 0 * ONE)),
    ),
    Case(
        "relaxed_one_hot_dirichlet",
        (0.01, 0.7),
        lambda a, b: (
            dist.RelaxedOneHotCategorical(a, logits=two(torch.full_like(a, -5.0))),
            dist.Dirichlet(torch.stack([b, b])),
        ),
        relaxed_kl(MINUS_5, lambda z, b: beta_at_logit(z, b, b)),
    ),
    Case(
        "gamma_lognormal",
        (0.01, 1.0),
        lambda a, b: (dist.Gamma(a, torch.ones_like(a)), dist.LogNormal(b, torch.full_like(b, 50.0))),
        gamma_kl(lambda y, b: normal(y, b, 50 * ONE)),
    ),
    Case(
        "gamma_weibull",
        (0.01, 0.2),
        lambda a, b: (dist.Gamma(a, torch.ones_like(a)), dist.Weibull(torch.ones_like(b), b)),
        gamma_kl(lambda y, b: b.log() + b * y - (b * y).exp()),
    ),
    Case(
        "beta_logit_normal",
        (0.01, 1.0),
        lambda a, b: (
            dist.Beta(a, torch.full_like(a, 0.5)),
            TransformedDistribution(Normal(b, torch.full_like(b, 50.0)), [dist.SigmoidTransform()]),
        ),
        beta_logit_kl(lambda z, b: normal(z, b, 50 * ONE)),
    ),
    Case(
        "beta_kumaraswamy",
        (0.02, 0.7),
        lambda a, b: (dist.Beta(a, torch.full_like(a, 0.5)), dist.Kumaraswamy(b, b)),
        beta_logit_kl(lambda z, b: kumaraswamy_at_logit(z, b, b)),
    ),
    Case(
        "dirichlet_stick_breaking",
        (0.02, 1.0),
        lambda a, b: (
            dist.Dirichlet(torch.stack([a, torch.full_like(a, 0.5)])),
            TransformedDistribution(
                Normal(b.expand(1), torch.full_like(b.expand(1), 50.0)), [dist.StickBreakingTransform()]
            ),
        ),
        beta_logit_kl(lambda z, b: normal(z, b, 50 * ONE)),
    ),
]
