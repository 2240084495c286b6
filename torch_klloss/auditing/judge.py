"""Judging a loss: which probes it is asked about, how often, and what its answers show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch_klloss.auditing.experiment.calling import CallError
from torch_klloss.auditing.experiment.observation import GROUPS, Asked, Observation, observe
from torch_klloss.auditing.experiment.parameters import Call
from torch_klloss.auditing.experiment.probes import Width
from torch_klloss.auditing.explanation.candidates import right_core, unbiased_on_samples
from torch_klloss.auditing.explanation.fit import Fit, best_fits, explain
from torch_klloss.auditing.gradient import (
    GradientFinding,
    directions_of,
    judge_gradient,
    matches_on_samples,
    may_be_zero,
)
from torch_klloss.numerics.special import student_t_quantile

FALSE_ALARM = 4e-7
"""The probability to call a right value wrong; as much again for its gradient."""

_COARSEST = 0.1  # the largest standard error, relative to the KL, with which a mean is called right
_FEWEST_FINITE = 4  # values that an explanation must rest on


@dataclass(frozen=True)
class Settings:
    """Hold what `audit` was asked for; its arguments of these names say what they are."""

    seed: int
    budget: int
    gradient: bool
    num_dims: int | None


@dataclass(frozen=True)
class Judgement:
    """Hold what one way of calling a loss has shown.

    Attributes:
        asked: the loss, how it was called, and the probes.
        observation: what it returned for them.
        fits: the simplest explanations of the values; none where nothing explains them.
        right: whether the values are the KL's.
        gradient: what was found about the gradient; None where it was not judged.
    """

    asked: Asked
    observation: Observation
    fits: list[Fit]
    right: bool
    gradient: GradientFinding | None


def judge(fn: Callable[..., Any], call: Call, settings: Settings) -> Judgement:
    """Call a loss in one way and explain what it returns.

    Raises:
        CallError: if it cannot be called so, or returns what cannot be a KL.
    """
    asked, refused = _first_that_runs(fn, call, settings)
    judgement = _judged(asked, settings.seed, settings.budget)
    if refused is not None and not judgement.fits:
        raise refused  # what it does with arguments of another shape explains nothing
    return judgement


def _judged(asked: Asked, seed: int, budget: int) -> Judgement:
    if _draws_its_own(asked, seed):
        return _judge_means(asked, seed, budget)
    observation = observe(asked, seed)
    if asked.call.signature.given_samples:
        return _judge_on_samples(asked, observation, seed, budget)
    fits = best_fits([right_core(asked)], asked.layout, observation, only_right=True)
    right = bool(fits) and bool(observation.value.isfinite().all())
    if not fits and observation.value.isfinite().sum() >= _FEWEST_FINITE:
        fits = explain(asked, observation)
    return _with_gradient(asked, observation, fits, right)


def _first_that_runs(fn: Callable[..., Any], call: Call, settings: Settings) -> tuple[Asked, CallError | None]:
    """Return the probes of the number of dimensions and the dtype that the loss takes, and what it said to the first.

    Raises:
        CallError: if it takes none; the error is that of two dimensions in float64.
    """
    first: CallError | None = None
    seed, num_dims = settings.seed, settings.num_dims
    for dtype in (torch.float64, torch.float32):
        for rank in call.signature.ranks if num_dims is None else (num_dims,):
            layout, leaves = call.signature.draw(seed, rank=rank)
            asked = Asked(fn, call, layout, leaves, rank, dtype, settings.gradient)
            try:
                asked.reply(0, seed)
                asked.reply(len(layout.shapes) - 1, seed)
            except CallError as error:
                first = first or error
                continue
            return asked, first if rank != call.signature.ranks[0] and num_dims is None else None
    raise first or CallError("it could not be called")


def _draws_its_own(asked: Asked, seed: int) -> bool:
    """Return whether the same arguments give another value from another random stream.

    Raises:
        CallError: if the loss seeds the stream itself.
    """
    if asked.call.signature.given_samples:
        asked = _fixed_arguments(asked, seed)
    for probe in (0, 1, len(asked.layout.shapes) - 1):  # the last has log-variances above zero, and logs without NaN
        replies = asked.reply(probe, seed), asked.reply(probe, seed + 1)
        if all(reply.drew for reply in replies) and torch.equal(replies[0].stream, replies[1].stream):
            raise CallError("it seeds torch's global random stream, so that every call draws the same noise")
        one, other = (reply.value for reply in replies)
        if one.shape != other.shape:
            return True
        finite = one.isfinite() & other.isfinite()
        if not torch.allclose(one[finite], other[finite], rtol=1e-5, atol=1e-9):
            return True
    return False


def _fixed_arguments(asked: Asked, seed: int) -> Asked:
    """Return the same loss, whose samples do not change from call to call."""
    signature = asked.call.signature

    def arguments(leaves: dict[str, Tensor]) -> tuple[Any, ...]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return signature.arguments(leaves)

    call = replace(asked.call, signature=replace(signature, arguments=arguments))
    return Asked(asked.fn, call, asked.layout, asked.leaves, asked.rank, asked.dtype, asked.gradient)


def _of_width(asked: Asked, seed: int, width: Width) -> Asked:
    """Return the loss with probes on which the means of log-ratios, and of one density ratio, can be tested."""
    layout, leaves = asked.call.signature.draw(seed, rank=asked.rank, width=width)
    return Asked(asked.fn, asked.call, layout, leaves, asked.rank, asked.dtype, asked.gradient)


def _judge_means(asked: Asked, seed: int, budget: int) -> Judgement:
    asked = _of_width(asked, seed, "wider")
    observation = _many(asked, seed, budget)
    fits, noisy = _right_means(asked, observation)
    if fits:
        return _with_gradient(asked, observation, fits, True)
    if not noisy:
        fits = explain(asked, observation)
    if not asked.call.signature.categorical and (noisy or _is_loose(fits)):
        narrower = _of_width(asked, seed, "narrower")  # where q(x)/p(x) has the moments that p(x)/q(x) has elsewhere
        seen = _many(narrower, seed, budget)
        right, still_noisy = _right_means(narrower, seen) if noisy else ([], False)
        if right:
            return _with_gradient(narrower, seen, right, True)
        found = [] if still_noisy else explain(narrower, seen)
        noisy = still_noisy
        if found and (not fits or found[0].cost < fits[0].cost):
            asked, observation, fits = narrower, seen, found
    if noisy:
        _refuse_noise(observation)
    return _with_gradient(asked, observation, fits, False)


def _many(asked: Asked, seed: int, budget: int) -> Observation:
    """Return the means over as many calls as the budget allows, in equal groups."""
    num_calls = GROUPS * max(1, round(budget / (GROUPS * len(asked.layout.shapes))))
    return observe(asked, seed, num_calls, directions_of(asked))


def _is_loose(fits: list[Fit]) -> bool:
    """Return whether nothing explains the means, or a constant had to be made for it."""
    return not fits or "constant-factor" in fits[0].ids


def _right_means(asked: Asked, observation: Observation) -> tuple[list[Fit], bool]:
    """Return the fits of the KL that single means and all of them together agree with, if they are known well.

    Also whether there are any that agree, and are known so little that much else agrees as well.
    """
    limit = _limit(len(observation.value))
    fits = best_fits([right_core(asked)], asked.layout, observation, only_right=True, accept=limit)
    ratios = [(fit, *pooled_ratio(asked, observation, fit)) for fit in fits]
    agreeing = [(fit, error) for fit, ratio, error in ratios if abs(ratio - 1) <= limit * error]
    known = [fit for fit, error in agreeing if error <= _COARSEST]
    return known, bool(agreeing) and not known


def _refuse_noise(observation: Observation) -> None:
    """Refuse to judge means that may be right, and may be much else.

    Raises:
        CallError: always.
    """
    raise CallError(
        f"the mean of {observation.num_calls} calls for each batch is not known within {100 * _COARSEST:.0f} %: its "
        "variance is large, perhaps infinite; if it is not, a larger budget= helps"
    )


def pooled_ratio(asked: Asked, observation: Observation, fit: Fit) -> tuple[float, float]:
    """Return the observed means over the predicted ones, all probes together, and that ratio's standard error."""
    predicted = fit.predict(asked.layout, observation.arrangement).detach().sum()
    return float(observation.value.sum() / predicted), float(observation.sum_error.norm() / predicted)


