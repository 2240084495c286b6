"""Mistakes with the token distributions of language models, `[batch, time, vocabulary]` with a mask."""

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from torch_klloss.auditing.experiment.probes import Categoricals
from torch_klloss.auditing.experiment.tokens import Shares
from torch_klloss.auditing.explanation.mistake import Mistake, Parts

_Q, _P = "logits_q.log_softmax(-1)", "logits_p.log_softmax(-1)"
_KL = f"({_Q}.exp() * ({_Q} - {_P})).sum(-1)"
_NATS = "torch_klloss.language.DistillationLoss has the reductions by name: token_mean, sequence_mean, sequence_sum."


def _mistake(id: str, what: str, fix: str, wrong: str, parts: Parts) -> Mistake:
    return Mistake(
        id, what, fix, "token_logits", wrong, categorical=parts, only=frozenset({"token_logits"}), num_dims=3
    )


def _reduced(id: str, what: str, fix: str, wrong: str, shares: Shares) -> Mistake:
    return _mistake(id, what, f"{fix} {_NATS}", wrong, {"tokens": shares})


def _pairs(mask: Tensor, vocabulary: int) -> Tensor:
    """Return the shares of the mean over microbatches of two sequences of their token means."""
    parts = mask.split(2)
    return torch.cat([part / part.sum() for part in parts]) / len(parts)


def _late(mask: Tensor, vocabulary: int) -> Tensor:
    return pad(mask[:, :-1], (1, 0)) / mask[:, :-1].sum()


def _last(mask: Tensor, vocabulary: int) -> Tensor:
    return pad(torch.ones_like(mask[:, :1]), (mask.shape[1] - 1, 0)) / len(mask)


_REDUCTIONS = (
    _reduced(
        "padding-counted",
        "it takes the mean over all tokens, those of padding too: the mask has no effect",
        "Multiply by the mask and divide by its sum.",
        f"{_KL}.mean() + 0 * mask.sum()",
        lambda mask, vocabulary: torch.ones_like(mask) / mask.numel(),
    ),
    _reduced(
        "masked-sum-over-all-tokens",
        "it sums over the tokens that count and divides by the number of all tokens, those of padding too",
        "Divide by the sum of the mask.",
        f"({_KL} * mask).mean()",
        lambda mask, vocabulary: mask / mask.numel(),
    ),
    _reduced(
        "batchmean-of-sequences",
        "it sums over all tokens of a sequence, those of padding too, and divides by the batch alone: batchmean of "
        "three dimensions, which grows with the length",
        "Sum over the vocabulary alone, and reduce with the mask.",
        f"F.kl_div({_P}, {_Q}, log_target=True, reduction='batchmean') + 0 * mask.sum()",
        lambda mask, vocabulary: torch.ones_like(mask) / len(mask),
    ),
    _reduced(
        "mean-over-vocabulary",
        "it takes the mean over the vocabulary, which the KL sums",
        "Sum over the vocabulary.",
        f"({_KL} * mask).sum() / (mask.sum() * logits_q.shape[-1])",
        lambda mask, vocabulary: mask / mask.sum() / vocabulary,
    ),
    _reduced(
        "mean-over-all-numbers",
        "it takes the mean over the batch, the time and the vocabulary: F.kl_div with reduction='mean'",
        "Sum over the vocabulary, and divide by the sum of the mask.",
        f"F.kl_div({_P}, {_Q}, log_target=True, reduction='none').mean() + 0 * mask.sum()",
        lambda mask, vocabulary: torch.ones_like(mask) / mask.numel() / vocabulary,
    ),
    _reduced(
        "mean-of-microbatch-means",
        "it takes the mean over microbatches, of two sequences each, of their token means: a token of a microbatch "
        "with few of them counts for more",
        "Divide the sum over all microbatches by the number of their tokens: normalizer=.",
        f"torch.stack([(kl * m).sum() / m.sum() for kl, m in zip({_KL}.split(2), mask.split(2))]).mean()",
        _pairs,
    ),
    _reduced(
        "token-mean-over-batch",
        "it divides the mean over the tokens by the batch size once more",
        "Divide the sum by the number of tokens alone.",
        f"({_KL} * mask).sum() / mask.sum() / len(mask)",
        lambda mask, vocabulary: mask / mask.sum() / len(mask),
    ),
    _reduced(
        "mask-one-late",
        "it takes the mask of the token before: the logits at a place are of this token, or the next, never the last",
        "Compare the logits [:, :-1] with the mask [:, 1:], or both at the same places.",
        f"({_KL}[:, 1:] * mask[:, :-1]).sum() / mask[:, :-1].sum()",
        _late,
    ),
    _reduced(
        "last-position-alone",
        "it compares the last position alone, which is padding in most sequences",
        "Compare the positions that the mask keeps.",
        f"{_KL}[:, -1].mean() + 0 * mask.sum()",
        _last,
    ),
)


