"""Mistakes that keep half of the KL: a cross-entropy, or an entropy."""

import math

from torch_klloss.auditing.explanation.expectations import TERMS
from torch_klloss.auditing.explanation.mistake import Mistake

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)

MISTAKES = (
    Mistake(
        id="cross-entropy",
        what="it is the cross-entropy -E[log p], which lacks q's entropy and is not zero at q = p",
        fix="Subtract q's entropy. Where q is fixed the gradient is the KL's, the value is not.",
        signature="logits",
        wrong="-(logits_q.softmax(-1) * logits_p.log_softmax(-1)).sum(-1).mean()",
        analytic={
            "log": lambda n: 0.5 * n.p_logvar,
            "constant": lambda n: 0 * n.q_mean + _HALF_LOG_2PI,
        },
        sampled={"integrand": lambda log_q, log_p: -log_p},
        categorical={"log q": lambda c: 0 * c.q_logits},
    ),
    Mistake(
        id="negative-entropy",
        what="it is the negative entropy E[log q]: p is missing",
        fix="Subtract E[log p].",
        signature="logits",
        wrong="(logits_q.softmax(-1) * logits_q.log_softmax(-1)).sum(-1).mean() + 0 * logits_p.sum()",
        analytic={
            "log": lambda n: -0.5 * n.q_logvar,
            "mean": lambda n: 0 * n.q_mean,
            "variance": lambda n: 0 * n.q_mean,
            "constant": lambda n: TERMS["constant"](n) - _HALF_LOG_2PI,
        },
        sampled={"integrand": lambda log_q, log_p: log_q},
        categorical={"log p": lambda c: 0 * c.p_logits},
    ),
)
