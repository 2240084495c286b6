"""What a loss might be computing: the KL, and what every mistake of the catalogue makes of it, for all probes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_klloss.auditing.experiment.observation import Asked, Observation
from torch_klloss.auditing.experiment.probes import Categoricals
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


@dataclass(frozen=True)
class Candidate:
    """Hold a hypothesis and what it predicts for every example."""

    hypothesis: Hypothesis
    core: Core


def right_core(asked: Asked) -> Candidate:
    """Return what a right loss computes: the KL of every example."""
    return Candidate(Hypothesis(), core_of(asked, {}))


def core_of(asked: Asked, parts: Parts) -> Core:
    """Return what a formula in the parameters, or a sum over classes, gives with some of its parts replaced."""
    changed = "spread" in parts or "pair" in parts
    pair = misread(asked.call.signature, asked.leaves, asked.layout, parts) if changed else asked.pair
    if isinstance(pair, Categoricals):
        return categorical(pair, asked.layout, parts)
    return analytic(pair, asked.layout, parts)


def _k3(log_q: Tensor, log_p: Tensor) -> Tensor:
    log_r = log_p - log_q
    return torch.expm1(log_r) - log_r


Integrand = Callable[[Tensor, Tensor], Tensor]
UNBIASED: tuple[Integrand, ...] = (log_ratio, _k3)
"""The integrands whose expectation under q is the KL: k1 and k3."""


def unbiased_on_samples(asked: Asked, observation: Observation) -> list[Candidate]:
    """Return, on given samples, the integrands whose expectation is the KL."""
    return [
        Candidate(Hypothesis(), core)
        for integrand in UNBIASED
        for core in _on_samples(asked, observation, {"integrand": integrand})
    ]


def wrong_cores(asked: Asked, observation: Observation, *, on_samples: bool, at_most: int = 2) -> list[Candidate]:
    """Return what every catalogued mistake of the core, and `at_most` of them together, predict."""
    signature, layout, leaves = asked.call.signature, asked.layout, asked.leaves
    mistakes = [mistake for mistake in CATALOGUE if mistake.gradient is None and not is_factor(mistake)]

    def all_of(form: str) -> list[Hypothesis]:
        return hypotheses(mistakes, form, signature.name, at_most)

    if signature.categorical:
        return [Candidate(h, core_of(asked, h.parts)) for h in all_of(CATEGORICAL)]
    found = []
    if signature.name != "log_probs":
        found += [Candidate(h, core_of(asked, h.parts)) for h in all_of(ANALYTIC)]
    seen = {candidate.hypothesis.ids for candidate in found}
    if on_samples:
        for h in all_of(SAMPLED):
            if "direction" not in h.parts:
                found += [Candidate(h, core) for core in _on_samples(asked, observation, h.parts)]
    elif observation.stochastic:
        expectations = Expectations(signature, leaves, layout, _DRAWS[at_most])
        for h in all_of(SAMPLED):
            if h.ids not in seen:
                found += [Candidate(h, core) for core in expectations.cores(h.parts)]
    return found


def _on_samples(asked: Asked, observation: Observation, parts: Parts) -> list[Core]:
    signature, layout = asked.call.signature, asked.layout
    columns = [torch.cat([a[i].reshape(-1) for a in observation.arguments]) for i in range(len(signature.roles))]
    by_role = dict(zip((signature.roles[role] for role in asked.call.order), columns, strict=True))
    if signature.name == "log_probs":
        return at_log_probs(by_role["log_q"], by_role["log_p"], parts)
    pair = misread(signature, asked.leaves, layout, parts)
    return at_points(by_role["z"], pair, layout, parts)  # type: ignore[arg-type]


def is_factor(mistake: Mistake) -> bool:
    """Return whether a mistake is a factor alone, which the fit finds by itself."""
    return any(parts.keys() <= FACTORS for parts in (mistake.analytic, mistake.categorical, mistake.sampled) if parts)
