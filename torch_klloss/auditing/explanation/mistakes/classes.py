"""Mistakes with probabilities, their logarithms and raw scores of categorical distributions."""

from dataclasses import replace

from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

from torch_klloss.auditing.experiment.probes import Categoricals
from torch_klloss.auditing.explanation.mistake import Mistake

_RAW = frozenset({"logits"})  # the logits of a Categorical are normalised


def _over_batch(scores: Tensor, c: Categoricals) -> Tensor:
    return c.layout.row_wise(lambda part: part.log_softmax(0), scores)


_KL_DIV = "F.kl_div takes log-probabilities of p as input and probabilities of q as target (or log_target=True)."


def _temperature(T: int) -> Mistake:
    return Mistake(
        id=f"temperature-{T}",
        what=f"it divides the scores of q and p by a temperature of {T}",
        fix="Compare the distributions themselves; softened ones have another KL, and a gradient smaller by about T².",
        signature="logits",
        wrong=f"F.kl_div((logits_p / {T}).log_softmax(-1), (logits_q / {T}).softmax(-1), reduction='batchmean')",
        categorical={"pair": lambda c: replace(c, q_logits=c.q_logits / T, p_logits=c.p_logits / T)},
        only=_RAW,
    )


def _softmax_again(probabilities: Tensor, c: Categoricals) -> Tensor:
    return c.layout.row_wise(lambda rows: rows.log_softmax(-1), probabilities)


MISTAKES = (
    Mistake(
        id="probabilities-as-log-probabilities",
        what="it has p's probabilities in place of their logarithms",
        fix=f"{_KL_DIV} Take log_softmax for the input.",
        signature="logits",
        wrong="F.kl_div(logits_p.softmax(-1), logits_q.softmax(-1), reduction='batchmean')",
        categorical={"log p": lambda c: c.log_p.exp()},
    ),
    Mistake(
        id="raw-scores-of-p",
        what="it has p's raw scores in place of log-probabilities: they lack the normaliser",
        fix=f"{_KL_DIV} Take log_softmax for the input.",
        signature="logits",
        wrong="F.kl_div(logits_p, logits_q.softmax(-1), reduction='batchmean')",
        categorical={"log p": lambda c: c.p_logits},
        only=_RAW,
    ),
    Mistake(
        id="raw-scores-of-q",
        what="it has q's raw scores in place of log-probabilities: they lack the normaliser",
        fix="Take log_softmax of q's scores.",
        signature="logits",
        wrong="(logits_q.softmax(-1) * (logits_q - logits_p.log_softmax(-1))).sum(-1).mean()",
        categorical={"log q": lambda c: c.q_logits},
        only=_RAW,
    ),
    Mistake(
        id="log-of-q-missing",
        what="it has q's probability in place of its logarithm",
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
        what="it weights by log q in place of q",
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
        categorical={
            "weight": lambda c: _over_batch(c.q_logits, c).exp(),
            "log q": lambda c: _over_batch(c.q_logits, c),
            "log p": lambda c: _over_batch(c.p_logits, c),
        },
        only=_RAW,
    ),
    Mistake(
        id="softmax-twice-of-p",
        what="it takes the softmax of p's softmax",
        fix="Take log_softmax of the raw scores, once.",
        signature="logits",
        wrong="F.kl_div(logits_p.softmax(-1).log_softmax(-1), logits_q.softmax(-1), reduction='batchmean')",
        categorical={"log p": lambda c: _softmax_again(c.log_p.exp(), c)},
        only=_RAW | {"kl_div"},
    ),
    Mistake(
        id="softmax-twice-of-q",
        what="it takes the softmax of q's softmax",
        fix="Take softmax of the raw scores, once.",
        signature="kl_div",
        wrong="F.kl_div(input, target.softmax(-1), reduction='batchmean')",
        categorical={
            "weight": lambda c: _softmax_again(c.log_q.exp(), c).exp(),
            "log q": lambda c: _softmax_again(c.log_q.exp(), c),
        },
        only=_RAW | {"kl_div"},
    ),
    Mistake(
        id="log-of-log",
        what="it takes the logarithm of p's log-probabilities",
        fix="The input is log-probabilities already: take them as they are.",
        signature="kl_div",
        wrong="(target * (target.log() - input.abs().log())).sum(-1).mean()",
        categorical={"log p": lambda c: c.log_p.abs().log()},
    ),
    Mistake(
        id="sigmoid-for-softmax",
        what="it takes the sigmoid of every score in place of the softmax over the classes",
        fix="Take softmax and log_softmax over the last dimension.",
        signature="logits",
        wrong="(logits_q.sigmoid() * (F.logsigmoid(logits_q) - F.logsigmoid(logits_p))).sum(-1).mean()",
        categorical={
            "weight": lambda c: c.q_logits.sigmoid(),
            "log q": lambda c: logsigmoid(c.q_logits),
            "log p": lambda c: logsigmoid(c.p_logits),
        },
        only=_RAW,
    ),
    Mistake(
        id="hard-labels",
        what="it is the cross-entropy with q's most likely class alone",
        fix="Weight by all of q's probabilities, and subtract q's entropy.",
        signature="logits",
        wrong="F.cross_entropy(logits_p, logits_q.argmax(-1))",
        categorical={
            "weight": lambda c: c.layout.row_wise(lambda row: one_hot(row.argmax(-1), row.shape[-1]).double(), c.log_q),
            "log q": lambda c: 0 * c.log_q,
        },
        only=_RAW | {"kl_div", "kl_div_log_target"},
    ),
    Mistake(
        id="log-target-of-probabilities",
        what="it takes probabilities of q for log-probabilities: log_target=True with a target of probabilities",
        fix="Leave out log_target=True, or take the logarithm of the target.",
        signature="kl_div",
        wrong="F.kl_div(input, target, log_target=True, reduction='batchmean')",
        categorical={"weight": lambda c: c.log_q.exp().exp(), "log q": lambda c: c.log_q.exp()},
    ),
    *(_temperature(T) for T in (2, 3, 4, 5, 10)),
    Mistake(
        id="ones-alone",
        what="it sums over the outcome 1 alone: the term (1 - q) log((1 - q)/(1 - p)) is missing",
        fix="Add the term of the outcome 0.",
        signature="bernoulli",
        wrong="(q.probs * (q.probs / p.probs).log()).sum(-1).mean()",
        categorical={"outcomes": lambda both: both[0]},
        only=frozenset({"bernoulli"}),
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
