"""Gaps between estimates of the KL of token distributions, as a loss of language models reduces them."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_klloss.callbacks.watching import AllRanks, wide
from torch_klloss.language import DistillationLoss, ReferenceKL, SparseTeacher
from torch_klloss.language.logits import sides_of
from torch_klloss.language.observers import TokenCall
from torch_klloss.language.tokens import Tokens
from torch_klloss.log_probs import kl_from_log_probs
from torch_klloss.methods.monte_carlo.tail_diagnostics import HeavyTailWarning
from torch_klloss.numerics.softmax.sides import Dense

_AT_ONCE = 2**22  # probabilities that exist while tokens are drawn
_ESTIMATORS = ("exact", "k1", "k3")


@dataclass(frozen=True)
class TokenGap:
    """Estimates of one KL, by sequence, not yet summed over sequences or ranks.

    Attributes:
        values: by name the numerator of every sequence; "value" and "reference" among them.
        parts: every sequence's part of the denominator.
        denominator: what replaces the sum of the parts, if anything does.
        sampled: the one with a standard error: "value" or "reference".
        variance: of the sum of the gaps, where the draws tell it; else it is taken from their spread.
        others: the names whose gap to "exact" is logged as well.
    """

    values: dict[str, Tensor]
    parts: Tensor
    denominator: float | None
    sampled: str
    variance: Tensor | None = None
    others: tuple[str, ...] = field(default=())

    def metrics(self, all_ranks: AllRanks) -> dict[str, float]:
        """Return the reduced values; `all_ranks` sums a tensor over the ranks."""
        count = (self.parts > 0).sum().to(self.parts)
        sums = all_ranks(torch.stack([self.parts.sum(), count, *(v.sum() for v in self.values.values())]))
        whole, count, *totals = sums.tolist()
        scale = (whole if self.denominator is None else self.denominator) or math.nan
        found = {name: total / scale for name, total in zip(self.values, totals, strict=True)}
        error = self._error("value", "reference", all_ranks, whole, count) / scale
        gap = found["value"] - found["reference"]
        found |= {"gap_mean": gap, "gap_std_error": error, "gap_z": gap / error if error else math.nan}
        for name in self.others:
            found[f"{name}_gap_mean"] = found[name] - found["exact"]
            found[f"{name}_gap_std_error"] = self._error(name, "exact", all_ranks, whole, count) / scale
        return found

    def _error(self, name: str, other: str, all_ranks: AllRanks, whole: float, count: float) -> float:
        """Return the standard error of the sum of the gaps."""
        gaps = self.values[name] - self.values[other]
        mean = all_ranks(gaps.sum()).item() / (whole or math.nan)
        spread = all_ranks((gaps - mean * self.parts).square().sum()).item() * count / (count - 1 or math.nan)
        if self.variance is None:
            return math.sqrt(spread)
        variance = all_ranks(self.variance).item()
        return math.sqrt(spread if math.isnan(variance) else variance)


def token_gap(call: TokenCall, num_samples: int) -> TokenGap:
    """Return the gaps of a call.

    Raises:
        NotImplementedError: if there is nothing to compare it with.
    """
    if isinstance(call.loss, DistillationLoss):
        return _of_distillation(call.loss, call.arguments, num_samples)
    assert isinstance(call.loss, ReferenceKL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HeavyTailWarning)  # of estimators that training does not use
        return _of_reference(call.loss, call.arguments)


def _denominator(reduction: str, arguments: dict[str, Any]) -> float | None:
    normalizer = arguments.get("normalizer")
    return 1.0 if reduction == "sum" else None if normalizer is None else float(normalizer)


# --- DistillationLoss: its exact value, and the log-ratio at tokens that are drawn -----------------------------------


def _of_distillation(loss: DistillationLoss, arguments: dict[str, Any], num_samples: int) -> TokenGap:
    teacher, student = arguments["teacher"], arguments["student"]
    if isinstance(teacher, SparseTeacher):
        raise NotImplementedError("of a SparseTeacher no tokens can be drawn; it needs the teacher's logits.")
    given = {key: arguments.get(key) for key in ("labels", "mask", "vocab_size", "boundaries")}
    sides = sides_of(("student", "teacher"), student, teacher, given["vocab_size"])
    if sides.shards is not None or not isinstance(sides.q, Dense) or not isinstance(sides.p, Dense):
        raise NotImplementedError("tokens are drawn from logits that are tensors, not a LinearHead or VocabShards.")
    result = loss.per_token(student, teacher, **given)
    exact, tokens = wide(result.found.value), result.tokens
    factors, parts = tokens.shares(exact, loss.reduction)
    rows = (
        torch.arange(factors.numel(), device=factors.device) if tokens.keep is None else tokens.keep.flatten().nonzero()
    )
    means, variances = _drawn(sides.p.rows.logits, sides.q.rows.logits, rows.flatten(), loss, num_samples)
    drawn = torch.zeros_like(exact).flatten().index_copy(0, rows.flatten(), wide(means)).view_as(exact)
    values = {"value": exact, "reference": drawn}
    return TokenGap(
        {name: tokens.by_sequence(factors * v).flatten() for name, v in values.items()},
        parts.flatten(),
        _denominator(loss.reduction, arguments),
        "reference",
        (factors.flatten()[rows.flatten()].square() * wide(variances)).sum(),
    )


def _drawn(
    teacher: Tensor, student: Tensor, rows: Tensor, loss: DistillationLoss, num_samples: int
) -> tuple[Tensor, Tensor]:
    """Return the means over draws of the log-ratios that the divergence of some rows averages, and their variances."""
    terms, scale = loss.divergence.terms, loss.temperature**2 if loss.scale_by_temperature else 1.0
    means, variances = [], []
    for some in rows.split(max(1, _AT_ONCE // teacher.shape[-1])):
        logs = [(t[some].float() / loss.temperature).log_softmax(-1) for t in (teacher, student)]
        mean = variance = torch.zeros(len(some), device=rows.device)
        for factor, mix, (log_q, log_p) in ((terms.by_q, terms.q_mix, logs), (terms.by_p, terms.p_mix, logs[::-1])):
            if factor:
                ratio = factor * scale * _log_ratios(log_q, log_p, mix, num_samples)
                mean, variance = mean + ratio.mean(-1), variance + _variance_of_mean(ratio)
        means.append(mean)
        variances.append(variance)
    return torch.cat(means), torch.cat(variances)


def _log_ratios(log_q: Tensor, log_p: Tensor, mix: float, num_samples: int) -> Tensor:
    """Return log q/((1 - mix) q + mix p) at draws of q, `[rows, draws]`."""
    ids = log_q.exp().multinomial(num_samples, replacement=True)
    at_q, at_p = log_q.gather(-1, ids), log_p.gather(-1, ids)
    if mix == 1:
        return at_q - at_p
    return at_q - torch.logaddexp(at_q + math.log1p(-mix), at_p + math.log(mix))


def _variance_of_mean(draws: Tensor) -> Tensor:
    count = draws.shape[-1]
    return draws.var(-1) / count if count > 1 else torch.full_like(draws[..., 0], torch.nan)


# --- ReferenceKL: the exact steps, k1 and k3 along the same sequences ------------------------------------------------


def _of_reference(loss: ReferenceKL, arguments: dict[str, Any]) -> TokenGap:
    given = {key: arguments.get(key) for key in ("policy", "reference", "tokens", "mask", "log_behavior")}
    policy, reference, tokens = given["policy"], given["reference"], given["tokens"]
    if any(isinstance(t, Tensor) and t.dim() < 3 for t in (policy, reference)) or tokens is None:
        raise NotImplementedError("the exact value needs logits [batch, time, vocabulary], and k1 and k3 the tokens.")
    log_q, log_p, found = loss.log_probs(policy, reference, tokens, given["mask"])
    values = {name: _each_sequence(loss, name, given, log_q, log_p, found) for name in _ESTIMATORS}
    is_exact = loss.estimator == "exact"
    pair = {"value": values[loss.estimator], "reference": values["k1" if is_exact else "exact"]}
    _, parts = found.shares(wide(log_q), loss.reduction)
    sampled = "reference" if is_exact else "value"
    return TokenGap(pair | values, parts, _denominator(loss.reduction, arguments), sampled, others=("k1", "k3"))


def _each_sequence(
    loss: ReferenceKL, estimator: Any, given: dict[str, Any], log_q: Tensor, log_p: Tensor, found: Tokens
) -> Tensor:
    """Return the numerator of every sequence, `[batch]`."""
    if estimator == "k3" and loss.gradient == "full":
        log_behavior, mask = given["log_behavior"], found.weights
        return wide(
            kl_from_log_probs(
                log_q.unsqueeze(0),
                log_p.unsqueeze(0),
                gradient="none",
                value="k3",
                mask=None if mask is None else mask.unsqueeze(0),
                log_behavior=None if log_behavior is None else log_behavior.unsqueeze(0),
                normalizer=1,
                token_dim=2,
                level="sequence",
            )
        )
    each = ReferenceKL(estimator, gradient="none", temperature=loss.temperature, reduction="none")
    steps = wide(each(**given))
    total = found.by_sequence(steps)
    if loss.reduction != "sequence_mean":
        return total
    counts = found.by_sequence(found.weighted(torch.ones_like(steps)))
    return torch.where(counts > 0, total / torch.where(counts > 0, counts, 1.0), 0.0)
