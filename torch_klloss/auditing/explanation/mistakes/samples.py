"""Mistakes with samples of q: a mean of the wrong quantity. The question that the library began with comes first."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from torch_klloss.auditing.explanation.mistake import Mistake

_OWN_DRAWS = frozenset({"mean_logvar", "mean_std", "mean_logstd", "mean_var"})
_SINGLE_DIMENSIONS = _OWN_DRAWS | {"distributions", "samples"}


def _integrand(id: str, what: str, fix: str, wrong: str, integrand: Callable[[Tensor, Tensor], Tensor]) -> Mistake:
    return Mistake(id, what, fix, "log_probs", wrong, sampled={"integrand": integrand})


MISTAKES = (
    _integrand(
        "weighted-twice",
        "it weights samples of q by q(x) again, although drawing them from q is that weighting",
        "Take the plain mean of log q(x) - log p(x) over samples of q; a weight q(x) dx belongs to the points of a "
        "grid.",
        "(log_q.exp() * (log_q - log_p)).mean()",
        lambda log_q, log_p: log_q.exp() * (log_q - log_p),
    ),
    _integrand(
        "weighted-by-p",
        "it weights samples of q by p(x)",
        "Take the plain mean of log q(x) - log p(x) over samples of q.",
        "(log_p.exp() * (log_q - log_p)).mean()",
        lambda log_q, log_p: log_p.exp() * (log_q - log_p),
    ),
    _integrand(
        "absolute-value",
        "it takes the absolute value of the log-ratio, which is biased: single log-ratios may be negative",
        "Keep the sign: the mean is the KL only with the negative log-ratios in it.",
        "(log_q - log_p).abs().mean()",
        lambda log_q, log_p: (log_q - log_p).abs(),
    ),
    _integrand(
        "clamped",
        "it clamps the log-ratio at zero, which is biased: single log-ratios may be negative",
        "Do not clamp single estimates; for a non-negative one take r - 1 - log r with r = p(x)/q(x).",
        "(log_q - log_p).clamp(min=0).mean()",
        lambda log_q, log_p: (log_q - log_p).clamp(min=0),
    ),
    _integrand(
        "half-squared-log-ratio",
        "it takes half the square of the log-ratio (k2), which is near the KL only where q is near p",
        "Take the plain mean of log q(x) - log p(x).",
        "(0.5 * (log_q - log_p) ** 2).mean()",
        lambda log_q, log_p: 0.5 * (log_q - log_p).square(),
    ),
    _integrand(
        "squared-log-ratio",
        "it takes the square of the log-ratio",
        "Take the plain mean of log q(x) - log p(x).",
        "((log_q - log_p) ** 2).mean()",
        lambda log_q, log_p: (log_q - log_p).square(),
    ),
    _integrand(
        "k3-upside-down",
        "it has the ratio in k3 = r - 1 - log r upside down: r is p(x)/q(x) at samples of q, not q(x)/p(x)",
        "Write log_r = log_p - log_q; (log_r.exp() - 1 - log_r).mean().",
        "((log_q - log_p).exp() - 1 - (log_q - log_p)).mean()",
        lambda log_q, log_p: (log_q - log_p).exp() - 1 - (log_q - log_p),
    ),
    _integrand(
        "no-logarithm",
        "it takes the difference of the densities and not of their logarithms",
        "Leave out the exp: the KL is the mean of log q(x) - log p(x).",
        "(log_q.exp() - log_p.exp()).mean()",
        lambda log_q, log_p: log_q.exp() - log_p.exp(),
    ),
    _integrand(
        "ratio-of-densities",
        "it takes the ratio of the densities and not its logarithm",
        "Take the logarithm of the ratio: the KL is the mean of log q(x) - log p(x).",
        "(log_p - log_q).exp().mean()",
        lambda log_q, log_p: (log_p - log_q).exp(),
    ),
    Mistake(
        id="joint-q-against-single-p",
        what="it subtracts log p of one dimension from the joint log q of all of them, so that log q counts once for "
        "every dimension",
        fix="Sum both log-densities over the latent dimensions before they are subtracted.",
        signature="samples",
        wrong="((-0.5 * (math.log(2 * math.pi) + logvar + (z - mean) ** 2 / logvar.exp())).sum(-1, keepdim=True) "
        "+ 0.5 * (math.log(2 * math.pi) + z**2)).sum(-1).mean()",
        sampled={"log q level": "joint"},
        only=_SINGLE_DIMENSIONS,
    ),
    Mistake(
        id="single-q-against-joint-p",
        what="it subtracts the joint log p of all dimensions from log q of one, so that log p counts once for every "
        "dimension",
        fix="Sum both log-densities over the latent dimensions before they are subtracted.",
        signature="samples",
        wrong="(-0.5 * (math.log(2 * math.pi) + logvar + (z - mean) ** 2 / logvar.exp()) "
        "+ (0.5 * (math.log(2 * math.pi) + z**2)).sum(-1, keepdim=True)).sum(-1).mean()",
        sampled={"log p level": "joint"},
        only=_SINGLE_DIMENSIONS,
    ),
    Mistake(
        id="normaliser-of-p-alone",
        what="it has the normaliser ½ log 2π in log p and not in log q, so that it is too large by 0.919 a dimension",
        fix="Keep ½ log 2π in both log-densities, or in neither.",
        signature="samples",
        wrong="(0.5 * z**2 + 0.5 * math.log(2 * math.pi) - 0.5 * (z - mean) ** 2 / logvar.exp() - 0.5 * logvar)"
        ".sum(-1).mean()",
        sampled={"normaliser": 0.5 * math.log(2 * math.pi)},
        only=_SINGLE_DIMENSIONS,
    ),
    Mistake(
        id="normaliser-of-q-alone",
        what="it has the normaliser ½ log 2π in log q and not in log p, so that it is too small by 0.919 a dimension",
        fix="Keep ½ log 2π in both log-densities, or in neither.",
        signature="samples",
        wrong="(0.5 * z**2 - 0.5 * math.log(2 * math.pi) - 0.5 * (z - mean) ** 2 / logvar.exp() - 0.5 * logvar)"
        ".sum(-1).mean()",
        sampled={"normaliser": -0.5 * math.log(2 * math.pi)},
        only=_SINGLE_DIMENSIONS,
    ),
    Mistake(
        id="noise-times-variance",
        what="it multiplies the noise by the variance in place of the standard deviation: its samples are not q's",
        fix="Draw mean + std * noise, with std = (0.5 * logvar).exp().",
        signature="mean_logvar",
        wrong="(lambda z: (0.5 * z**2 - 0.5 * (z - mean) ** 2 / logvar.exp() - 0.5 * logvar).sum(-1).mean())"
        "(mean + logvar.exp() * torch.randn_like(mean))",
        sampled={"draws": lambda n, eps: n.q_mean + n.q_logvar.exp() * eps},
        only=_OWN_DRAWS,
    ),
    Mistake(
        id="uniform-noise",
        what="it draws uniform noise in place of standard normal noise: torch.rand for torch.randn",
        fix="Draw the noise with torch.randn_like.",
        signature="mean_logvar",
        wrong="(lambda z: (0.5 * z**2 - 0.5 * (z - mean) ** 2 / logvar.exp() - 0.5 * logvar).sum(-1).mean())"
        "(mean + (0.5 * logvar).exp() * torch.rand_like(mean))",
        sampled={"draws": lambda n, eps: n.q_mean + (0.5 * n.q_logvar).exp() * torch.special.ndtr(eps)},
        only=_OWN_DRAWS,
    ),
    _integrand(
        "entropy-added",
        "it adds q's entropy where it should subtract it",
        "The KL is the mean of log q(x) - log p(x), with a plus before log q(x).",
        "(-log_q - log_p).mean()",
        lambda log_q, log_p: -log_q - log_p,
    ),
)
