"""The KL as a mean over draws: of log q - log p, of -H(q) - log p, and the numbers k2 and k3."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.distributions.located import Located
from torch_klloss.distributions.maps import fixed
from torch_klloss.distributions.precision import full_precision
from torch_klloss.distributions.supports import check_log_prob
from torch_klloss.methods.monte_carlo.chunks import Expectation, expectation_in_chunks
from torch_klloss.methods.monte_carlo.gradients import REPARAMETERISED, Draw, advantage, by_score, null_ratio
from torch_klloss.methods.monte_carlo.plan import Plan, PreparedPair
from torch_klloss.methods.monte_carlo.rounded_draws import RoundedDraws
from torch_klloss.methods.monte_carlo.tail_diagnostics import may_have_heavy_tail
from torch_klloss.numerics.exponentials import expm1
from torch_klloss.samplers import Points
from torch_klloss.samplers.components import mixture_of, prepare_by_component
from torch_klloss.samplers.origins import prepare_located

NUMBERS = ("k2", "k3")  # their gradient is the log-ratio's


def estimate_plain(pair: PreparedPair, plan: Plan, source: AbstractContextManager[None]) -> Expectation:
    """Return the mean of the terms that `value` and `gradient` name.

    Args:
        pair: what is estimated.
        plan: how; any gradient but "mixed".
        source: the context in which draws come from the right random stream.
    """
    with source:
        draws = _prepare(pair.q, plan)
    terms = _Terms(pair, plan, draws)
    if plan.in_chunks:
        terms.evaluate(0, 1)  # which settles the gradient
        if terms.gradient == "score_function":
            terms.find_mean()
    result = expectation_in_chunks(
        terms.evaluate, plan.num_samples, plan.chunk_size, pair.peeled, with_error=plan.with_error
    )
    std_error = terms.trusted(result)
    return replace(result, std_error=std_error) if plan.with_error else result


class _Terms:
    """Evaluate the terms of an estimate, some draws at a time."""

    def __init__(self, pair: PreparedPair, plan: Plan, draws: Callable[[int, int], Draw]) -> None:
        self.pair, self.plan, self.draws = pair, plan, draws
        self.gradient, self.is_settled = plan.gradient, False
        self.mean: Tensor | None = None  # of log q - log p over all draws, for the baseline
        self.rounded = RoundedDraws(pair.q)
        self.seen: dict[int, Tensor] = {}  # the log-ratios behind k3, by chunk

    def evaluate(self, start: int, stop: int) -> tuple[Points, Tensor]:
        """Return the points of these draws, and the terms there."""
        draw = self.draws(start, stop)
        points, (terms, score) = draw.points, self._terms(draw)
        self.rounded.see(start, draw.x)
        if self.gradient == "none":
            points = replace(points, weights=points.weights.detach())
        if self.plan.value not in NUMBERS and score is None:
            return points, terms
        weights, ratio = points.weights, terms.detach()
        if self.plan.value in NUMBERS:
            self.seen[start] = ratio
            terms = torch.where(ratio.isfinite(), terms, 0.0)
        terms = weights * terms  # a gradient flows through the weights of a mixture's components as well
        if score is not None:
            terms = terms - weights.detach() * score
        if self.plan.value in NUMBERS:
            terms = weights.detach() * _number(ratio, self.plan.value) + terms - terms.detach()
        return replace(points, weights=torch.ones_like(weights)), terms

    def _settle(self, draw: Draw, log_q: Tensor) -> None:
        """Settle on the score function where the draws have no path, or raise a NotImplementedError."""
        self.is_settled = True
        if self.gradient in REPARAMETERISED and not draw.has_path(self.pair.q, log_q):
            self.gradient = self.plan.gradient_without_path(self.pair.q)
        if self.gradient == "score_function" and self.plan.num_samples > 1:
            self.check_independent()

    def check_independent(self) -> None:
        """Raise a NotImplementedError if draws depend on one another."""
        if self.draws(0, 1).points.num_replicates != self.plan.num_samples:
            raise NotImplementedError(
                f"MonteCarlo(gradient='score_function') takes the other draws as a baseline, which is unbiased for "
                f"independent draws alone; the draws of {self.plan.sampler!r} are not. Use sampler=IID(), or "
                "gradient='pathwise' where q has rsample."
            )

    def find_mean(self) -> None:
        """Find the mean of log q - log p over all draws, of every component of a mixture, chunk by chunk."""
        total = torch.zeros(())
        with torch.no_grad():
            for start, stop in self.plan.chunks():
                draw = self.draws(start, stop)
                part = draw.split(self._log_q(draw.x) - self.pair.log_p(draw.x, self.pair.q.batch_shape)).sum(0)
                total = total.to(part) + part
        self.mean = total / self.plan.num_samples

    def trusted(self, result: Expectation) -> Tensor | None:
        """Return the standard error, NaN where it is unreliable."""
        std_error = self.rounded.trusted(result.std_error, result.num_points, self.pair.peeled)
        if std_error is None or self.plan.value not in NUMBERS:
            return std_error
        if self.plan.value == "k2":  # the spread does not include the bias
            return torch.full_like(std_error, math.nan)
        log_ratio = torch.cat([self.seen[start] for start in sorted(self.seen)])
        bad = may_have_heavy_tail(-log_ratio, "MonteCarlo(value='k3')", "Use value='log_ratio'.")
        bad = bad.flatten(-self.pair.peeled).any(-1) if self.pair.peeled else bad
        return torch.where(bad, math.nan, std_error)

    def _terms(self, draw: Draw) -> tuple[Tensor, Tensor | None]:
        """Return the log-ratio, and what to take off it with fixed weights, whose derivatives have mean zero."""
        x, log_q = draw.x, draw.points.log_q
        if log_q is None or self.plan.value == "entropy":
            log_q = self._log_q(x)
        else:
            check_log_prob(self.pair.q, log_q, x.x.shape[:1] + self.pair.q.batch_shape)
        if not self.is_settled:
            self._settle(draw, log_q)
        if self.gradient == "score_function":
            return self._score_terms(draw.fixed())
        score = null_ratio(self._log_q(fixed(x))) if self.gradient == "sticking_the_landing" else None
        log_p = self.pair.log_p(x, self.pair.q.batch_shape)
        return (log_q.detach() if self.gradient == "none" else log_q) - log_p, score

    def _score_terms(self, draw: Draw) -> tuple[Tensor, Tensor | None]:
        log_p, log_q, score = self.pair.log_p(draw.x, self.pair.q.batch_shape), self._log_q(draw.x), None
        if self.plan.value == "entropy":
            log_score = self.pair.log_q(draw.x)
        else:
            log_score = log_q if draw.by_component is None else draw.by_component.log_component()
            score = null_ratio(log_q)
            log_q = log_q.detach() + score.log1p()  # by way of one node, where their gradients cancel without rounding
        log_ratio = log_q - log_p
        return by_score(log_ratio, log_score, advantage(draw, log_ratio, self.plan.num_samples, self.mean)), score

    def _log_q(self, x: Located) -> Tensor:
        return full_precision(-self.pair.q.entropy()) if self.plan.value == "entropy" else self.pair.log_q(x)


def _number(log_ratio: Tensor, value: str) -> Tensor:
    """Return the terms of k2 or k3."""
    return log_ratio**2 / 2 if value == "k2" else expm1(-log_ratio) + log_ratio


def _prepare(q: Distribution, plan: Plan) -> Callable[[int, int], Draw]:
    """Fix the randomness, and return a function from (start, stop) to the draws start … stop - 1."""
    differentiable = plan.gradient in REPARAMETERISED
    if mixture_of(q) is None:
        draws = prepare_located(plan.sampler, q, plan.num_samples, differentiable=differentiable)
        return lambda start, stop: Draw(*draws.part(start, stop))
    by_component = prepare_by_component(plan.sampler, q, plan.num_samples, differentiable=differentiable)

    def part(start: int, stop: int) -> Draw:
        drawn = by_component.part(start, stop)
        return Draw(drawn.points, drawn.x, drawn)

    return part
