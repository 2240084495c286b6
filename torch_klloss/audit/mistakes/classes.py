"""Mistakes with probabilities, their logarithms and raw scores of categorical distributions."""

from torch_klloss.audit.mistake import Mistake

_RAW = frozenset({"logits", "categorical", "distributions"})
_KL_DIV = "F.kl_div takes log-probabilities of p as input and probabilities of q as target (or log_target=True)."

MISTAKES = (
    Mistake(
        id="probabilities-as-log-probabilities",
        what="it has p's probabilities where their logarithms are due",
        fix=f"{_KL_DIV} Take log_softmax for the input.",
        signature="logits",
        wrong="F.kl_div(logits_p.softmax(-1), logits_q.softmax(-1), reduction='batchmean')",
        categorical={"log p": lambda c: c.log_p.exp()},
    ),
    Mistake(
        id="raw-scores-of-p",
        what="it has p's raw scores where log-probabilities are due: they lack the normaliser",
        fix=f"{_KL_DIV} Take log_softmax for the input.",
        signature="logits",
        wrong="F.kl_div(logits_p, logits_q.softmax(-1), reduction='batchmean')",
        categorical={"log p": lambda c: c.p_logits},
        only=_RAW,
    ),
    Mistake(
        id="raw-scores-of-q",
        what="it has q's raw scores where log-probabilities are due: they lack the normaliser",
        fix="Take log_softmax of q's scores.",
        signature="logits",
        wrong="(logits_q.softmax(-1) * (logits_q - logits_p.log_softmax(-1))).sum(-1).mean()",
        categorical={"log q": lambda c: c.q_logits},
        only=_RAW,
    ),
    Mistake(
        id="log-of-q-missing",
        what="it has q's probability where its logarithm is due",
        fix="Take the logarithm of q's probability: the terms are q (log q - log p).",
        signature="kl_div",
        wrong="(target * (target - input)).sum(-1).mean()",
        categorical={"log q": lambda c: c.log_q.exp()},
    ),
    Mistake(
        id="not-weighted",
        what="it does not weight the log-ratios by q: the sum over the classes needs the factor q",
        fix="Multiply each log q - log p by q before the sum over the classes.",
        signature="logits",
        wrong="(logits_q.log_softmax(-1) - logits_p.log_softmax(-1)).sum(-1).mean()",
        categorical={"weight": lambda c: 0 * c.log_q + 1},
    ),
    Mistake(
        id="log-probabilities-as-weights",
        what="it weights by log q where q is due",
        fix="Weight by probabilities: the terms are q (log q - log p).",
        signature="logits",
        wrong="(logits_q.log_softmax(-1) * (logits_q.log_softmax(-1) - logits_p.log_softmax(-1))).sum(-1).mean()",
        categorical={"weight": lambda c: c.log_q},
    ),
    Mistake(
        id="wrong-weights",
        what="it weights the log-ratios log q - log p by p",
        fix="Weight by q, the distribution that the expectation is under.",
        signature="logits",
        wrong="(logits_p.softmax(-1) * (logits_q.log_softmax(-1) - logits_p.log_softmax(-1))).sum(-1).mean()",
        categorical={"weight": lambda c: c.log_p.exp()},
    ),
    Mistake(
        id="softmax-over-batch",
        what="it takes the softmax over the batch and not over the classes",
        fix="Take the softmax over the last dimension: dim=-1.",
        signature="logits",
        wrong="F.kl_div(logits_p.log_softmax(0), logits_q.softmax(0), reduction='batchmean')",
        categorical={"softmax": 0},
        only=_RAW,
    ),
    Mistake(
        id="absolute-terms",
        what="it takes the absolute value of each class's term, of which some are rightly negative",
        fix="Sum the terms with their signs.",
        signature="logits",
        wrong="(logits_q.softmax(-1) * (logits_q.log_softmax(-1) - logits_p.log_softmax(-1))).abs().sum(-1).mean()",
        categorical={"summand": lambda weight, log_q, log_p: (weight * (log_q - log_p)).abs()},
    ),
    Mistake(
        id="clamped-terms",
        what="it clamps each class's term at zero, of which some are rightly negative",
        fix="Sum the terms with their signs.",
        signature="logits",
        wrong="(logits_q.softmax(-1) * (logits_q.log_softmax(-1) - logits_p.log_softmax(-1))).clamp(min=0)"
        ".sum(-1).mean()",
        categorical={"summand": lambda weight, log_q, log_p: (weight * (log_q - log_p)).clamp(min=0)},
    ),
    Mistake(
        id="squared-terms",
        what="it squares the log-ratios",
        fix="Take the log-ratios as they are.",
        signature="logits",
        wrong="(logits_q.softmax(-1) * (logits_q.log_softmax(-1) - logits_p.log_softmax(-1)) ** 2).sum(-1).mean()",
        categorical={"summand": lambda weight, log_q, log_p: weight * (log_q - log_p).square()},
    ),
    Mistake(
        id="mean-squared-error",
        what="it is the squared difference of the probabilities",
        fix="The KL compares logarithms: its terms are q (log q - log p).",
        signature="logits",
        wrong="((logits_q.softmax(-1) - logits_p.softmax(-1)) ** 2).sum(-1).mean()",
        categorical={"summand": lambda weight, log_q, log_p: (log_q.exp() - log_p.exp()).square()},
    ),
)
