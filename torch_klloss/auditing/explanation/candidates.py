"""Candidates: the KL, and what each mistake of the catalogue makes of it, for all probes at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from torch_klloss.auditing.experiment.observation import Observation, Subject, without_loss
from torch_klloss.auditing.experiment.probes import Categoricals, Layout
from torch_klloss.auditing.experiment.tokens import TOKEN_CONVENTIONS, Shares
from torch_klloss.auditing.explanation.expectations import (
    FACTORS,
    Core,
    Expectations,
    analytic,
    at_log_probs,
    at_points,
    categorical,
    log_ratio,
    misread,
)
from torch_klloss.auditing.explanation.mistake import (
    ANALYTIC,
    CATEGORICAL,
    SAMPLED,
    Hypothesis,
    Mistake,
    Parts,
    hypotheses,
)
from torch_klloss.auditing.explanation.mistakes import CATALOGUE

_DRAWS = {1: 512, 2: 128}  # for each of four nets that predict a mean: fewer for pairs, of which there are many
_KEPT = 16  # predictions of the catalogue, of at most 6 MiB each


@dataclass(frozen=True)
class Candidate:
    """A hypothesis and its prediction for every example."""

    hypothesis: Hypothesis
    core: Core


def right_core(subject: Subject) -> Candidate:
    """Return what a right loss computes: the KL of every example."""
    return Candidate(Hypothesis(), core_of(subject, {}))


def right_cores(subject: Subject) -> list[Candidate]:
    """Return all that a right loss may compute: of tokens with a mask, the KL under each convention."""
    if not subject.signature.masked:
        return [right_core(subject)]
    return [_as(Hypothesis(), shares, subject) for shares in TOKEN_CONVENTIONS]


def right_core_like(subject: Subject, like: Candidate | None) -> Candidate:
    """Return what a right loss computes, with the convention of a candidate."""
    shares = None if like is None else like.hypothesis.parts.get("tokens")
    return right_core(subject) if shares is None else _as(Hypothesis(), shares, subject)


def _as(hypothesis: Hypothesis, shares: Shares, subject: Subject) -> Candidate:
    """Return a hypothesis under a convention of the tokens."""
    hypothesis = replace(hypothesis, parts={**hypothesis.parts, "tokens": shares})
    return Candidate(hypothesis, core_of(subject, hypothesis.parts))


def core_of(subject: Subject, parts: Parts) -> Core:
    """Return the value of a formula in the parameters, or of a sum over classes, with some of its parts replaced."""
    pair = misread(subject, parts)
    if isinstance(pair, Categoricals):
        return categorical(pair, subject.layout, parts)
    return analytic(pair, subject.layout, parts)


def _k3(log_q: Tensor, log_p: Tensor) -> Tensor:
    log_r = log_p - log_q
    return torch.expm1(log_r) - log_r


UNBIASED: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (log_ratio, _k3)
"""The integrands whose expectation under q is the KL: k1 and k3."""


def unbiased_on_samples(subject: Subject, observation: Observation) -> list[Candidate]:
    """Return the unbiased integrands at the samples that the loss was given."""
    return [
        Candidate(Hypothesis(), core)
        for integrand in UNBIASED
        for core in _on_samples(subject, observation, {"integrand": integrand})
    ]


def wrong_cores(subject: Subject, observation: Observation, *, on_samples: bool, at_most: int = 2) -> list[Candidate]:
    """Return the predictions of every catalogued mistake of the core, and of `at_most` of them together."""
    leaves = tuple((name, leaf.numpy().tobytes()) for name, leaf in subject.leaves.items())
    sampled = observation.stochastic and not on_samples
    found = list(_predictions(subject.signature.name, subject.layout, leaves, sampled, at_most))
    if on_samples:
        for h in core_hypotheses(SAMPLED, subject.signature.name, at_most):
            if "direction" not in h.parts:
                found += [Candidate(h, core) for core in _on_samples(subject, observation, h.parts)]
    return found


@lru_cache(_KEPT)
def _predictions(
    signature: str, layout: Layout, leaves: tuple[tuple[str, bytes], ...], sampled: bool, at_most: int
) -> tuple[Candidate, ...]:
    """Return the predictions that depend on the probes alone; kept, because every audit of a signature asks for them.

    `leaves` are the bytes of float64 values by name; with `sampled` the means of estimates are predicted too.
    """
    values = {name: torch.frombuffer(bytearray(data), dtype=torch.float64).clone() for name, data in leaves}
    subject = without_loss(signature, layout, values)
    if subject.signature.categorical:
        return tuple(mistaken(subject, CATEGORICAL, at_most))
    found = [] if signature == "log_probs" else mistaken(subject, ANALYTIC, at_most)
    if sampled:
        formulas = {candidate.hypothesis.ids for candidate in found}
        expectations = Expectations(subject, _DRAWS[at_most])
        for h in core_hypotheses(SAMPLED, signature, at_most):
            if h.ids not in formulas:
                found += [Candidate(h, core) for core in expectations.cores(h.parts)]
    return tuple(found)


def mistaken(subject: Subject, form: str, at_most: int) -> list[Candidate]:
    """Return the predictions of all mistakes of the core in a form that is not sampled.

    Those of tokens are predicted under every convention, and not two together.
    """
    if subject.signature.masked:
        found = core_hypotheses(form, subject.signature.name, 1)
        shares: list[tuple[Hypothesis, Shares]] = [
            (h, each) for h in found for each in ((h.parts["tokens"],) if "tokens" in h.parts else TOKEN_CONVENTIONS)
        ]
        return [_as(h, each, subject) for h, each in shares]
    return [Candidate(h, core_of(subject, h.parts)) for h in core_hypotheses(form, subject.signature.name, at_most)]


def _on_samples(subject: Subject, observation: Observation, parts: Parts) -> list[Core]:
    signature = subject.signature
    columns = [torch.cat([a[i].reshape(-1) for a in observation.arguments]) for i in range(len(signature.roles))]
    by_role = subject.binding.by_role(columns)
    if signature.name == "log_probs":
        return at_log_probs(by_role["log_q"], by_role["log_p"], parts)
    return at_points(by_role["z"], misread(subject, parts), subject.layout, parts)  # type: ignore[arg-type]


def is_factor(mistake: Mistake) -> bool:
    """Return whether a mistake is a factor alone, which the fit finds by itself."""
    return any(parts.keys() <= FACTORS for parts in (mistake.analytic, mistake.categorical, mistake.sampled) if parts)


_CORE_MISTAKES = [mistake for mistake in CATALOGUE if mistake.gradient is None and not is_factor(mistake)]


def core_hypotheses(form: str, signature: str, at_most: int) -> list[Hypothesis]:
    """Return the right computation, and all mistakes that change more than a factor, up to `at_most` together."""
    return hypotheses(_CORE_MISTAKES, form, signature, at_most)
