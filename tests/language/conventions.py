"""The divergences by their definitions, in float64, from logits."""

import math

import torch

from torch_klloss.language import ForwardKL, Jeffreys, JensenShannon, ReverseKL, SkewKL


def kl(log_q, log_p):
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def mixed(log_a, log_b, share):
    """Return the logarithm of share · a + (1 - share) · b."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def jensen_shannon(t, s, beta):
    m = mixed(t, s, beta)
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


DEFINITIONS = {
    ForwardKL(): kl,
    ReverseKL(): lambda t, s: kl(s, t),
    Jeffreys(0.3): lambda t, s: 0.3 * kl(t, s) + 0.7 * kl(s, t),
    JensenShannon(): lambda t, s: jensen_shannon(t, s, 0.5),
    JensenShannon(0.1): lambda t, s: jensen_shannon(t, s, 0.1),
    JensenShannon(0.9, scaled=True): lambda t, s: jensen_shannon(t, s, 0.9) / 0.09,
    JensenShannon(0.0, scaled=True): kl,
    JensenShannon(1.0, scaled=True): lambda t, s: kl(s, t),
    SkewKL(0.1): lambda t, s: kl(t, mixed(t, s, 0.1)),
    SkewKL(0.1, reverse=True): lambda t, s: kl(s, mixed(s, t, 0.1)),
}


def by_definition(divergence, teacher, student, temperature=1.0):
    logs = [(x.double() / temperature).log_softmax(-1) for x in (teacher, student)]
    return DEFINITIONS[divergence](*logs) * temperature**2
