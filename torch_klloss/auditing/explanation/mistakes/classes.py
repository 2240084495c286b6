"""Mistakes with probabilities, their logarithms and raw scores of categorical distributions."""

from dataclasses import replace

from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

from torch_klloss.auditing.experiment.probes import Categoricals
from torch_klloss.auditing.explanation.mistake import Mistake, Parts

_RAW = frozenset({"logits", "token_logits"})  # the logits of a Categorical are normalised


def _log_softmax(scores: Tensor, c: Categoricals, dim: int = -1) -> Tensor:
    return c.layout.row_wise(lambda part: part.log_softmax(dim), scores)


_KL_DIV = "F.kl_div takes log-probabilities of p as input and probabilities of q as target (or log_target=True)."


def _mistake(
    id: str,
    what: str,
    fix: str,
    wrong: str,
    parts: Parts,
    signature: str = "logits",
    only: frozenset[str] | None = None,
) -> Mistake:
    return Mistake(id, what, fix, signature, wrong, categorical=parts, only=only)


def _temperature(T: int) -> Mistake:
    return _mistake(
        f"temperature-{T}",
        f"it divides the scores of q and p by a temperature of {T}",
        "Compare the distributions themselves; softened ones have another KL, and a gradient smaller by about T².",
        f"F.kl_div((logits_p / {T}).log_softmax(-1), (logits_q / {T}).softmax(-1), reduction='batchmean')",
        {"pair": lambda c: replace(c, q_logits=c.q_logits / T, p_logits=c.p_logits / T)},
        only=_RAW,
    )


