"""Mistakes with the direction: another divergence of the same two distributions."""

import torch

from torch_klloss.audit.expectations import FORWARD
from torch_klloss.audit.mistake import Mistake

_BOTH = ((1.0, False), (1.0, True))


def _log_mixture(c):  # type: ignore[no-untyped-def]
    return torch.logaddexp(c.log_q, c.log_p) - torch.log(torch.tensor(2.0, dtype=c.log_q.dtype))


MISTAKES = (
    Mistake(
        id="swapped",
        what="it is KL(p‖q), the KL in the other direction",
        fix="Change the places of q and p; torch's kl_divergence takes the distribution of the expectation first, "
        "F.kl_div takes it second.",
        signature="distributions",
        wrong="kl_divergence(p, q).sum(-1).mean()",
        analytic={"direction": ((1.0, True),)},
        sampled={"direction": ((1.0, True),)},
        categorical={"direction": ((1.0, True),)},
        only=None,
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
        id="jensen-shannon",
        what="it is the Jensen-Shannon divergence, half the KLs of q and p to their mixture",
        fix="Compare q with p and not with their mixture, or say that the divergence is Jensen's and Shannon's.",
        signature="logits",
        wrong="0.5 * sum((w * (w.log() - (0.5 * (logits_q.softmax(-1) + logits_p.softmax(-1))).log())).sum(-1).mean() "
        "for w in (logits_q.softmax(-1), logits_p.softmax(-1)))",
        categorical={"direction": ((0.5, False), (0.5, True)), "log p": _log_mixture},
    ),
)

__all__ = ["FORWARD", "MISTAKES"]
