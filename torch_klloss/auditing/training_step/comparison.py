"""The comparison of a number with the KL of a pair, by conventions or by mistakes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Categorical

from torch_klloss.auditing.experiment.calling import first_line
from torch_klloss.auditing.experiment.observation import SHAPE_IN, Arrangement, Observation, are_alike
from torch_klloss.auditing.experiment.probes import Layout
from torch_klloss.auditing.explanation.fit import TOLERANCE, Fit, best_fits, convention
from torch_klloss.auditing.training_step.padding import MEAN_OF_MEANS, is_near, masked_totals
from torch_klloss.auditing.training_step.pairs import Pair
from torch_klloss.auditing.training_step.references import Evidence, Reference, References
from torch_klloss.auditing.training_step.report import ModuleVerdict

_TOO_NEAR = 0.05  # the largest rounding error, relative to the KL
_SLIGHT = 0.02  # the largest relative change by a mistake that may have other causes
_FEWEST = 3  # the fewest values from which a factor without a name is found
_FEWEST_OF = {1: 1, 2: 4}  # the fewest values from which one mistake, or two together, are found
_MOST_WRONG = 2.0  # the largest cost of an explanation: two mistakes
_NEAR = "q is too near to p for the rounding of its dtype; audit again after some training steps, or in float32"
_CORRECTED_LATER = frozenset({"half-missing", "sign"})  # as in -0.5 * terms.sum(1), with terms = 1 + logvar - …


@dataclass(frozen=True)
class Comparison:
    """The result of comparing a number with a pair.

    Attributes:
        verdict: "right", "wrong" or "cannot tell".
        explanation: in words.
        pair: the q and p that the number was compared with.
        where: the place where the pair was found; empty if it is the number's.
        got: the number, in nats for each example where its reduction is known.
        expected: the KL of the pair, in nats for each example.
        mistakes: one entry for each explanation that fits.
        is_formula: whether it is the KL itself, and no estimate from samples.
    """

    verdict: ModuleVerdict
    explanation: str
    pair: Pair | None = None
    where: str = ""
    got: float = math.nan
    expected: float = math.nan
    mistakes: tuple[str, ...] = ()
    is_formula: bool = False


def compare(evidence: Evidence, references: References, *, explained: bool) -> Comparison | None:
    """Compare a number with a pair: find its convention or, where `explained`, its mistakes."""
    nearest: Comparison | None = None
    if evidence.masks and (beside := _beside_padding(evidence, references)) is not None:
        return beside
    for example_dims in (1, 2):
        try:
            reference = references.of(evidence, example_dims)
        except Exception as error:
            return Comparison("cannot tell", first_line(error))
        if example_dims > 1 and not _has_steps(evidence):
            break
        arrangement = _arrangement(evidence.values, reference.layout, example_dims)
        if arrangement is None:
            nearest = nearest or _of_no_shape(evidence, reference)
            continue
        observation = _observation(evidence.values, arrangement, reference.rounding)
        if reference.rounding > _TOO_NEAR:
            got, kl = _numbers(evidence, reference, arrangement)
            return Comparison("cannot tell", _NEAR, got=got, expected=kl)
        fits = best_fits(reference.right, reference.layout, observation, only_right=True)
        if fits:
            steps = ", nats a step" if example_dims > 1 else ""
            got, kl = _numbers(evidence, reference, arrangement, fits[0].batch)
            is_formula = fits[0].candidate is reference.right[0]
            at = "" if is_formula else ", as an estimate from the samples of this step"
            words = f"it is the KL{at}, {convention(fits[0], arrangement)}{steps}"
            return Comparison("right", words, got=got, expected=kl, is_formula=is_formula)
        if explained and example_dims == 1:
            nearest = _explained(evidence, references, arrangement, observation)
    return nearest


def _beside_padding(evidence: Evidence, references: References) -> Comparison | None:
    """Compare a number with the KL of the steps that are no padding; None where it is neither right nor counts them."""
    try:
        reference = references.of(evidence)
    except Exception:
        return None
    sizes = [mask.numel() for mask in evidence.masks]
    for candidate in reference.right:
        if candidate.core.elements is None:
            continue
        parts = reference.layout.split(candidate.core.elements)
        kept = [masked_totals(*both) for both in zip(parts, evidence.masks, strict=True)]
        everything = [
            masked_totals(part, torch.ones_like(mask)) for part, mask in zip(parts, evidence.masks, strict=True)
        ]
        means = [k["the sum over the batch"] / size for k, size in zip(kept, sizes, strict=True)]
        got, kl = float(evidence.values[0].double().sum()), float(kept[0]["the mean over the batch"])
        for words in kept[0]:
            if all(is_near(value, k[words]) for value, k in zip(evidence.values, kept, strict=True)):
                is_formula = candidate is reference.right[0] and words != MEAN_OF_MEANS
                words = f"it is the KL without the padding, {words}"
                return Comparison("right", words, got=got, expected=kl, is_formula=is_formula)
        if all(map(is_near, evidence.values, means)):
            words = "it divides by the number of all steps, the padding included: divide by mask.sum()"
            return Comparison("wrong", words, got=got, expected=kl, mistakes=("padding-in-the-mean",))
        for words in list(everything[0])[:5]:  # all that are reduced over the steps
            if all(is_near(value, e[words]) for value, e in zip(evidence.values, everything, strict=True)):
                what = "it counts the padding: multiply the KL of each step by the mask before the sum"
                return Comparison("wrong", what, got=got, expected=kl, mistakes=("padding-counted",))
    return None


def _has_steps(evidence: Evidence) -> bool:
    """Return whether a pair may be one of sequences, `[batch, time, latent]`."""
    pair = evidence.pairs[0]
    num_dims = len(pair.q.batch_shape + pair.q.event_shape)
    return not pair.of and (num_dims == 3 or (num_dims == 2 and isinstance(pair.q, Categorical)))


def _arrangement(values: Sequence[Tensor], layout: Layout, example_dims: int) -> Arrangement | None:
    """Return whether a value is one of the batch, of an example, of an element or of a latent dimension."""
    for arrangement, shape_in in SHAPE_IN.items():
        if arrangement == "total" and example_dims > 1 and values[0].numel() > 1:
            continue
        if all(
            are_alike(value.shape, shape_in(shape, 1))
            or (example_dims > 1 and value.numel() == math.prod(shape_in(shape, 1)))
            for value, shape in zip(values, layout.shapes, strict=True)
        ):
            return arrangement
    return None


def _observation(values: Sequence[Tensor], arrangement: Arrangement, rounding: float) -> Observation:
    flat = [value.double().cpu().reshape(-1) for value in values]
    value = torch.cat(flat)
    noisy = rounding > TOLERANCE / 4
    return Observation(
        arrangement=arrangement,
        value=value,
        std_error=value.abs() * (rounding / 6 if noisy else 0.0),
        sum_error=torch.zeros(len(flat)),
        probe_of_value=torch.arange(len(flat)).repeat_interleave(torch.tensor([len(part) for part in flat])),
        num_calls=2 if noisy else 1,  # rounding is treated as the error of a mean
    )


def _numbers(
    evidence: Evidence, reference: Reference, arrangement: Arrangement, batch: int = 0, run: int = 0
) -> tuple[float, float]:
    """Return the number of a run, by default on the whole batch, in nats for each example, and the KL."""
    value, size = evidence.values[run].double(), float(reference.layout.batch[run])
    divided = arrangement in ("example", "element") or batch > 0
    return float(value.sum()) / (size if divided else 1.0), float(reference.kl[run])


def _is_slight(evidence: Evidence, reference: Reference, arrangement: Arrangement, batch: int) -> bool:
    """Return whether a number is near the KL in all runs."""
    numbers = [_numbers(evidence, reference, arrangement, batch, run) for run in range(len(evidence.values))]
    return all(abs(got - kl) < _SLIGHT * abs(kl) for got, kl in numbers)


def _of_no_shape(evidence: Evidence, reference: Reference) -> Comparison:
    value, size = evidence.values[0], int(reference.layout.batch[0])
    shape, kl = tuple(value.shape), float(reference.kl[0])
    if are_alike(shape, (size, size)) and size > 1:
        words = f"its shape is {shape}: [batch] against [batch, 1] broadcasts to [batch, batch]"
        return Comparison("wrong", words, got=float(value.mean()), expected=kl, mistakes=("wrong-shape",))
    return Comparison("cannot tell", f"no reduction of this KL has its shape {shape}", expected=kl)


def _explained(
    evidence: Evidence, references: References, arrangement: Arrangement, observation: Observation
) -> Comparison:
    reference = references.of(evidence)
    got, kl = _numbers(evidence, reference, arrangement)
    if not bool(observation.value.isfinite().all()) and bool(reference.kl.isfinite().all()):
        return Comparison("wrong", "it is not finite, and the KL is", got=got, expected=kl, mistakes=("not-a-number",))
    fits: list[Fit] = []
    for at_most in (1, 2):
        if fits or len(observation.value) < _FEWEST_OF[at_most]:
            break
        reference = references.of(evidence, at_most=at_most)
        candidates = [reference.right[0], *(c for c in reference.wrong if c.hypothesis.mistakes), *reference.right[1:]]
        most = 1.0 if len(observation.value) < _FEWEST else _MOST_WRONG
        fits = [f for f in best_fits(candidates, reference.layout, observation) if f.mistakes and f.cost <= most]
    if not fits:
        words = "it is not the KL of this pair, and no catalogued mistake explains it; it may belong to another pair"
        return Comparison("cannot tell", words, got=got, expected=kl)
    got, kl = _numbers(evidence, reference, arrangement, fits[0].batch)
    if _is_slight(evidence, reference, arrangement, fits[0].batch):
        words = "it is slightly off the KL of this pair, too close to tell which mistake, if any, is the cause"
        return Comparison("cannot tell", words, got=got, expected=kl)
    if arrangement == "element" and fits[0].ids <= _CORRECTED_LATER:
        words = f"it is {got / kl:.3g} times the KL's terms, not summed yet; later code may correct the factor"
        return Comparison("cannot tell", words, got=got, expected=kl)
    explanations = list(
        dict.fromkeys(" and ".join(m.what.replace(" on all probes", "") for m in fit.mistakes) for fit in fits)
    )
    sizes = "x".join(map(str, evidence.pairs[0].q.batch_shape + evidence.pairs[0].q.event_shape))
    ambiguous = "" if len(explanations) < 2 else ", which does not tell these apart"
    words = f"{'; or '.join(explanations)} (q is {sizes}{ambiguous})"
    ids = tuple(dict.fromkeys(" + ".join(m.id for m in fit.mistakes) for fit in fits))
    return Comparison("wrong", words, got=got, expected=kl, mistakes=ids)
