"""The judgement of a loss: the choice of its probes, the number of calls, and the test of its values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from torch_klloss.auditing.experiment.calling import CallError
from torch_klloss.auditing.experiment.observation import (
    GROUPS,
    Observation,
    Subject,
    WrongShapeError,
    largest_deviation,
    observe,
)
from torch_klloss.auditing.experiment.parameters import Binding
from torch_klloss.auditing.experiment.probes import Width
from torch_klloss.auditing.experiment.signatures import Leaves
from torch_klloss.auditing.explanation.candidates import right_core, right_cores, unbiased_on_samples
from torch_klloss.auditing.explanation.fit import Fit, best_fits, explain
from torch_klloss.auditing.explanation.measured import measured_fits
from torch_klloss.auditing.explanation.mistakes.reductions import MEAN_OVER_STEPS
from torch_klloss.auditing.gradient import (
    GradientFinding,
    directions_of,
    judge_gradient,
    matches_on_samples,
    may_be_zero,
)

FALSE_ALARM = 4e-7
"""The probability to call a right value wrong, and the same for its gradient."""

_COARSEST = 0.1  # the largest standard error, relative to the KL, of a mean that is called right
_FEWEST_FINITE = 4  # the smallest number of values that are explained


@dataclass(frozen=True)
class Settings:
    """The arguments of `audit` by the same names."""

    seed: int
    budget: int
    gradient: bool
    num_dims: int | None


@dataclass(frozen=True)
class Judgement:
    """The judgement of a loss with one binding.

    Attributes:
        subject: the loss with its probes.
        observation: what it returned.
        fits: the simplest explanations of the values; empty where nothing explains them.
        right: whether the values are the KL's.
        gradient: the finding about the gradient; None where it was not judged.
        refused: whether it does not take [batch, latent].
    """

    subject: Subject
    observation: Observation
    fits: list[Fit]
    right: bool
    gradient: GradientFinding | None
    refused: bool = False


def judge(fn: Callable[..., Any], binding: Binding, settings: Settings) -> Judgement:
    """Call a loss with one binding, and explain what it returns.

    Raises:
        CallError: if it cannot be called, or returns what cannot be a KL.
    """
    subject, refused = _first_that_runs(fn, binding, settings)
    judgement = _judgement_of_sequences(subject, settings.seed, settings.budget)
    if refused is not None and not judgement.fits:
        raise refused  # with arguments of another shape nothing was explained
    return replace(judgement, refused=refused is not None)


def _judgement_of_sequences(subject: Subject, seed: int, budget: int) -> Judgement:
    """Judge a loss with the steps of a sequence as parts of an example, or else as examples.

    Raises:
        CallError: if it returns what cannot be a KL.
    """
    judgements: list[Judgement] = []
    refused: WrongShapeError | None = None
    for dims in (2,) if subject.signature.masked else (1, subject.rank - 1) if subject.rank > 2 else (1,):
        try:
            of_dims = replace(subject, layout=replace(subject.layout, example_dims=dims))
            judgements.append(_of_steps(_judgement(of_dims, seed, budget)))
        except WrongShapeError as error:  # [batch, steps] is a shape of the one, [batch] of the other
            refused = refused or error
            continue
        if judgements[-1].right:
            break
    if not judgements:
        raise refused or CallError("it could not be judged")
    return min(judgements, key=lambda found: (not found.right, found.fits[0].cost if found.fits else math.inf))


def _of_steps(judgement: Judgement) -> Judgement:
    """Return a judgement of steps as examples, where the mean over those of a Normal is a mistake."""
    layout, is_total = judgement.subject.layout, judgement.observation.arrangement == "total"
    if layout.example_dims == 1 or judgement.subject.signature.categorical or not is_total:
        return judgement
    fits = [replace(f, mistakes=(*f.mistakes, MEAN_OVER_STEPS), cost=f.cost + 1) for f in judgement.fits]
    return replace(judgement, fits=fits, right=False, gradient=_for_each_step(judgement.gradient))


def _for_each_step(gradient: GradientFinding | None) -> GradientFinding | None:
    if gradient is None or not gradient.summary.startswith("the KL's"):
        return gradient
    return replace(gradient, summary=f"{gradient.summary.rstrip('.')}, for each step.")


def _judgement(subject: Subject, seed: int, budget: int) -> Judgement:
    if _draws_its_own(subject, seed):
        return _judge_means(subject, seed, budget)
    observation = observe(subject, seed)
    if subject.signature.given_samples:
        return _judge_on_samples(subject, observation, seed, budget)
    fits = best_fits(right_cores(subject), subject.layout, observation, only_right=True)
    right = bool(fits) and bool(observation.value.isfinite().all())
    if not fits and observation.value.isfinite().sum() >= _FEWEST_FINITE:
        fits = explain(subject, observation) or measured_fits(subject, observation)
    return _with_gradient(subject, observation, fits, right)


def _first_that_runs(fn: Callable[..., Any], binding: Binding, settings: Settings) -> tuple[Subject, CallError | None]:
    """Return the loss with probes of the first rank and dtype that it takes, and the error that the first rank raised.

    Raises:
        CallError: if it takes none; the error of the first rank in float64.
    """
    first: CallError | None = None
    seed, num_dims = settings.seed, settings.num_dims
    for dtype in (torch.float64, torch.float32):
        for rank in binding.signature.ranks if num_dims is None else (num_dims,):
            layout, leaves = binding.signature.draw(seed, rank=rank)
            subject = Subject(fn, binding, layout, leaves, rank, dtype, settings.gradient)
            try:
                subject.replies(0, seed)
                subject.replies(len(layout.shapes) - 1, seed)
            except CallError as error:
                first = first or error
                continue
            return subject, first if rank != binding.signature.ranks[0] and num_dims is None else None
    raise first or CallError("it could not be called")


def _draws_its_own(subject: Subject, seed: int) -> bool:
    """Return whether the value depends on the random stream.

    Raises:
        CallError: if the loss seeds the stream itself.
    """
    if subject.signature.given_samples:
        subject = _fixed_arguments(subject, seed)
    for probe in (0, 1, len(subject.layout.shapes) - 1):  # the last has log-variances above zero, and logs without NaN
        replies = *subject.replies(probe, seed), *subject.replies(probe, seed + 1)
        if all(reply.drew for reply in replies) and torch.equal(replies[0].stream, replies[1].stream):
            raise CallError("it seeds torch's global random stream, so that every call draws the same noise")
        one, other = (reply.value for reply in replies)
        if one.shape != other.shape:
            return True
        finite = one.isfinite() & other.isfinite()
        if not torch.allclose(one[finite], other[finite], rtol=1e-5, atol=1e-9):
            return True
    return False


def _fixed_arguments(subject: Subject, seed: int) -> Subject:
    """Return the loss with the same samples in every call."""

    def arguments(leaves: Leaves) -> tuple[Any, ...]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return subject.signature.arguments(leaves)

    return _with_arguments(subject, arguments)


def _with_arguments(subject: Subject, arguments: Callable[[Leaves], tuple[Any, ...]]) -> Subject:
    signature = replace(subject.signature, arguments=arguments)
    return replace(subject, binding=replace(subject.binding, signature=signature))


def _of_width(subject: Subject, seed: int, width: Width) -> Subject:
    """Return the loss with probes on which the means of log-ratios, and of one density ratio, can be tested."""
    layout, leaves = subject.signature.draw(seed, rank=subject.rank, width=width)
    return replace(subject, layout=replace(layout, example_dims=subject.layout.example_dims), leaves=leaves)


def _judge_means(subject: Subject, seed: int, budget: int) -> Judgement:
    subject = _of_width(subject, seed, "wider")
    observation = _many(subject, seed, budget)
    fits, noisy = _right_means(subject, observation)
    if fits:
        return _with_gradient(subject, observation, fits, True)
    if not noisy:
        fits = explain(subject, observation)
    if not subject.signature.categorical and (noisy or not fits or "constant-factor" in fits[0].ids):
        narrower = _of_width(subject, seed, "narrower")  # here q(x)/p(x) has the moments, not p(x)/q(x)
        means = _many(narrower, seed, budget)
        right, still_noisy = _right_means(narrower, means) if noisy else ([], False)
        if right:
            return _with_gradient(narrower, means, right, True)
        found = [] if still_noisy else explain(narrower, means)
        noisy = still_noisy
        if found and (not fits or found[0].cost < fits[0].cost):
            subject, observation, fits = narrower, means, found
    if noisy:
        _refuse_noise(observation)
    return _with_gradient(subject, observation, fits, False)


def _many(subject: Subject, seed: int, budget: int) -> Observation:
    """Return the means over as many calls as the budget allows, in groups of equal size."""
    num_calls = GROUPS * max(1, round(budget / (GROUPS * len(subject.layout.shapes))))
    return observe(subject, seed, num_calls, directions_of(subject))


def _right_means(subject: Subject, observation: Observation) -> tuple[list[Fit], bool]:
    """Return the fits of the KL that the means agree with, one by one and pooled, if their error is small.

    Also whether some agree, but with errors so large that other values would agree too.
    """
    limit = largest_deviation(len(observation.value), FALSE_ALARM)
    fits = best_fits(right_cores(subject), subject.layout, observation, only_right=True, accept=limit)
    ratios = [(fit, *pooled_ratio(subject, observation, fit)) for fit in fits]
    agreeing = [(fit, error) for fit, ratio, error in ratios if abs(ratio - 1) <= limit * error]
    known = [fit for fit, error in agreeing if error <= _COARSEST]
    return known, bool(agreeing) and not known


def _refuse_noise(observation: Observation) -> None:
    """Refuse to judge means with too large an error.

    Raises:
        CallError: always.
    """
    raise CallError(
        f"the mean of {observation.num_calls} calls for each batch is not known within {100 * _COARSEST:.0f} %: its "
        "variance is large or infinite; if it is finite, a larger budget= helps"
    )


def pooled_ratio(subject: Subject, observation: Observation, fit: Fit) -> tuple[float, float]:
    """Return the ratio of the sum of all observed means to the predicted sum, and its standard error."""
    predicted = fit.predict(subject.layout, observation.arrangement).detach().sum()
    return float(observation.value.sum() / predicted), float(observation.sum_error.norm() / predicted)


def _judge_on_samples(subject: Subject, observation: Observation, seed: int, budget: int) -> Judgement:
    """Judge a function of given samples by its values at these samples, and otherwise by its means."""
    exact = [*unbiased_on_samples(subject, observation), right_core(subject)]
    fits = best_fits(exact, subject.layout, observation, only_right=True)
    if fits and (not subject.gradient or matches_on_samples(subject, observation, fits[0], seed)):
        gradient = GradientFinding("the KL's, where the samples are reparameterised.") if subject.gradient else None
        return Judgement(subject, observation, fits, True, gradient)
    right = bool(fits)
    if not fits:
        fits = explain(subject, observation, on_samples=True)
    wider = _of_width(subject, seed, "wider")
    means = _many(wider, seed, budget)
    if not fits:
        subject, observation = wider, means
        fits, noisy = _right_means(wider, means)
        right = bool(fits)
        if noisy:
            _refuse_noise(means)
        fits = fits or explain(wider, means)
    judgement = replace(_with_gradient(wider, means, fits, right), subject=subject, observation=observation)
    if judgement.gradient is not None and judgement.gradient.mistakes and right:
        judgement = replace(judgement, gradient=_on_fixed_samples(wider, judgement, seed, budget))
    return judgement


def _on_fixed_samples(subject: Subject, judgement: Judgement, seed: int, budget: int) -> GradientFinding | None:
    """Return the finding at samples that do not depend on q's parameters, if the gradient is the KL's there."""
    if subject.signature.fixed_samples is None:
        return judgement.gradient
    fixed = _with_arguments(subject, subject.signature.fixed_samples)
    means = _many(fixed, seed, budget)
    found = judge_gradient(fixed, means, judgement.fits[0], FALSE_ALARM)
    if found.mistakes or may_be_zero(fixed, means, FALSE_ALARM):
        return judgement.gradient
    return replace(
        found, summary=f"{found.summary.rstrip('.')}, where the samples are fixed; not where they are reparameterised."
    )


def _with_gradient(subject: Subject, observation: Observation, fits: list[Fit], right: bool) -> Judgement:
    gradient = None
    if subject.gradient and bool(observation.value.isfinite().all()):
        gradient = judge_gradient(subject, observation, fits[0] if fits else None, FALSE_ALARM)
    return Judgement(subject, observation, fits, right, gradient)
