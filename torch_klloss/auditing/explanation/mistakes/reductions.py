"""Mistakes with sums, means and constant factors: a right KL, times the wrong number."""

import math

from torch_klloss.auditing.explanation.mistake import Mistake, Parts


def _factor(
    id: str, what: str, fix: str, wrong: str, parts: Parts, signature: str = "mean_logvar", num_dims: int = 2
) -> Mistake:
    return Mistake(id, what, fix, signature, wrong, parts, parts, parts, num_dims=num_dims)


MEAN_OVER_STEPS = _factor(
    "mean-over-steps",
    "it takes the mean over the steps (or pixels, or tokens) between the batch and the last dimension, which the KL "
    "sums",
    "Sum over all dimensions but the batch, or say that it is in nats for each step.",
    "-0.5 * (1 + logvar - mean**2 - logvar.exp()).sum(-1).mean()",
    {"steps": -1},
    num_dims=3,
)
MISTAKES = (
    _factor(
        "mean-over-latent",
        "it is the KL per example divided by the latent size: it takes the mean over the latent dimensions (or "
        "classes), which the KL sums",
        "Sum over the latent dimensions, then take the mean over the batch.",
        "-0.5 * torch.mean(1 + logvar - mean**2 - logvar.exp())",
        {"latent": -1},
    ),
    MEAN_OVER_STEPS,
    _factor(
        "times-latent",
        "it is the KL per example times the latent size: it counts every latent dimension that many times",
        "Sum over the latent dimensions once.",
        "-0.5 * (1 + logvar - mean**2 - logvar.exp()).sum(-1).mean() * mean.shape[-1]",
        {"latent": 1},
    ),
    _factor(
        "batch-divided-twice",
        "it divides by the batch size twice",
        "Divide the sum over the batch by its size once: .sum(-1).mean().",
        "-0.5 * (1 + logvar - mean**2 - logvar.exp()).sum(-1).mean() / mean.shape[0]",
        {"batch": -1},
    ),
    _factor(
        "batch-counted-twice",
        "it sums over the batch twice, or broadcasts the sum over the batch and sums again",
        "Sum over the latent dimensions alone, sum(-1), and reduce over the batch once.",
        "(-0.5 * torch.sum(1 + logvar - mean**2 - logvar.exp())).expand(mean.shape[0]).sum()",
        {"batch": 1},
    ),
    _factor(
        "total-for-each-example",
        "it gives every example the sum (or mean) over the whole batch: a sum() without a dimension, broadcast",
        "Sum over the latent dimensions alone: sum(-1).",
        "(-0.5 * torch.sum(1 + logvar - mean**2 - logvar.exp())) * torch.ones(mean.shape[0])",
        {"repeated": True},
    ),
    _factor(
        "half-missing",
        "it lacks the factor ½",
        "Multiply by ½.",
        "-(1 + logvar - mean**2 - logvar.exp()).sum(-1).mean()",
        {"scale": 2.0},
    ),
    _factor(
        "half-twice",
        "it has the factor ½ twice",
        "Multiply by ½ once.",
        "-0.25 * (1 + logvar - mean**2 - logvar.exp()).sum(-1).mean()",
        {"scale": 0.5},
    ),
    _factor(
        "sign",
        "it has the wrong sign, so that minimising it drives q away from p",
        "Change the sign: log q - log p, under q.",
        "0.5 * (1 + logvar - mean**2 - logvar.exp()).sum(-1).mean()",
        {"scale": -1.0},
    ),
    _factor(
        "bits",
        "it is in bits: it takes logarithms of base 2",
        "Take natural logarithms, or say that the unit is bits.",
        "-0.5 * (1 + logvar - mean**2 - logvar.exp()).sum(-1).mean() / math.log(2)",
        {"scale": 1 / math.log(2)},
    ),
    _factor(
        "base-ten",
        "it takes logarithms of base 10",
        "Take natural logarithms.",
        "-0.5 * (1 + logvar - mean**2 - logvar.exp()).sum(-1).mean() / math.log(10)",
        {"scale": 1 / math.log(10)},
    ),
    _factor(
        "always-zero",
        "it is zero for every q and p: its terms cancel",
        "Take log q(x) - log p(x), of two distributions.",
        "(log_q - log_q).mean() + 0 * log_p.mean()",
        {"scale": 0.0},
        signature="log_probs",
    ),
)
