"""Fits: the values of a loss compared with the prediction of every hypothesis, times a factor.

A prediction is a core (the value for each example) times batch^a · latent^b · c. The exponents and the constant are
estimated from the values; those of a convention, such as the sum over the batch, are no mistakes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_klloss.auditing.experiment.observation import Arrangement, Observation, Subject
from torch_klloss.auditing.experiment.probes import Layout
from torch_klloss.auditing.experiment.tokens import TOKEN_CONVENTIONS
from torch_klloss.auditing.explanation.candidates import Candidate, is_factor, wrong_cores
from torch_klloss.auditing.explanation.expectations import Core
from torch_klloss.auditing.explanation.mistake import Mistake
from torch_klloss.auditing.explanation.mistakes import CATALOGUE

TOLERANCE = 5e-4
"""The relative tolerance of a deterministic loss: above rounding and the effect of an eps of 1e-6 in a logarithm."""

_FEW = 5.0  # standard errors that a value may be off its prediction, and standard deviations that χ² may be too large
_NEAR_BEST = 12.0  # in χ²: an equally simple hypothesis that is no worse cannot be told from the best
_WELL_KNOWN = 0.1  # the largest standard error of a prediction, relative to it
_FAR_FROM_ZERO = 0.05  # the largest error, relative to the KL, at which 0 and "small" can be told apart
_MOST = {False: 4.0, True: 2.5}  # the largest cost of an explanation: of exact values, of means
_UNNAMED = 0.5  # how much more a constant without a name costs than a mistake


@dataclass(frozen=True)
class Fit:
    """An explanation of the values.

    Attributes:
        candidate: the hypothesis about the core.
        mistakes: all of them, those of the factor included; empty where the value is the KL's.
        batch: the exponent a of the batch size, relative to the mean over the batch.
        latent: the exponent b of the latent size.
        scale: the constant c.
        repeated: whether every example has the value of its batch.
        chi2: the squared deviations in standard errors (or tolerances), summed.
        cost: the number of mistakes, where a constant without a name counts for 1.5.
    """

    candidate: Candidate
    mistakes: tuple[Mistake, ...]
    batch: int
    latent: int
    scale: float
    repeated: bool
    chi2: float
    cost: float

    @property
    def ids(self) -> frozenset[str]:
        """The names of the mistakes."""
        return frozenset(mistake.id for mistake in self.mistakes)

    def predict(self, layout: Layout, arrangement: Arrangement) -> Tensor:
        """Return the prediction of every observed value, differentiable where the core is."""
        prediction = arranged(self.candidate.core, layout, arrangement, self.repeated)
        if prediction is None:
            raise RuntimeError(f"a fit to values by {arrangement} came from a core without any")
        return prediction * _powers(layout, arrangement, self.batch, self.latent) * self.scale


_FACTOR_MISTAKES = {
    next(iter((mistake.analytic or {}).items())): mistake for mistake in CATALOGUE if is_factor(mistake)
}
_SCALES = [(value, mistake) for (part, value), mistake in _FACTOR_MISTAKES.items() if part == "scale"]
_NAMED_SCALES: list[tuple[float, tuple[Mistake, ...]]] = [
    (1.0, ()),
    *((value, (mistake,)) for value, mistake in _SCALES),
    *(
        (a * b, (one, other))
        for (a, one), (b, other) in itertools.combinations(_SCALES, 2)
        if a * b != 0 and not math.isclose(a * b, 1.0)
    ),
]


def constant_factor(scale: float) -> Mistake:
    """Return the mistake of a measured constant that no other mistake explains."""
    inverse = 1 / scale if scale else math.inf
    number = f"{scale:.4g}" if abs(scale) >= 1 or abs(inverse - round(inverse)) > 0.01 else f"1/{round(inverse)}"
    return Mistake(
        id="constant-factor",
        what=f"it is {number} times the KL on all probes",
        fix=f"Look for a factor of {number}, such as a number of pixels, of samples or of data, or a weight.",
        signature="mean_logvar",
        wrong="",
    )


def explain(subject: Subject, observation: Observation, *, on_samples: bool = False) -> list[Fit]:
    """Return the simplest sets of mistakes that explain the values; empty where no two mistakes do.

    Args:
        subject: the loss and its probes.
        observation: what the loss returned.
        on_samples: whether the loss was given samples, at which the predictions are made.
    """
    fits: list[Fit] = []
    for at_most in (1, 2):
        candidates = wrong_cores(subject, observation, on_samples=on_samples, at_most=at_most)
        fits = best_fits(candidates, subject.layout, observation)
        if fits and fits[0].cost <= 1:
            break
    return fits


# --- the fit ----------------------------------------------------------------------------------------------------------

_LEGITIMATE: dict[Arrangement, dict[int, str]] = {
    "total": {0: "the mean over the batch", 1: "the sum over the batch"},
    "example": {0: "a value for each example"},
    "element": {0: "a value for each element, which are still to be summed over the latent dimensions"},
    "latent": {0: "a value for each latent dimension, the mean over the batch", 1: "a value for each latent dimension"},
}


def convention(fit: Fit, arrangement: Arrangement, example_dims: int = 1) -> str:
    """Return how the loss reduces, in words."""
    if fit.candidate.core.totals is not None:
        shares: Any = fit.candidate.hypothesis.parts.get("tokens")
        return TOKEN_CONVENTIONS.get(shares, "") if arrangement == "total" else "a value for each token"
    legitimate = _LEGITIMATE[arrangement]
    words = legitimate.get(min(max(fit.batch, 0), max(legitimate)), legitimate[0])
    if example_dims == 1:
        return words
    words = words.replace("a value for each example", "a value for each step")
    return f"{words.replace('the batch', 'the batch and the steps')}, nats a step"


def arranged(core: Core, layout: Layout, arrangement: Arrangement, repeated: bool = False) -> Tensor | None:
    """Return a core's values in an arrangement, means where it reduces over the batch; None where it has none."""
    if repeated:
        return layout.means(core.examples)[layout.probe_of_example]
    if arrangement == "total":
        return layout.means(core.examples) if core.totals is None else core.totals
    if arrangement == "example":
        return core.examples
    if core.elements is None:
        return None
    if arrangement == "element":
        return core.elements
    return torch.cat([part.mean(0).reshape(-1) for part in layout.split(core.elements)])


