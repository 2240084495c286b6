"""Mistakes with a number of the loss's own, which is measured: floors, ceilings, clamped spreads, another prior."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from torch_klloss.auditing.experiment.calling import CallError
from torch_klloss.auditing.experiment.observation import Observation, Subject
from torch_klloss.auditing.experiment.probes import Layout, Normals
from torch_klloss.auditing.experiment.signatures import FROM_LOG_VARIANCE, SPREAD_WORDS
from torch_klloss.auditing.explanation.candidates import Candidate, core_of, right_core
from torch_klloss.auditing.explanation.expectations import Core
from torch_klloss.auditing.explanation.fit import Fit, best_fits
from torch_klloss.auditing.explanation.mistake import Hypothesis, Mistake, Parts

_BISECTIONS = 48
_LEVELS = {
    "total": "the KL, as it is reduced",
    "example": "the KL of each example",
    "latent": "the batch's mean for each latent dimension",
    "element": "each element",
}
_LIMITS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "floor": lambda values, bound: values.clamp(min=bound),
    "ceiling": lambda values, bound: values.clamp(max=bound),
    "allowance": lambda values, bound: (values - bound).clamp(min=0),
}
_BOUNDS = {
    "floor": ("free-nats", "it has a floor of {0} under {1} (free nats)"),
    "ceiling": ("ceiling", "it has a ceiling of {0} over {1}"),
    "allowance": ("free-nats", "it subtracts {0} from {1}, and is zero below (free nats)"),
}
_FARTHEST = 6.0  # the log-variance, up and down, at which a spread is clamped
_SAME = 1e-9
_FIX = "Leave it out: where it acts the loss is constant and q gets no gradient. If it is meant, log the KL beside it."


def measured_fits(subject: Subject, observation: Observation) -> list[Fit]:
    """Return the explanation with a measured number; empty where none fits."""
    for mistakes in (_bounds, _clamps, _priors):
        for mistake, parts in mistakes(subject, observation):
            candidate = Candidate(Hypothesis((mistake,), parts), core_of(subject, parts))
            if fits := best_fits([candidate], subject.layout, observation):
                return fits[:1]
    return []


def _mistake(id: str, what: str, fix: str, parts: Parts) -> Mistake:
    return Mistake(id, what, fix, "mean_logvar", "", analytic=parts, categorical=parts)


# --- floors and ceilings ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """A limit at one level of a reduction; `batch` and `latent` are the powers of the sizes that come before it."""

    kind: str
    level: str
    batch: int
    latent: int
    at: float

    def __call__(self, elements: Tensor, layout: Layout) -> Core:
        """Return the value of every example."""
        limit = self._limit
        if self.level == "element":
            return Core(layout.examples(limit(elements)), limit(elements))
        examples = layout.examples(elements)
        if self.level == "example":
            return Core(limit(examples))
        if self.level == "latent":
            means = layout.row_wise(lambda part: limit(part.mean(0, keepdim=True)).expand_as(part), elements)
            return Core(layout.examples(means), means)
        factor = self._factor(layout)
        return Core((limit(layout.means(examples) * factor) / factor)[layout.probe_of_example])

    def _limit(self, values: Tensor) -> Tensor:
        return _LIMITS[self.kind](values, self.at)

    def total(self, elements: Tensor, layout: Layout) -> float:
        """Return the sum of the values of all probes, reduced."""
        return float((layout.means(self(elements, layout).examples) * self._factor(layout)).sum())

    def _factor(self, layout: Layout) -> Tensor:
        return layout.batch**self.batch * layout.latent**self.latent


def _bounds(subject: Subject, observation: Observation) -> Iterator[tuple[Mistake, Parts]]:
    """Yield the bounds that give the sum of the observed values, at every level of the reduction."""
    levels = [("total", batch, latent) for batch in (0, 1) for latent in (0, -1)]
    levels += [(level, 0, 0) for level in ("example", "latent", "element")]
    for kind, (level, batch, latent) in itertools.product(_LIMITS, levels):
        bound = _solved(subject, observation, Bound(kind, level, batch, latent, 0.0))
        if bound is not None:
            id, what = _BOUNDS[kind]
            yield _mistake(id, what.format(f"{bound.at:.4g}", _LEVELS[level]), _FIX, parts := {"bound": bound}), parts


def _solved(subject: Subject, observation: Observation, bound: Bound) -> Bound | None:
    """Return the bound with which the values have the observed sum, by bisection; None if there is none."""
    elements, layout = right_core(subject).core.elements, subject.layout
    if elements is None:
        return None
    values = torch.zeros(len(layout.shapes), dtype=torch.float64)
    values = values.index_add(0, observation.probe_of_value, observation.value)
    target = float((values if observation.arrangement in ("total", "latent") else values / layout.batch).sum())
    low, high = 0.0, 2 * float(observation.value.abs().max()) + 1e-3
    excess_low, excess_high = (replace(bound, at=at).total(elements, layout) - target for at in (low, high))
    if excess_low * excess_high > 0:
        return None
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        excess = replace(bound, at=middle).total(elements, layout) - target
        low, high = (low, middle) if (excess > 0) == (excess_high > 0) else (middle, high)
    return replace(bound, at=middle)


# --- clamped spreads --------------------------------------------------------------------------------------------------


def _clamps(subject: Subject, observation: Observation) -> Iterator[tuple[Mistake, Parts]]:
    """Yield the clamp of q's spread, or of both, at the log-variances beyond which the values are constant."""
    if subject.signature.categorical or subject.signature.given_samples:
        return
    low, high = (_last_right(subject, observation, sign * _FARTHEST) for sign in (-1.0, 1.0))
    if low is None and high is None:
        return
    spread = subject.signature.spread or "std"
    word, bounds = SPREAD_WORDS[spread], []
    for side, at in (("min", low), ("max", high)):
        if at is not None:
            bounds.append(f"{side}={float(FROM_LOG_VARIANCE[spread](torch.tensor(at, dtype=torch.float64))):.4g}")
    what = f"it clamps the {word} at ordinary values: {', '.join(bounds)}"
    fix = (
        "Clamp farther out, such as log-variances at ±20, or not at all: beyond the clamp the spread gets no gradient."
    )
    for names in (("q_logvar",), ("q_logvar", "p_logvar")):
        parts = {"pair": partial(_clamped, names=names, low=low, high=high)}
        yield _mistake("clamped-spread", what, fix, parts), parts


