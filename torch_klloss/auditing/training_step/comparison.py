"""A number held against a pair: which convention it is of the KL, or which mistakes make it what it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Categorical

from torch_klloss.auditing.experiment.observation import Arrangement, Observation
from torch_klloss.auditing.experiment.probes import Layout
from torch_klloss.auditing.explanation.fit import TOLERANCE, Fit, best_fits, convention
from torch_klloss.auditing.training_step.pairs import Pair
from torch_klloss.auditing.training_step.report import ModuleVerdict
from torch_klloss.auditing.training_step.truth import Evidence, Truth, Truths

_TOO_NEAR = 0.05  # how large against the KL rounding may be
_SLIGHT = 0.02  # relative; a mistake that changes so little is not told from other causes
_FEWEST = 3  # values that a factor without a name must explain
_FEWEST_OF = {1: 1, 2: 4}  # values that so many mistakes must explain together
_MOST_WRONG = 2.0  # the largest cost of an explanation: two mistakes
_NEAR = "q is too near to p for the rounding of its dtype; ask again after some steps of training, or in float32"
_MADE_UP_FOR = frozenset({"half-missing", "sign"})  # as in -0.5 * terms.sum(1), with terms = 1 + logvar - …


@dataclass(frozen=True)
class Held:
    """Hold what came of a comparison.

    Attributes:
        verdict: "right", "wrong" or "cannot tell".
        explanation: in words.
        pair: that the number was held against.
        where: the pair was found, unless with the number.
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


def compare(evidence: Evidence, truths: Truths, *, explained: bool) -> Held | None:
    """Hold a number against a pair: a convention or, where `explained`, the mistakes that make it what it is."""
    nearest: Held | None = None
    for example_dims in (1, 2):
        try:
            truth = truths.of(evidence, example_dims)
        except Exception as error:
            return Held("cannot tell", str(error).splitlines()[0] if str(error) else type(error).__name__)
        if example_dims > 1 and not _has_steps(evidence):
            break
        arrangement = _arrangement(evidence.values, truth.layout, example_dims)
        if arrangement is None:
            nearest = nearest or _of_no_shape(evidence, truth)
            continue
        observation = _observation(evidence.values, arrangement, truth.rounding)
        if truth.rounding > _TOO_NEAR:
            got, kl = _numbers(evidence, truth, arrangement)
            return Held("cannot tell", _NEAR, got=got, expected=kl)
        fits = best_fits(truth.right, truth.layout, observation, only_right=True)
        if fits:
            steps = ", nats a step" if example_dims > 1 else ""
            got, kl = _numbers(evidence, truth, arrangement, fits[0].batch)
            is_formula = fits[0].candidate is truth.right[0]
            at = "" if is_formula else ", as an estimate from the samples of this step"
            said = f"it is the KL{at}, {convention(fits[0], arrangement)}{steps}"
            return Held("right", said, got=got, expected=kl, is_formula=is_formula)
        if explained and example_dims == 1:
            nearest = _explained(evidence, truths, arrangement, observation)
    return nearest


def _has_steps(evidence: Evidence) -> bool:
    """Return whether a pair may be one of sequences, `[batch, time, latent]`."""
    pair = evidence.pairs[0]
    num_dims = len(pair.q.batch_shape + pair.q.event_shape)
    return not pair.of and (num_dims == 3 or (num_dims == 2 and isinstance(pair.q, Categorical)))


def _arrangement(values: Sequence[Tensor], layout: Layout, example_dims: int) -> Arrangement | None:
    """Return what there is a value for: the whole batch, an example, an element, a latent dimension."""
    arrangements: list[tuple[Arrangement, Callable[[tuple[int, ...]], tuple[int, ...]]]] = [
        ("total", lambda shape: ()),
        ("example", lambda shape: shape[:1]),
        ("element", lambda shape: shape),
        ("latent", lambda shape: shape[1:]),
    ]
    for arrangement, of in arrangements[1 if example_dims > 1 and values[0].numel() > 1 else 0 :]:
        if all(
            math.prod(value.shape) == math.prod(of(shape)) and (example_dims > 1 or _alike(value.shape, of(shape)))
            for value, shape in zip(values, layout.shapes, strict=True)
        ):
            return arrangement
    return None


def _alike(one: Sequence[int], other: Sequence[int]) -> bool:
    return [size for size in one if size != 1] == [size for size in other if size != 1]