# --- distributions ----------------------------------------------------------------------------------------------------


def _top(scores: Tensor, c: Categoricals, k: int) -> Tensor:
    """Return whether a token is among the k likeliest, 1 or 0."""

    def of_probe(part: Tensor) -> Tensor:
        return torch.zeros_like(part).scatter(-1, part.topk(k).indices, 1.0)

    return c.layout.row_wise(of_probe, scores.detach())


def _log_mass(logs: Tensor, where: Tensor, c: Categoricals) -> Tensor:
    """Return the logarithm of the sum of the probabilities of some tokens, for every token."""

    def of_probe(part: Tensor) -> Tensor:
        return part.logsumexp(-1, keepdim=True).expand_as(part)

    return c.layout.row_wise(of_probe, logs.masked_fill(where == 0, -torch.inf))


def _within(logs: Tensor, c: Categoricals, k: int) -> Tensor:
    """Return the log-probabilities within q's k likeliest tokens; 0 for the others."""
    top = _top(c.q_logits, c, k)
    return torch.where(top > 0, logs - _log_mass(logs, top, c), 0.0)


def _with_bucket(logs: Tensor, c: Categoricals, k: int) -> Tensor:
    """Return the log-probabilities, those of all but q's k likeliest tokens for each of these."""
    top = _top(c.q_logits, c, k)
    return torch.where(top > 0, logs, _log_mass(logs, 1 - top, c))


def _with_zero_columns(number: int, scores: Tensor, c: Categoricals) -> Tensor:
    """Return the log-probabilities in a vocabulary that scores of 0 pad."""
    return c.layout.row_wise(lambda part: pad(part, (0, number)).log_softmax(-1)[..., :-number], scores)


def _zero_padded(number: int) -> Mistake:
    scores = "a score" if number == 1 else f"{number} scores"
    padded = f"F.pad(logits_p, (0, {number})).log_softmax(-1)[..., :-{number}]"
    return _mistake(
        "zero-padded-vocabulary" + (f"-{number}" if number > 1 else ""),
        f"it pads p's vocabulary with {scores} of 0, which takes mass from the real tokens",
        "Cut both to the real tokens (vocab_size=), or pad with -inf.",
        f"(({_Q}.exp() * ({_Q} - {padded})).sum(-1) * mask).sum() / mask.sum()",
        {"log p": lambda c: _with_zero_columns(number, c.p_logits, c)},
    )


def _over_time(scores: Tensor, c: Categoricals) -> Tensor:
    return c.layout.row_wise(lambda part: part.log_softmax(1), scores)


def _mixed(c: Categoricals) -> Tensor:
    """Return the logarithm of a tenth of q and nine tenths of p."""
    return torch.logaddexp(c.log_q + math.log(0.1), c.log_p + math.log(0.9))


_MIX = f"torch.logaddexp({_Q} + math.log(0.1), {_P} + math.log(0.9))"


def _of_top(k: int) -> tuple[Mistake, ...]:
    head = f"(lambda top: ({{}} * mask).sum() / mask.sum())(logits_q.topk({k}).indices)"
    q, p = (f"{logs}.gather(-1, top)" for logs in (_Q, _P))
    tail = "torch.cat([{0}.gather(-1, top), torch.log1p(-{0}.gather(-1, top).exp().sum(-1, keepdim=True))], -1)"
    q_tail, p_tail = tail.format(_Q), tail.format(_P)
    within = ".log_softmax(-1)"
    return (
        _mistake(
            f"truncated-top-{k}",
            f"it sums over q's {k} likeliest tokens alone: it is negative at its minimum, which leaves nothing to the "
            "other tokens",
            "Compare the mass of the other tokens too, as SparseTeacher(tail='bucket') does.",
            head.format(f"({q}.exp() * ({q} - {p})).sum(-1)"),
            {"weight": lambda c: _top(c.q_logits, c, k) * c.log_q.exp()},
        ),
        _mistake(
            f"renormalised-top-{k}",
            f"it compares q and p within q's {k} likeliest tokens: what p gives to the others costs nothing",
            "Compare the mass of the other tokens too, as SparseTeacher(tail='bucket') does.",
            head.format(f"({q}{within}.exp() * ({q}{within} - {p}{within})).sum(-1)"),
            {
                "weight": lambda c: _top(c.q_logits, c, k) * _within(c.log_q, c, k).exp(),
                "log q": lambda c: _within(c.log_q, c, k),
                "log p": lambda c: _within(c.log_p, c, k),
            },
        ),
        _mistake(
            f"ghost-tail-{k}",
            f"it compares all but q's {k} likeliest tokens as one class: it is a lower bound of the KL",
            "Compare all tokens, or draw the others (SparseTeacher.sampled); if the bound is meant, take the tail's "
            "mass from a logsumexp: 1 - Σp cancels.",
            head.format(f"({q_tail}.exp() * ({q_tail} - {p_tail})).sum(-1)"),
            {"log q": lambda c: _with_bucket(c.log_q, c, k), "log p": lambda c: _with_bucket(c.log_p, c, k)},
        ),
    )