def _powers(layout: Layout, arrangement: Arrangement, batch: int, latent: int) -> Tensor:
    probe = _probe_of(layout, arrangement)
    return layout.batch[probe] ** batch * layout.latent[probe] ** latent


def _probe_of(layout: Layout, arrangement: Arrangement) -> Tensor:
    if arrangement == "total":
        return torch.arange(len(layout.shapes))
    if arrangement == "example":
        return layout.probe_of_example
    if arrangement == "element":
        return layout.probe_of_example[layout.example_of_element]
    return torch.arange(len(layout.shapes)).repeat_interleave(layout.latent.long())


def best_fits(
    candidates: Sequence[Candidate],
    layout: Layout,
    observation: Observation,
    *,
    only_right: bool = False,
    accept: float | None = None,
) -> list[Fit]:
    """Return the simplest explanations of the values; several where they cannot be told apart, empty where none fits.

    Args:
        candidates: the cores, a right one first.
        layout: of the probes.
        observation: what the loss returned.
        only_right: whether the factors of conventions alone are tried.
        accept: the number of standard errors that a value of a stochastic loss may be off; by default the χ² of all
            its values is tested too.
    """
    found: list[Fit] = []
    for repeated in (False, True) if observation.arrangement == "example" and not only_right else (False,):
        kept = [
            (candidate, prediction)
            for candidate in candidates
            if (prediction := arranged(candidate.core, layout, observation.arrangement, repeated)) is not None
        ]
        if kept:
            found += _fits(kept, layout, observation, repeated, only_right, accept)
    return _simplest(found, observation.stochastic)


def _error(candidate: Candidate, layout: Layout, arrangement: Arrangement) -> Tensor:
    """Return the standard error of a candidate's own prediction, of the same shape."""
    error = candidate.core.std_error
    count = len(_probe_of(layout, arrangement))
    if error is None:
        return torch.zeros(count, dtype=torch.float64)
    if arrangement == "total":  # the same net serves all examples: the errors add up
        return layout.means(error)
    return error if arrangement == "example" else error.mean().expand(count)


