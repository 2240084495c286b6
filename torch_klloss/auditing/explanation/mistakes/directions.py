"""Mistakes with the direction: another divergence of the same two distributions."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from torch_klloss.auditing.experiment.probes import Categoricals, Normals
from torch_klloss.auditing.explanation.expectations import REVERSE
from torch_klloss.auditing.explanation.mistake import Mistake

_BOTH = ((1.0, False), (1.0, True))


_TWO_NORMALS = frozenset({"distributions", "independent", "multivariate"})


def _with_standard_p(n: Normals) -> Normals:
    return replace(n, p_mean=0 * n.p_mean, p_logvar=0 * n.p_logvar)


def _with_variances_for_scales(n: Normals) -> Normals:
    return replace(n, q_logvar=2 * n.q_logvar, p_logvar=2 * n.p_logvar)


def _log_mixture(c: Categoricals) -> Tensor:
    return torch.logaddexp(c.log_q, c.log_p) - math.log(2)


MISTAKES = (
    Mistake(
        id="swapped",
        what="it is KL(p‖q), the KL in the other direction",
        fix="Exchange q and p; torch's kl_divergence takes the distribution of the expectation first, "
        "F.kl_div takes it second.",
        signature="distributions",
        wrong="kl_divergence(p, q).sum(-1).mean()",
        analytic={"direction": REVERSE},
        sampled={"direction": REVERSE},
        categorical={"direction": REVERSE},
    ),
    Mistake(
        id="symmetrised",
        what="it is the sum of the KLs in both directions",
        fix="Leave out KL(p‖q), or say that the divergence is Jeffreys'.",
        signature="distributions",
        wrong="(kl_divergence(q, p) + kl_divergence(p, q)).sum(-1).mean()",
        analytic={"direction": _BOTH},
        sampled={"direction": _BOTH},
        categorical={"direction": _BOTH},
    ),
    Mistake(
        id="prior-ignored",
        what="it compares q with the standard Normal, whatever p is",
        fix="Use p's mean and scale.",
        signature="distributions",
        wrong="0.5 * (q.mean**2 + q.variance - 1 - q.variance.log()).sum(-1).mean()",
        analytic={"pair": _with_standard_p},
        sampled={"pair": _with_standard_p},
        only=_TWO_NORMALS,
    ),
    Mistake(
        id="variances-as-scales",
        what="it takes the variances of q and p for standard deviations",
        fix="Normal takes a standard deviation: Normal(mean, variance.sqrt()).",
        signature="distributions",
        wrong="kl_divergence(torch.distributions.Normal(q.mean, q.variance), "
        "torch.distributions.Normal(p.mean, p.variance)).sum(-1).mean()",
        analytic={"pair": _with_variances_for_scales},
        only=_TWO_NORMALS,
    ),
    Mistake(
        id="jensen-shannon",
        what="it is the Jensen-Shannon divergence, half the KLs of q and p to their mixture",
        fix="Compare q with p and not with their mixture, or say that the divergence is Jensen's and Shannon's.",
        signature="logits",
        wrong="0.5 * sum((w * (w.log() - (0.5 * (logits_q.softmax(-1) + logits_p.softmax(-1))).log())).sum(-1).mean() "
        "for w in (logits_q.softmax(-1), logits_p.softmax(-1)))",
        categorical={"direction": ((0.5, False), (0.5, True)), "log p": _log_mixture},
    ),
)
