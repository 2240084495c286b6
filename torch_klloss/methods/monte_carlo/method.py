"""The sampled KL, unbiased in value and gradient."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.distributions.batch_dims import expand_to
from torch_klloss.distributions.checks import check_common_measure, check_pair, type_name
from torch_klloss.distributions.domains import nan_outside
from torch_klloss.distributions.impossible import lacks_an_outcome
from torch_klloss.distributions.simplify import peel, simplify, wrap
from torch_klloss.distributions.stated_supports import is_discrete
from torch_klloss.distributions.supports import contained, has_moving_support
from torch_klloss.distributions.tails import is_infinite
from torch_klloss.distributions.tensors import device_of, unvalidated
from torch_klloss.estimate import KLEstimate
from torch_klloss.methods.base import BaseMethod
from torch_klloss.methods.monte_carlo.chunks import Expectation, check_chunk_size
from torch_klloss.methods.monte_carlo.control_variate import estimate_with_surrogate
from torch_klloss.methods.monte_carlo.gradients import REPARAMETERISED
from torch_klloss.methods.monte_carlo.log_ratio import estimate_plain
from torch_klloss.methods.monte_carlo.mixed import MixedGradient, check_mixed, estimate_mixed
from torch_klloss.methods.monte_carlo.options import (
    SURROGATES,
    Gradient,
    Value,
    check_options,
    refuse_transforms,
    refuse_value,
)
from torch_klloss.methods.monte_carlo.plan import Plan, PreparedPair
from torch_klloss.numerics.arguments import check_integer
from torch_klloss.numerics.devices import scalar
from torch_klloss.numerics.dimensions import sum_last
from torch_klloss.rng import draw_seed, private_rng
from torch_klloss.samplers import IID, Antithetic, Sampler, Sobol, Stratified
from torch_klloss.samplers.components import mixture_of

__all__ = ["Gradient", "MonteCarlo", "Value"]


@dataclass(frozen=True)
class MonteCarlo(BaseMethod):
    """Estimate KL(q‖p) by the mean of log q(x) - log p(x) over samples x of q.

    The value is unbiased with variance Var_q[log q - log p] / S. A single value may be negative where the KL is small,
    and that is right: clamping it would bias it. Samples of q are already weighted by q; nothing is multiplied
    by a density. `value` names the form; ℓ = log q - log p and r = p/q:

    - "log_ratio": the mean of ℓ. Unbiased.
    - "entropy": -H(q) - mean log p, for q with a known entropy. Unbiased; better where q is much narrower than p, many
      times worse where q is near p.
    - "control_variate": for a q that is a Normal with independent coordinates. ∇log p is regressed on the base noise,
      coordinate by coordinate, which gives a quadratic whose mean is known; each half of the draws is corrected by the
      fit to the other half. Unbiased in value and gradient for every differentiable log p: a mixture, a flow, an energy
      network. It takes ∇log p at the draws ahead of the backward pass, so that it cannot be differentiated
      twice. `num_samples` must be even.
    - "taylor": the same with the second-order expansion of log p about the mean of q instead of a fit: one more
      evaluation and as many derivatives as q has coordinates. Unbiased.
    - "k2": the mean of ℓ²/2. **Biased** (by a fraction of a KL that is small, by multiples of one that is not), and
      therefore without a standard error.
    - "k3": the mean of r - 1 + ℓ. Unbiased where p's support is within q's, never negative. Its variance is
      **infinite** where q's tails are lighter than p's (zero-mean Normals: σ_p² ≥ 2σ_q²), which is common in
      a VAE. A Pareto tail is fitted to r: from a shape of 1/2 on, and below 25 draws, no standard error is reported,
      and above 0.7 a `HeavyTailWarning` is given.

    "k2" and "k3" change the number alone: the gradient is still the KL's.

    The gradient to p's parameters, of -E_q[log p], is unbiased with every `gradient`. To q's parameters:

    - "pathwise": through `rsample`. Unbiased.
    - "sticking_the_landing": pathwise without the score term, whose expectation is zero. Unbiased; its variance
      vanishes as q approaches p, and is up to five times the pathwise one far from it.
    - "mixed": both, and a regression on the scores of q, weighed parameter by parameter for the least variance; the
      coefficients come from other draws, so that it is unbiased. A `MixedGradient()` in its place keeps them from
      step to step. For independent draws of some families; it cannot be differentiated twice.
    - "score_function": (log q - log p) ∇ log q at samples that carry no gradient, less the mean of the other draws as
      a baseline from two samples on. Unbiased, for every q; the noisiest. The draws must be independent.
    - "none": zero.
    - "auto": "pathwise" where q has `rsample` and its draws carry a gradient to all parameters, else "score_function".

    If the support of q depends on its parameters (Uniform, Pareto), only "pathwise" is right, and the others are
    refused. If the support of a mixture's components does, all gradients but "none" are refused.

    A mixture q (MixtureSameFamily, also transformed, or on the inside of an Independent that p has too) is split:
    KL = Σ_k π_k E_k[log q - log p], with S draws from every component. How often a component is drawn adds no
    noise to value and gradient; they stay unbiased, "pathwise" only needs components with `rsample`, and
    "score_function" takes the score of the component that a point was drawn from.

    No standard error is reported (NaN) where log q - log p is known to have an infinite variance.

    Args:
        num_samples: S, how many points are drawn for every batch element, and for every component of a mixture.
        sampler: where the points come from; by default independent draws, `IID()`.
        gradient: how the gradient to q's parameters is estimated; a word, or a `MixedGradient`.
        value: the form of the estimate.
        chunk_size: the largest number of draws that are evaluated at once; None for all. Every chunk is evaluated again
            in the backward pass. Only these draws need memory at a time, and the result does not change.

    Raises:
        ValueError: for an unknown option, or a combination whose gradient would be wrong or undefined.

    References:
        *Sticking the landing: simple, lower-variance gradient estimators for variational inference* (Roeder, Wu and
        Duvenaud, 2017). *Buy 4 REINFORCE samples, get a baseline for free!* (Kool, van Hoof and Welling, 2019).
        *Approximating KL divergence* (Schulman, 2020), for k2 and k3. *Reducing reparameterization gradient variance*
        (Miller, Foti, D'Amour and Adams, 2017), for the Taylor surrogate.

    Examples:
        >>> import torch
        >>> from torch.distributions import Normal, StudentT
        >>> from torch_klloss.methods import MonteCarlo
        >>> generator = torch.Generator().manual_seed(0)
        >>> estimate = MonteCarlo(4096).estimate(Normal(0.0, 1.0), StudentT(4.0), generator)
        >>> low, high = estimate.interval(0.999)
        >>> bool(low < 0.04627 < high), estimate.dof
        (True, 4095)
        >>> MonteCarlo(16, value="control_variate").estimate(Normal(1.0, 1.0), Normal(0.0, 1.0)).value
        tensor(0.5000)
    """

    num_samples: int = 1
    _: KW_ONLY
    sampler: Sampler | None = None
    gradient: Gradient | MixedGradient = "auto"
    value: Value = "log_ratio"
    chunk_size: int | None = None
    name: ClassVar[str] = "monte_carlo"

    def __post_init__(self) -> None:
        if self.sampler is None:
            object.__setattr__(self, "sampler", IID())
        elif not callable(getattr(self.sampler, "draw", None)) or isinstance(self.sampler, type):
            raise TypeError(f"sampler must have draw(q, num_samples, *, differentiable), got {self.sampler!r}: IID().")
        check_integer("num_samples", self.num_samples)
        check_chunk_size(self.chunk_size)
        remembers = isinstance(self.gradient, MixedGradient)
        check_options(self._gradient_name, self.value, self.num_samples, self.chunk_size, remembers)

    def estimate_checked(
        self, q: Distribution, p: Distribution, batch_shape: torch.Size, generator: torch.Generator | None = None
    ) -> KLEstimate:
        """Return the estimate, of the broadcast batch shape, with its standard error (NaN where it is not known).

        Args:
            q: the distribution that is sampled.
            p: the other one.
            batch_shape: what their batch shapes broadcast to.
            generator: where the randomness comes from, which then leaves the global stream alone; by default the
                global stream. Processes that train together under one global seed draw the same noise; a generator
                kept by each, `torch.Generator().manual_seed(seed + rank)`, gives them their own.

        Raises:
            NotImplementedError: if q lacks what `gradient` and `value` need, or the gradient would be wrong for q or
                the sampler; or under `torch.func` and in forward mode, for options that take derivatives ahead of the
                backward pass ("control_variate", "taylor", "mixed").
            ValueError: if the shapes do not fit, or q is discrete and p continuous, or the reverse.
            TypeError: if q or p is not a distribution.
        """
        return self._estimate(q, p, batch_shape, generator, with_error=True)

    def value_checked(
        self,
        q: Distribution,
        p: Distribution,
        batch_shape: torch.Size,
        num_summed: int,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the value alone, summed over so many of its last dimensions; raises as `estimate_checked`."""
        with_error = self.value == "k3"  # whose warning is found on the way
        return sum_last(self._estimate(q, p, batch_shape, generator, with_error=with_error).value, num_summed)

    def _estimate(
        self,
        q: Distribution,
        p: Distribution,
        batch_shape: torch.Size,
        generator: torch.Generator | None,
        *,
        with_error: bool,
    ) -> KLEstimate:
        check_common_measure(q, p)
        given = q, p
        gradient = self._gradient_for(_inside(q, p))
        q, p, peeled = _simplified(q, p)
        has_error = with_error and self.num_samples > 1
        infinite_variance = is_infinite(*(given if peeled else (q, p)), power=2) if has_error else None
        inside = contained(q, p)
        # Expanded before it is drawn from: batch elements do not share their noise.
        shape = check_pair(q, p) if peeled else batch_shape
        q = unvalidated(expand_to(q, shape))
        source = nullcontext() if generator is None else private_rng(draw_seed(generator, device_of(q)), device_of(q))
        sampled = self._sample(PreparedPair(q, p, inside, peeled), gradient, source, with_error)
        value, std_error = sampled.value, sampled.std_error
        if inside is not None and inside is not True:
            inside = scalar(inside, value.device).expand(shape)
            value = torch.where(inside.flatten(-peeled).all(-1) if peeled else inside, value, math.inf)
        lacks = lacks_an_outcome(q, p)
        if lacks is not None:
            value = torch.where(lacks.flatten(-peeled).any(-1) if peeled else lacks, math.inf, value)
        if infinite_variance is not None and std_error is not None:
            std_error = torch.where(infinite_variance.to(std_error.device), math.nan, std_error)
        return KLEstimate(
            nan_outside(value, *given),
            exact=False,
            std_error=std_error,
            dof=sampled.dof,
            method=self.name,
            num_evaluations=sampled.num_points,
            skewness=sampled.skewness,
        )

    def supports(self, q: Distribution, p: Distribution) -> bool | None:
        """Return whether q has what `gradient` and `value` need.

        None where a draw is needed to decide: whether the points of a user's sampler are independent.
        """
        try:
            gradient = self._gradient_for(_inside(q, p))
        except NotImplementedError:
            return False
        return self._draws_are_independent() if gradient == "score_function" and self.num_samples > 1 else True

    @property
    def _gradient_name(self) -> Gradient:
        return "mixed" if isinstance(self.gradient, MixedGradient) else self.gradient

    def _sample(
        self, pair: PreparedPair, gradient: Gradient, source: AbstractContextManager[None], with_error: bool
    ) -> Expectation:
        automatic, sampler = self.gradient == "auto", cast(Sampler, self.sampler)
        plan = Plan(self.num_samples, sampler, gradient, self.value, self.chunk_size, automatic, with_error)
        if self.value not in SURROGATES and gradient != "mixed":
            return estimate_plain(pair, plan, source)
        if torch.is_inference_mode_enabled():  # these take derivatives of their own
            with torch.inference_mode(False), torch.no_grad():
                return self._with_derivatives(pair.without_inference_tensors(), plan, source)
        return self._with_derivatives(pair, plan, source)

    def _with_derivatives(self, pair: PreparedPair, plan: Plan, source: AbstractContextManager[None]) -> Expectation:
        if self.value in SURROGATES:
            return estimate_with_surrogate(pair, plan, source)
        state = self.gradient if isinstance(self.gradient, MixedGradient) else None
        return estimate_mixed(pair, plan, state, source)

    def _draws_are_independent(self) -> bool | None:
        kind = type(self.sampler)
        if kind in (IID, Antithetic):
            return kind is IID
        if isinstance(self.sampler, (Sobol, Stratified)) and kind in (Sobol, Stratified):
            return self.sampler.replicates == self.num_samples
        return None

    def _gradient_for(self, q: Distribution) -> Gradient:
        """Return the gradient, with "auto" resolved, or raise a NotImplementedError if it would be wrong for q."""
        gradient = self._gradient_name
        mixture = mixture_of(q)
        drawn = q if mixture is None else mixture.component_distribution
        # The points of a straight-through estimator are discrete, so that its rsample is not differentiable.
        has_path = drawn.has_rsample and not is_discrete(q)
        if gradient == "auto":
            gradient = "pathwise" if has_path else "score_function"
        if gradient in REPARAMETERISED and not has_path:
            raise NotImplementedError(
                f"MonteCarlo(gradient={gradient!r}) needs q.rsample, which {type_name(q)} lacks; use "
                "gradient='score_function', or AutoKL, which takes an exact route where there is one."
            )
        if gradient != "none" and mixture is not None and has_moving_support(q):
            raise NotImplementedError(
                f"MonteCarlo(gradient={gradient!r}) would be biased for {type_name(q)}, whose density jumps where the "
                "support of a component ends, which moves with its parameters; use gradient='none'."
            )
        if gradient in ("sticking_the_landing", "score_function", "mixed") and has_moving_support(q):
            raise NotImplementedError(
                f"MonteCarlo(gradient={gradient!r}) would be biased for {type_name(q)}, whose support moves with its "
                "parameters; use gradient='pathwise'."
            )
        if gradient == "mixed":
            check_mixed(q, cast(Sampler, self.sampler))
        refuse_value(self.value, q)
        refuse_transforms(gradient, self.value)
        return gradient


def _inside(q: Distribution, p: Distribution) -> Distribution:
    """Return the mixture that q is inside of an `Independent` that p has too; q itself if it is none."""
    inner = peel(q, p)[0]
    return q if mixture_of(inner) is None else inner


def _simplified(q: Distribution, p: Distribution) -> tuple[Distribution, Distribution, int]:
    """Return a simpler pair of the same KL, and how many of its dimensions are to be summed: those around a mixture."""
    inner_q, inner_p, peeled = simplify(q, p)
    if q.has_rsample and not inner_q.has_rsample:  # the gradient was decided for q as it is
        return q, p, 0
    if not peeled or mixture_of(inner_q) is not None:
        return inner_q, inner_p, peeled
    return wrap(inner_q, peeled), wrap(inner_p, peeled), 0