def _observation(values: Sequence[Tensor], arrangement: Arrangement, rounding: float) -> Observation:
    flat = [value.double().cpu().reshape(-1) for value in values]
    value = torch.cat(flat)
    noisy = rounding > TOLERANCE / 4
    return Observation(
        arrangement=arrangement,
        value=value,
        std_error=value.abs() * (rounding / 6 if noisy else 0.0),
        sum_error=torch.zeros(len(flat)),
        gradients={},
        gradient_errors={},
        directions=None,
        probe_of_value=torch.arange(len(flat)).repeat_interleave(torch.tensor([len(part) for part in flat])),
        arguments=(),
        num_calls=2 if noisy else 1,  # rounding is taken for the error of a mean
        changed=(),
        drew=False,
    )


def _numbers(
    evidence: Evidence, truth: Truth, arrangement: Arrangement, batch: int = 0, run: int = 0
) -> tuple[float, float]:
    """Return the number of a run, of the whole batch by default, as nats an example, and the KL."""
    value, size = evidence.values[run].double(), float(truth.layout.batch[run])
    divided = arrangement in ("example", "element") or batch > 0
    return float(value.sum()) / (size if divided else 1.0), float(truth.kl[run])


def _is_slight(evidence: Evidence, truth: Truth, arrangement: Arrangement, batch: int) -> bool:
    """Return whether a number is near the KL in all runs."""
    numbers = [_numbers(evidence, truth, arrangement, batch, run) for run in range(len(evidence.values))]
    return all(abs(got - kl) < _SLIGHT * abs(kl) for got, kl in numbers)


def _of_no_shape(evidence: Evidence, truth: Truth) -> Held:
    value, size = evidence.values[0], int(truth.layout.batch[0])
    shape, kl = tuple(value.shape), float(truth.kl[0])
    if _alike(shape, (size, size)) and size > 1:
        said = f"its shape is {shape}: [batch] against [batch, 1] broadcasts to [batch, batch]"
        return Held("wrong", said, got=float(value.mean()), expected=kl, mistakes=("wrong-shape",))
    return Held("cannot tell", f"its shape {shape} is that of no reduction of this KL", expected=kl)


def _explained(evidence: Evidence, truths: Truths, arrangement: Arrangement, observation: Observation) -> Held:
    truth = truths.of(evidence)
    got, kl = _numbers(evidence, truth, arrangement)
    if not bool(observation.value.isfinite().all()) and bool(truth.kl.isfinite().all()):
        return Held("wrong", "it is not finite, and the KL is", got=got, expected=kl, mistakes=("not-a-number",))
    fits: list[Fit] = []
    for at_most in (1, 2):
        if fits or len(observation.value) < _FEWEST_OF[at_most]:
            break
        truth = truths.of(evidence, at_most=at_most)
        candidates = [truth.right[0], *(c for c in truth.wrong if c.hypothesis.mistakes), *truth.right[1:]]
        most = 1.0 if len(observation.value) < _FEWEST else _MOST_WRONG
        fits = [f for f in best_fits(candidates, truth.layout, observation) if f.mistakes and f.cost <= most]
    if not fits:
        said = "it is not the KL of this pair, and no mistake that is known explains it: perhaps it is that of another"
        return Held("cannot tell", said, got=got, expected=kl)
    got, kl = _numbers(evidence, truth, arrangement, fits[0].batch)
    if _is_slight(evidence, truth, arrangement, fits[0].batch):
        said = "it is slightly off the KL of this pair, which more than a mistake with a small part of it may explain"
        return Held("cannot tell", said, got=got, expected=kl)
    if arrangement == "element" and fits[0].ids <= _MADE_UP_FOR:
        said = f"it is {got / kl:.3g} times the KL's terms, not summed yet, which may be made up for where they are"
        return Held("cannot tell", said, got=got, expected=kl)
    told = list(dict.fromkeys(" and ".join(m.what.replace(" on all probes", "") for m in fit.mistakes) for fit in fits))
    sizes = "x".join(map(str, evidence.pairs[0].q.batch_shape + evidence.pairs[0].q.event_shape))
    said = "; or ".join(told) + f" (q is {sizes}{'' if len(told) < 2 else ', which does not tell these apart'})"
    ids = tuple(dict.fromkeys(" + ".join(m.id for m in fit.mistakes) for fit in fits))
    return Held("wrong", said, got=got, expected=kl, mistakes=ids)