def _limit(count: int) -> float:
    """Return within how many standard errors all of `count` right means lie but for the false alarms stated."""
    return float(student_t_quantile(1 - FALSE_ALARM / (2 * count), GROUPS - 1.0))


def _judge_on_samples(asked: Asked, observation: Observation, seed: int, budget: int) -> Judgement:
    """Judge a function of given samples: by the values on the very samples, and else by its mean over many."""
    exact = [*unbiased_on_samples(asked, observation), right_core(asked)]
    fits = best_fits(exact, asked.layout, observation, only_right=True)
    if fits and (not asked.gradient or matches_on_samples(asked, observation, fits[0], seed)):
        gradient = (
            GradientFinding("the KL's, where the samples are reparameterised.", (), {}) if asked.gradient else None
        )
        return Judgement(asked, observation, fits, True, gradient)
    right = bool(fits)
    if not fits:
        fits = explain(asked, observation, on_samples=True)
    means = _of_width(asked, seed, "wider")
    many = _many(means, seed, budget)
    if not fits:
        asked, observation = means, many
        fits, noisy = _right_means(means, many)
        right = bool(fits)
        if noisy:
            _refuse_noise(many)
        fits = fits or explain(means, many)
    judged = _with_gradient(means, many, fits, right)
    judged = replace(judged, asked=asked, observation=observation)
    if judged.gradient is not None and judged.gradient.mistakes and right:
        judged = replace(judged, gradient=_on_fixed_samples(means, judged, seed, budget))
    return judged


def _on_fixed_samples(asked: Asked, judged: Judgement, seed: int, budget: int) -> GradientFinding | None:
    """Return what is found where the samples have no gradient of their own, if that is the KL's."""
    signature = asked.call.signature
    if signature.fixed_samples is None:
        return judged.gradient
    call = replace(asked.call, signature=replace(signature, arguments=signature.fixed_samples))
    fixed = Asked(asked.fn, call, asked.layout, asked.leaves, asked.rank, asked.dtype, asked.gradient)
    many = _many(fixed, seed, budget)
    found = judge_gradient(fixed, many, judged.fits[0], FALSE_ALARM)
    if found.mistakes or may_be_zero(fixed, many, FALSE_ALARM):
        return judged.gradient
    return replace(
        found, summary=f"{found.summary.rstrip('.')}, where the samples are fixed; not where they are reparameterised."
    )


def _with_gradient(asked: Asked, observation: Observation, fits: list[Fit], right: bool) -> Judgement:
    gradient = None
    if asked.gradient and bool(observation.value.isfinite().all()):
        gradient = judge_gradient(asked, observation, fits[0] if fits else None, FALSE_ALARM)
    return Judgement(asked, observation, fits, right, gradient)