MISTAKES = (
    _mistake(
        "probabilities-as-log-probabilities",
        "it has p's probabilities in place of their logarithms",
        f"{_KL_DIV} Take log_softmax for the input.",
        "F.kl_div(logits_p.softmax(-1), logits_q.softmax(-1), reduction='batchmean')",
        {"log p": lambda c: c.log_p.exp()},
    ),
    _mistake(
        "raw-scores-of-p",
        "it has p's raw scores in place of log-probabilities: they lack the normaliser",
        f"{_KL_DIV} Take log_softmax for the input.",
        "F.kl_div(logits_p, logits_q.softmax(-1), reduction='batchmean')",
        {"log p": lambda c: c.p_logits},
        only=_RAW,
    ),
    _mistake(
        "raw-scores-of-q",
        "it has q's raw scores in place of log-probabilities: they lack the normaliser",
        "Take log_softmax of q's scores.",
        "(logits_q.softmax(-1) * (logits_q - logits_p.log_softmax(-1))).sum(-1).mean()",
        {"log q": lambda c: c.q_logits},
        only=_RAW,
    ),
    _mistake(
        "log-of-q-missing",
        "it has q's probability in place of its logarithm",
        "Take the logarithm of q's probability: the terms are q (log q - log p).",
        "(target * (target - input)).sum(-1).mean()",
        {"log q": lambda c: c.log_q.exp()},
        signature="kl_div",
    ),
    _mistake(
        "not-weighted",
        "it does not weight the log-ratios by q: the sum over the classes needs the factor q",
        "Multiply each log q - log p by q before the sum over the classes.",
        "(logits_q.log_softmax(-1) - logits_p.log_softmax(-1)).sum(-1).mean()",
        {"weight": lambda c: 0 * c.log_q + 1},
    ),
    _mistake(
        "log-probabilities-as-weights",
        "it weights by log q in place of q",
        "Weight by probabilities: the terms are q (log q - log p).",
        "(logits_q.log_softmax(-1) * (logits_q.log_softmax(-1) - logits_p.log_softmax(-1))).sum(-1).mean()",
        {"weight": lambda c: c.log_q},
    ),
    _mistake(
        "wrong-weights",
        "it weights the log-ratios log q - log p by p",
        "Weight by q, the distribution that the expectation is under.",
        "(logits_p.softmax(-1) * (logits_q.log_softmax(-1) - logits_p.log_softmax(-1))).sum(-1).mean()",
        {"weight": lambda c: c.log_p.exp()},
    ),
    _mistake(
        "softmax-over-batch",
        "it takes the softmax over the batch and not over the classes",
        "Take the softmax over the last dimension: dim=-1.",
        "F.kl_div(logits_p.log_softmax(0), logits_q.softmax(0), reduction='batchmean')",
        {
            "weight": lambda c: _log_softmax(c.q_logits, c, dim=0).exp(),
            "log q": lambda c: _log_softmax(c.q_logits, c, dim=0),
            "log p": lambda c: _log_softmax(c.p_logits, c, dim=0),
        },
        only=_RAW,
    ),
    _mistake(
        "softmax-twice-of-p",
        "it takes the softmax of p's softmax",
        "Take log_softmax of the raw scores, once.",
        "F.kl_div(logits_p.softmax(-1).log_softmax(-1), logits_q.softmax(-1), reduction='batchmean')",
        {"log p": lambda c: _log_softmax(c.log_p.exp(), c)},
        only=_RAW | {"kl_div"},
    ),
    _mistake(
        "softmax-twice-of-q",
        "it takes the softmax of q's softmax",
        "Take softmax of the raw scores, once.",
        "F.kl_div(input, target.softmax(-1), reduction='batchmean')",
        {
            "weight": lambda c: _log_softmax(c.log_q.exp(), c).exp(),
            "log q": lambda c: _log_softmax(c.log_q.exp(), c),
        },
        only=_RAW | {"kl_div"},
        signature="kl_div",
    ),
    _mistake(
        "log-of-log",
        "it takes the logarithm of p's log-probabilities",
        "The input is log-probabilities already: take them as they are.",
        "(target * (target.log() - input.abs().log())).sum(-1).mean()",
        {"log p": lambda c: c.log_p.abs().log()},
        signature="kl_div",
    ),
    _mistake(
        "sigmoid-for-softmax",
        "it takes the sigmoid of every score in place of the softmax over the classes",
        "Take softmax and log_softmax over the last dimension.",
        "(logits_q.sigmoid() * (F.logsigmoid(logits_q) - F.logsigmoid(logits_p))).sum(-1).mean()",
        {
            "weight": lambda c: c.q_logits.sigmoid(),
            "log q": lambda c: logsigmoid(c.q_logits),
            "log p": lambda c: logsigmoid(c.p_logits),
        },
        only=_RAW,
    ),
    _mistake(
        "hard-labels",
        "it is the cross-entropy with q's most likely class alone",
        "Weight by all of q's probabilities, and subtract q's entropy.",
        "F.cross_entropy(logits_p, logits_q.argmax(-1))",
        {
            "weight": lambda c: c.layout.row_wise(lambda row: one_hot(row.argmax(-1), row.shape[-1]).double(), c.log_q),
            "log q": lambda c: 0 * c.log_q,
        },
        only=_RAW | {"kl_div", "kl_div_log_target"},
    ),
    _mistake(
        "log-target-of-probabilities",
        "it takes probabilities of q for log-probabilities: log_target=True with a target of probabilities",
        "Leave out log_target=True, or take the logarithm of the target.",
        "F.kl_div(input, target, log_target=True, reduction='batchmean')",
        {"weight": lambda c: c.log_q.exp().exp(), "log q": lambda c: c.log_q.exp()},
        signature="kl_div",
    ),
    *(_temperature(T) for T in (2, 3, 4, 5, 10)),
    _mistake(
        "ones-alone",
        "it sums over the outcome 1 alone: the term (1 - q) log((1 - q)/(1 - p)) is missing",
        "Add the term of the outcome 0.",
        "(q.probs * (q.probs / p.probs).log()).sum(-1).mean()",
        {"outcomes": lambda both: both[0]},
        only=frozenset({"bernoulli"}),
        signature="bernoulli",
    ),
    _mistake(
        "absolute-terms",
        "it takes the absolute value of each class's term, of which some are rightly negative",
        "Sum the terms with their signs.",
        "(logits_q.softmax(-1) * (logits_q.log_softmax(-1) - logits_p.log_softmax(-1))).abs().sum(-1).mean()",
        {"summand": lambda weight, log_q, log_p: (weight * (log_q - log_p)).abs()},
    ),
    _mistake(
        "clamped-terms",
        "it clamps each class's term at zero, of which some are rightly negative",
        "Sum the terms with their signs.",
        "(logits_q.softmax(-1) * (logits_q.log_softmax(-1) - logits_p.log_softmax(-1))).clamp(min=0).sum(-1).mean()",
        {"summand": lambda weight, log_q, log_p: (weight * (log_q - log_p)).clamp(min=0)},
    ),
    _mistake(
        "squared-terms",
        "it squares the log-ratios",
        "Take the log-ratios as they are.",
        "(logits_q.softmax(-1) * (logits_q.log_softmax(-1) - logits_p.log_softmax(-1)) ** 2).sum(-1).mean()",
        {"summand": lambda weight, log_q, log_p: weight * (log_q - log_p).square()},
    ),
    _mistake(
        "mean-squared-error",
        "it is the squared difference of the probabilities",
        "The KL compares logarithms: its terms are q (log q - log p).",
        "((logits_q.softmax(-1) - logits_p.softmax(-1)) ** 2).sum(-1).mean()",
        {"summand": lambda weight, log_q, log_p: (log_q.exp() - log_p.exp()).square()},
    ),
)