def _fits(
    kept: list[tuple[Candidate, Tensor]],
    layout: Layout,
    observation: Observation,
    repeated: bool,
    only_right: bool,
    accept: float | None,
) -> list[Fit]:
    legitimate = _LEGITIMATE[observation.arrangement]
    batches = (
        (0, 1, 2) if repeated else tuple(legitimate) if only_right else (-1, 0, 1, *((2,) if 1 in legitimate else ()))
    )
    latents = (0,) if only_right else (-1, 0, 1)
    if kept[0][0].core.totals is not None:  # the reductions of tokens are hypotheses of their own
        batches, latents = (0,), (0,)
    found = []
    finite = observation.value.isfinite()
    if not bool(finite.any()):
        return []
    predictions = torch.stack([prediction.detach() for _, prediction in kept])
    errors = torch.stack([_error(candidate, layout, observation.arrangement) for candidate, _ in kept])
    kl = predictions[0, finite].abs().median()
    for batch, latent in itertools.product(batches, latents):
        powers = _powers(layout, observation.arrangement, batch, latent)
        P = predictions * powers
        of_powers = [_FACTOR_MISTAKES["latent", latent]] if latent else []
        if repeated:
            of_powers.append(_FACTOR_MISTAKES["repeated", True])
        if batch not in ((0, 1) if repeated else legitimate):
            of_powers.append(_FACTOR_MISTAKES["batch", -1 if batch < 0 else 1])
        for index, scale, named, chi2 in _scales(P, errors * powers, observation, finite, kl, only_right, accept):
            of_scale = named if named is not None else (constant_factor(scale),)
            candidate = kept[index][0]
            mistakes = (*candidate.hypothesis.mistakes, *of_scale, *of_powers)
            cost = len(mistakes) + (0.0 if named is not None else _UNNAMED)
            if mistakes or only_right:
                found.append(Fit(candidate, mistakes, batch, latent, scale, repeated, chi2, cost))
    return found


def _scales(
    P: Tensor,
    errors: Tensor,
    observation: Observation,
    finite: Tensor,
    kl: Tensor,
    only_right: bool,
    accept: float | None,
) -> list[tuple[int, float, tuple[Mistake, ...] | None, float]]:
    """Return the candidates that fit with some constant: index, constant, its mistakes (None without a name), χ²."""
    y = observation.value[finite]
    P, errors = P[:, finite], errors[:, finite]
    usable = P.isfinite().all(1)
    P = torch.where(usable[:, None], P, 0.0)
    if observation.stochastic:
        # A prediction with a large error of its own (its variance may be infinite) would fit everything.
        usable &= (errors <= _WELL_KNOWN * torch.maximum(P.abs(), P.abs().mean(1, keepdim=True))).all(1)

    def sigma(scale: Tensor | float) -> Tensor:
        if not observation.stochastic:
            return (TOLERANCE * (y.abs() + 1e-2 * kl)).expand_as(P)
        std_error = observation.std_error[finite]
        return torch.sqrt(std_error**2 + (scale * errors) ** 2 + (TOLERANCE * y) ** 2 / 9 + 1e-20)

    def fits(deviations: Tensor) -> list[int]:
        limit = (accept or _FEW) if observation.stochastic else 1.0
        good = usable & (deviations.abs().amax(1) <= limit)
        if observation.stochastic and accept is None:
            good &= deviations.square().sum(1) <= len(y) + _FEW * math.sqrt(2 * len(y))
        return torch.nonzero(good).flatten().tolist()

    found: list[tuple[int, float, tuple[Mistake, ...] | None, float]] = []
    for constant, named in _NAMED_SCALES[: 1 if only_right else None]:
        if observation.stochastic and len(named) > 1 and constant > 0:
            continue  # a mean cannot tell two factors from a third, and they are no more likely
        deviations = (y - constant * P) / sigma(constant)
        if constant == 0 and bool((sigma(0.0) > _FAR_FROM_ZERO * kl).any()):
            continue
        for index in fits(deviations):
            if constant != 0 or index == 0:  # times zero, all candidates are the same
                found.append((index, constant, named, float(deviations[index].square().sum())))
    if only_right:
        return found
    weights = 1 / sigma(0.0) ** 2
    free = (P * y * weights).sum(1) / (P.square() * weights).sum(1)
    deviations = (y - free[:, None] * P) / sigma(free[:, None])
    already = {index for index, constant, *_ in found if constant != 1}
    for index in fits(torch.where((free.isfinite() & (free.abs() > 1e-9))[:, None], deviations, torch.inf)):
        if index not in already:
            found.append((index, float(free[index]), None, float(deviations[index].square().sum())))
    return found


def _simplest(found: list[Fit], stochastic: bool) -> list[Fit]:
    found = [fit for fit in found if fit.cost <= _MOST[stochastic]]
    if not found:
        return []
    cheapest = min(fit.cost for fit in found)
    near = sorted((fit for fit in found if fit.cost <= cheapest), key=lambda fit: fit.chi2)
    best = [fit for fit in near if not stochastic or fit.chi2 <= near[0].chi2 + _NEAR_BEST]
    unique: dict[frozenset[str], Fit] = {}
    for fit in best:
        unique.setdefault(fit.ids, fit)
    return list(unique.values())