MISTAKES = (
    *_REDUCTIONS,
    _mistake(
        "softmax-over-time",
        "it takes the softmax over the time and not over the vocabulary",
        "Take the softmax over the last dimension: dim=-1.",
        "((logits_q.softmax(1) * (logits_q.log_softmax(1) - logits_p.log_softmax(1))).sum(-1) * mask).sum() "
        "/ mask.sum()",
        {
            "weight": lambda c: _over_time(c.q_logits, c).exp(),
            "log q": lambda c: _over_time(c.q_logits, c),
            "log p": lambda c: _over_time(c.p_logits, c),
        },
    ),
    _mistake(
        "temperature-of-q-alone",
        "it divides q's scores by a temperature of 2, and p's by none",
        "Divide both by the same temperature.",
        f"(((logits_q / 2).softmax(-1) * ((logits_q / 2).log_softmax(-1) - {_P})).sum(-1) * mask).sum() / mask.sum()",
        {"pair": lambda c: replace(c, q_logits=c.q_logits / 2)},
    ),
    _mistake(
        "temperature-of-p-alone",
        "it divides p's scores by a temperature of 2, and q's by none",
        "Divide both by the same temperature.",
        f"((logits_q.softmax(-1) * ({_Q} - (logits_p / 2).log_softmax(-1))).sum(-1) * mask).sum() / mask.sum()",
        {"pair": lambda c: replace(c, p_logits=c.p_logits / 2)},
    ),
    *(mistake for k in (2, 3, 4, 5) for mistake in _of_top(k)),
    _mistake(
        "log-space-mixture",
        "it compares both with the mean of their log-probabilities, for a Jensen-Shannon divergence: that mean is no "
        "distribution, and the result a quarter of Jeffreys' divergence",
        "Mix the probabilities: torch.logaddexp(log_q, log_p) - math.log(2).",
        f"(lambda m: ((0.5 * {_Q}.exp() * ({_Q} - m) + 0.5 * {_P}.exp() * ({_P} - m)).sum(-1) * mask).sum() "
        f"/ mask.sum())(0.5 * ({_Q} + {_P}))",
        {
            "direction": ((0.5, False), (0.5, True)),
            "log p": lambda c: 0.5 * (c.log_q + c.log_p),
        },
    ),
    _mistake(
        "skewed",
        "it compares q with a mixture of a tenth of q and nine tenths of p: the skew KL",
        "Compare q with p, or say that the divergence is the skew KL, as SkewKL(0.1) does.",
        f"(({_Q}.exp() * ({_Q} - {_MIX})).sum(-1) * mask).sum() / mask.sum()",
        {"log p": _mixed},
    ),
    _mistake(
        "cross-entropy-with-mixture",
        "it is the cross-entropy with a mixture of a tenth of q and nine tenths of p: it lacks q's entropy, and is not "
        "zero at q = p",
        "Subtract q's entropy: the skew KL is SkewKL(0.1).",
        f"(-({_Q}.exp() * {_MIX}).sum(-1) * mask).sum() / mask.sum()",
        {"log q": lambda c: 0 * c.log_q, "log p": _mixed},
    ),
    *(_zero_padded(number) for number in (1, 2, 3, 4)),
    _mistake(
        "floored-log-probabilities",
        "it floors the log-probabilities of q and p at -10: where p has less, it costs no more and has no gradient",
        "Leave them as they are: the KL of logits needs no floor.",
        f"(({_Q}.exp() * ({_Q}.clamp(min=-10) - {_P}.clamp(min=-10))).sum(-1) * mask).sum() / mask.sum()",
        {
            "weight": lambda c: c.log_q.exp(),
            "log q": lambda c: c.log_q.clamp(min=-10),
            "log p": lambda c: c.log_p.clamp(min=-10),
        },
    ),
)