def _clamped(n: Normals, *, names: tuple[str, ...], low: float | None, high: float | None) -> Normals:
    return replace(n, **{name: getattr(n, name).clamp(low, high) for name in names})


def _last_right(subject: Subject, observation: Observation, farthest: float) -> float | None:
    """Return the log-variance of q, towards `farthest`, up to which the loss changes; None if it always does."""
    shape = subject.layout.shapes[0]
    zero = torch.zeros(math.prod(shape), dtype=torch.float64)

    def value_at(logvar: float) -> float:
        leaves = subject.signature.leaves(Normals(zero, zero + logvar, zero, zero))
        at = replace(subject, layout=replace(subject.layout, shapes=(shape,)), leaves=leaves, gradient=False)
        return float(at.replies(0, 0)[0].value.sum())

    try:
        end = value_at(farthest)
        if not math.isclose(end, value_at(0.9 * farthest), rel_tol=_SAME):
            return None
        near, far = 0.0, farthest
        for _ in range(_BISECTIONS):
            middle = (near + far) / 2
            near, far = (near, middle) if math.isclose(value_at(middle), end, rel_tol=_SAME) else (middle, far)
    except CallError:
        return None
    return far


# --- another prior ----------------------------------------------------------------------------------------------------


def _priors(subject: Subject, observation: Observation) -> Iterator[tuple[Mistake, Parts]]:
    """Yield the Normal that the loss has for its prior in place of the standard one, by least squares."""
    if not subject.signature.standard:
        return
    n, layout = subject.pair, subject.layout
    if not isinstance(n, Normals):
        return
    terms = (n.q_logvar, n.q_var, n.q_mean.square(), n.q_mean, torch.ones_like(n.q_mean))
    design = torch.stack([layout.means(layout.examples(term)) for term in terms], dim=1)
    values = torch.zeros(len(layout.shapes), dtype=torch.float64)
    values = values.index_add(0, observation.probe_of_value, observation.value)
    if observation.arrangement not in ("total", "latent"):
        values = values / layout.batch
    _, half_precision, _, linear, _ = torch.linalg.lstsq(design, values[:, None]).solution.flatten().tolist()
    if half_precision <= 0:
        return
    mean, std = -linear / (2 * half_precision), (2 * half_precision) ** -0.5
    what = f"its prior is Normal({mean:.4g}, {std:.4g}) and not the standard Normal"
    what = what.replace("(-0,", "(0,")
    parts = {"pair": partial(_with_prior, mean=mean, logvar=2 * math.log(std))}
    yield (
        _mistake(
            "another-prior", what, "Say so, or take the standard Normal; for a prior of its own: fn(q, p).", parts
        ),
        parts,
    )


def _with_prior(n: Normals, *, mean: float, logvar: float) -> Normals:
    return replace(n, p_mean=torch.full_like(n.p_mean, mean), p_logvar=torch.full_like(n.p_logvar, logvar))
