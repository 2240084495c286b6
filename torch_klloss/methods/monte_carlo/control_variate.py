"""The KL of a diagonal Normal q: a quadratic part of log p is integrated, and only the rest is sampled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.distributions.simplify import diagonal_normal_of
from torch_klloss.distributions.tensors import copy_with
from torch_klloss.estimate import KLEstimate
from torch_klloss.methods.monte_carlo.chunks import Expectation, expectation_in_chunks
from torch_klloss.methods.monte_carlo.plan import Plan, PreparedPair
from torch_klloss.methods.monte_carlo.surrogates import (
    Quadratic,
    ScoreRegression,
    taylor,
    with_score,
)
from torch_klloss.samplers import Points
from torch_klloss.samplers.draws import Draws, prepare


def estimate_with_surrogate(pair: PreparedPair, plan: Plan, source: AbstractContextManager[None]) -> Expectation:
    """Return the estimate with a fitted quadratic ("control_variate") or the Taylor expansion ("taylor").

    Args:
        pair: the pair, whose q is a Normal with independent coordinates.
        plan: the options.
        source: the context in which draws come from the right random stream.
    """
    if plan.gradient == "none":
        pair = replace(pair, q=copy_with(pair.q, lambda t, *_: t.detach()))
    return (_with_regression if plan.value == "control_variate" else _with_taylor)(pair, plan, source)


def _with_taylor(pair: PreparedPair, plan: Plan, source: AbstractContextManager[None]) -> Expectation:
    with source:
        draws = prepare(plan.sampler, pair.q, plan.num_samples, differentiable=True)
    h = taylor(pair.log_p, *_moments(pair.q))
    rest = expectation_in_chunks(_rest(pair, draws, h), plan.num_samples, plan.chunk_size, with_error=plan.with_error)
    return replace(rest, value=_exact(pair.q, h) + rest.value, num_points=rest.num_points + 1)


def _with_regression(pair: PreparedPair, plan: Plan, source: AbstractContextManager[None]) -> Expectation:
    folds = pair.q.expand(torch.Size((2, *pair.q.batch_shape)))  # batch elements, hence independent
    half = replace(plan, num_samples=plan.num_samples // 2, chunk_size=plan.chunk_size and -(-plan.chunk_size // 2))
    with source:
        draws = prepare(plan.sampler, folds, half.num_samples, differentiable=True)
    regression = ScoreRegression(*_moments(folds))
    if half.in_chunks:
        for start, stop in half.chunks():
            x = draws.part(start, stop).x.detach()
            regression.add(x, with_score(pair.log_p, x)[1])
        h = regression.fit()
        rest = expectation_in_chunks(_rest(pair, draws, h), half.num_samples, half.chunk_size)
    else:
        points = draws.part(0, half.num_samples)
        log_p, score = with_score(pair.log_p, points.x)
        regression.add(points.x, score)
        h = regression.fit()
        rest = expectation_in_chunks(lambda *_: (points, h.at(points.x) - log_p), half.num_samples, None)
    return _mean_of_folds(_exact(folds, h) + rest.value, rest)


def _moments(q: Distribution) -> tuple[Tensor, Tensor, int]:
    """Return mean and standard deviation of a Normal, and how many of their dimensions make up an event."""
    normal = diagonal_normal_of(q)
    assert normal is not None
    return normal.loc, normal.scale, len(q.event_shape)


def _exact(q: Distribution, h: Quadratic) -> Tensor:
    """Return -H(q) - E_q[h]."""
    loc, scale, _ = _moments(q)
    return -q.entropy() - h.expectation(loc, scale)


def _rest(pair: PreparedPair, draws: Draws, h: Quadratic) -> Callable[[int, int], tuple[Points, Tensor]]:
    """Return a function from (start, stop) to the points of these draws, and h - log p there."""

    def evaluate(start: int, stop: int) -> tuple[Points, Tensor]:
        points = draws.part(start, stop)
        return points, h.at(points.x) - pair.log_p(points.x)

    return evaluate


def _mean_of_folds(folds: Tensor, rest: Expectation) -> Expectation:
    """Return the mean of the two folds, with an error from the spread within them.

    Their difference is no error: each fold uses the fit to the other one, so that the two are dependent.
    """
    each = KLEstimate(folds, exact=False, std_error=rest.std_error, skewness=rest.skewness)
    mean = each.combine(torch.full_like(folds, 0.5), (0,))
    dof = None if rest.dof is None else 2 * rest.dof
    return Expectation(mean.value, mean.std_error, dof, mean.skewness, 2 * rest.num_points)
