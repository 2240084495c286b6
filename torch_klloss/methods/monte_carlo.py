"""The sampled KL: unbiased in value, and in whichever gradient is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.estimate import KLEstimate
from torch_klloss.rebuild import device_of, unvalidated
from torch_klloss.rng import draw_seed, private_rng
from torch_klloss.samplers import IID, Points, Sampler
from torch_klloss.samplers.components import ComponentDraw, draw_by_component, mixture_of
from torch_klloss.structure import check_common_measure, check_pair, name, peel
from torch_klloss.supports import contained, has_moving_support, is_discrete, log_prob_within

Gradient = Literal["auto", "pathwise", "sticking_the_landing", "score_function", "none"]


@dataclass(frozen=True)
class MonteCarlo:
    """Estimate KL(q‖p) by the mean of log q(x) - log p(x) over samples x of q.

    The value is unbiased with variance Var_q[log q - log p] / S. A single value may be negative where the KL is small,
    and that is right: clamping it would bias it. Samples of q are already weighted by q; nothing is multiplied
    by a density.

    The gradient to p's parameters is that of -E_q[log p], unbiased, whatever `gradient` says. To q's:

    - "pathwise": through `rsample`. Unbiased.
    - "sticking_the_landing": pathwise without the score term, whose expectation is zero. Unbiased; its variance
      vanishes as q approaches p, and is up to five times the pathwise one far from it.
    - "score_function": (log q - log p) ∇ log q at samples that carry no gradient, less the mean of the other draws as
      a baseline from two samples on. Unbiased, for every q; the noisiest.
    - "none": zero.
    - "auto": "pathwise" where q has `rsample`, else "score_function".

    Where the support of q depends on its parameters (Uniform, Pareto) only "pathwise" is right, and the others
    are refused; where that of a mixture's components does, none is.

    A mixture q (MixtureSameFamily, also transformed, or on the inside of an Independent that p has too) is split:
    KL = Σ_k π_k E_k[log q - log p], with S draws from every component. Value and gradient are exact in how often a
    component is drawn; they stay unbiased, "pathwise" needs no more than components with `rsample`, and
    "score_function" takes the score of the component that a point was drawn from.

    Args:
        num_samples: S, how many points are drawn for every batch element, and for every component of a mixture.
        sampler: where the points come from.
        gradient: how the gradient to q's parameters is estimated.

    References:
        *Sticking the landing: simple, lower-variance gradient estimators for variational inference* (Roeder, Wu and
        Duvenaud, 2017). *Buy 4 REINFORCE samples, get a baseline for free!* (Kool, van Hoof and Welling, 2019).

    Example:
        >>> import torch
        >>> from torch.distributions import Normal, StudentT
        >>> from torch_klloss.methods import MonteCarlo
        >>> generator = torch.Generator().manual_seed(0)
        >>> estimate = MonteCarlo(4096).estimate(Normal(0.0, 1.0), StudentT(4.0), generator)
        >>> low, high = estimate.interval(0.999)
        >>> bool(low < 0.04627 < high), estimate.dof
        (True, 4095)
    """

    num_samples: int = 1
    sampler: Sampler = field(default_factory=IID)
    gradient: Gradient = "auto"
    name: ClassVar[str] = "monte_carlo"

    def __post_init__(self) -> None:
        if isinstance(self.num_samples, bool) or not isinstance(self.num_samples, int) or self.num_samples < 1:
            raise ValueError(f"num_samples must be an integer of at least 1, got {self.num_samples!r}.")
        if self.gradient not in get_args(Gradient):
            options = ", ".join(map(repr, get_args(Gradient)))
            raise ValueError(f"gradient must be one of {options}, got {self.gradient!r}.")

    def estimate(self, q: Distribution, p: Distribution, generator: torch.Generator | None = None) -> KLEstimate:
        """Return the estimate, of the broadcast batch shape, with its standard error (NaN for a single sample).

        Args:
            q: the distribution that is sampled.
            p: the other one.
            generator: where the randomness comes from, which then leaves the global stream alone; by default the
                global stream.

        Raises:
            NotImplementedError: if q cannot be sampled in the way that `gradient` needs, or that gradient would be
                wrong for it.
            ValueError: if the shapes do not fit, or q is discrete and p continuous, or the reverse.
            TypeError: if q or p is not a distribution.
        """
        check_pair(q, p)
        check_common_measure(q, p)
        q, p, peeled = _peel_mixture(q, p)
        gradient = self._gradient_for(q)
        reach = contained(q, p)
        # Expanded before it is drawn from: batch elements do not share their noise.
        shape = check_pair(q, p)
        q = unvalidated(q if q.batch_shape == shape else q.expand(shape))
        with nullcontext() if generator is None else private_rng(draw_seed(generator), device_of(q)):
            draw = self._draw(q, differentiable=gradient in _REPARAMETERISED)
        points, log_p = draw.points, log_prob_within(p, draw.points.x, reach)
        log_ratio = _LOG_RATIOS[gradient](q, draw, log_p)
        if gradient == "none":
            points = Points(points.x, points.weights.detach(), points.num_replicates)
        value, std_error = points.expectation(log_ratio, peeled), points.std_error(log_ratio, peeled)
        if reach is not None and reach is not True:
            reach = torch.as_tensor(reach, device=value.device).expand(shape)
            value = torch.where(reach.flatten(-peeled).all(-1) if peeled else reach, value, math.inf)
        replicates = points.num_replicates
        return KLEstimate(
            value,
            exact=False,
            std_error=std_error,
            dof=None if replicates is None else replicates - 1,
            method=self.name,
            num_evaluations=len(points.x),
        )

    def supports(self, q: Distribution, p: Distribution) -> bool:
        """Tell whether q can be sampled in the way that `gradient` needs."""
        try:
            self._gradient_for(_peel_mixture(q, p)[0])
        except NotImplementedError:
            return False
        return True

    def _gradient_for(self, q: Distribution) -> str:
        """Resolve "auto", and refuse what would be wrong for q."""
        gradient: str = self.gradient
        mixture = mixture_of(q)
        drawn = q if mixture is None else mixture.component_distribution
        # The rsample of a straight-through estimator is no path: its points are discrete.
        has_path = drawn.has_rsample and not is_discrete(q)
        if gradient == "auto":
            gradient = "pathwise" if has_path else "score_function"
        if gradient in _REPARAMETERISED and not has_path:
            raise NotImplementedError(
                f"MonteCarlo(gradient={gradient!r}) needs q.rsample, which {name(q)} lacks; use "
                "gradient='score_function', or AutoKL, which takes an exact route where there is one."
            )
        if gradient != "none" and mixture is not None and has_moving_support(q):
            raise NotImplementedError(
                f"MonteCarlo(gradient={gradient!r}) would be biased for {name(q)}, whose density jumps where the "
                "support of a component ends, which moves with its parameters; use gradient='none'."
            )
        if gradient in ("sticking_the_landing", "score_function") and has_moving_support(q):
            raise NotImplementedError(
                f"MonteCarlo(gradient={gradient!r}) would be biased for {name(q)}, whose support moves with its "
                "parameters; use gradient='pathwise'."
            )
        return gradient

    def _draw(self, q: Distribution, differentiable: bool) -> Draw | ComponentDraw:
        if mixture_of(q) is not None:
            return draw_by_component(self.sampler, q, self.num_samples, differentiable=differentiable)
        return Draw(self.sampler.draw(q, self.num_samples, differentiable=differentiable))


class Draw(NamedTuple):
    """Hold points of q that were drawn from q itself."""

    points: Points


_REPARAMETERISED = ("pathwise", "sticking_the_landing")


def _peel_mixture(q: Distribution, p: Distribution) -> tuple[Distribution, Distribution, int]:
    """Strip the `Independent` that q and p share, where that brings a mixture to light."""
    inner_q, inner_p, peeled = peel(q, p)
    return (q, p, 0) if mixture_of(inner_q) is None else (inner_q, inner_p, peeled)


def _pathwise(q: Distribution, draw: Draw | ComponentDraw, log_p: Tensor) -> Tensor:
    return q.log_prob(draw.points.x) - log_p


def _sticking_the_landing(q: Distribution, draw: Draw | ComponentDraw, log_p: Tensor) -> Tensor:
    x = draw.points.x
    score = q.log_prob(x.detach())  # its value cancels; its gradient is the score, which is taken away
    return q.log_prob(x) - log_p - (score - score.detach())


def _score_function(q: Distribution, draw: Draw | ComponentDraw, log_p: Tensor) -> Tensor:
    log_q = q.log_prob(draw.points.x)
    if isinstance(draw, Draw):
        return score_function_log_ratio(log_q, log_p)
    by_component = (-1, draw.num_components)  # whose draws are one another's baseline
    log_q, log_p, log_score = (t.unflatten(0, by_component) for t in (log_q, log_p, draw.log_component()))
    return score_function_log_ratio(log_q, log_p, log_score=log_score).flatten(0, 1)


def _none(q: Distribution, draw: Draw | ComponentDraw, log_p: Tensor) -> Tensor:
    return q.log_prob(draw.points.x).detach() - log_p


def score_function_log_ratio(log_q: Tensor, log_p: Tensor, dim: int = 0, log_score: Tensor | None = None) -> Tensor:
    """Return log q - log p whose mean over `dim` has the score-function gradient, leave-one-out from two draws on.

    The value is that of log q - log p. All are taken at samples that carry no gradient themselves.

    Args:
        log_q: log q at the samples.
        log_p: log p at them.
        dim: the dimension that counts the samples.
        log_score: the log-density that the samples were drawn from; log q by default.
    """
    log_score = log_q if log_score is None else log_score
    log_ratio = (log_q - log_p).detach()
    num_samples = log_ratio.shape[dim]
    advantage = log_ratio
    if num_samples > 1:  # minus the mean of the others: ℓᵢ - (Σℓ - ℓᵢ)/(S-1) = (ℓᵢ - mean ℓ) · S/(S-1)
        advantage = (log_ratio - log_ratio.mean(dim, keepdim=True)) * (num_samples / (num_samples - 1))
    advantage = torch.where(advantage.isfinite(), advantage, 0.0)
    return log_q.detach() - log_p + advantage * (log_score - log_score.detach())


# Keyed by the word of `gradient`; each returns per-draw terms whose value is log q - log p.
_LOG_RATIOS: dict[str, Callable[[Distribution, Draw | ComponentDraw, Tensor], Tensor]] = {
    "pathwise": _pathwise,
    "sticking_the_landing": _sticking_the_landing,
    "score_function": _score_function,
    "none": _none,
}
