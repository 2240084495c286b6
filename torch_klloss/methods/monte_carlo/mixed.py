"""The gradient that mixes pathwise, sticking the landing and score regression, parameter by parameter.

Each coordinate of the pathwise gradient is regressed on the scores of q's parameters there, whose expectation is zero.
Pathwise is the coefficient zero, sticking the landing the coefficient one on the parameter's own score, and the control
variates of a regression of ∇log p on the noise of a location-scale family are combinations of its scores: the least
squares fit is at least as good as each, up to the noise of its coefficients. The coefficients come from other draws
than the gradient that they correct, which leaves it unbiased.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributions as dist
from torch import Tensor, nn
from torch.distributions import Distribution

from torch_klloss.distributions.densities import log_density_within
from torch_klloss.distributions.located import Located
from torch_klloss.distributions.maps import fixed
from torch_klloss.distributions.tensors import copy_with, tensors_of
from torch_klloss.methods.monte_carlo.chunks import Expectation
from torch_klloss.methods.monte_carlo.gradients import Draw
from torch_klloss.methods.monte_carlo.options import HELD_OUT
from torch_klloss.methods.monte_carlo.plan import Plan, PreparedPair
from torch_klloss.methods.monte_carlo.rounded_draws import RoundedDraws
from torch_klloss.methods.monte_carlo.surrogates import ONCE, reaches_others, zero_with_gradient
from torch_klloss.numerics.arguments import call_of, check_number
from torch_klloss.numerics.devices import can_be_read
from torch_klloss.numerics.dimensions import sum_after, sum_last
from torch_klloss.numerics.once import differentiable_once
from torch_klloss.samplers import IID, Points, Sampler
from torch_klloss.samplers.components import mixture_of, prepare_by_component
from torch_klloss.samplers.origins import prepare_located

# Families whose density is normalised for all values of their stored tensors, so that every score has mean zero.
_FREE = (
    dist.Normal,
    dist.Laplace,
    dist.Cauchy,
    dist.StudentT,
    dist.Gamma,
    dist.Exponential,
    dist.Beta,
    dist.Dirichlet,
    dist.MultivariateNormal,
)


class MixedGradient(nn.Module):
    """Keeps the coefficients of gradient="mixed" from step to step: `MonteCarloKL(gradient=MixedGradient())`.

    A step uses the coefficients of the steps before it, which are independent of its draws: its gradient is unbiased.
    The first step fits them on the half of its draws that it does not correct. The state consists of moments of
    gradient and scores, averaged over the first batch dimension, one for each parameter of q; it is part of the
    `state_dict`. It is updated in training mode alone, and only where a gradient is taken.

    Args:
        decay: the share of the state that is kept at every step; it averages over about 1/(1 - decay) steps.

    Raises:
        ValueError: if `decay` is not between 0 and 1.

    Examples:
        >>> import torch
        >>> from torch.distributions import Normal, StudentT
        >>> from torch_klloss import MonteCarloKL
        >>> from torch_klloss.methods.monte_carlo.mixed import MixedGradient
        >>> loss = MonteCarloKL(num_samples=8, gradient=MixedGradient())
        >>> loss(Normal(torch.zeros(16, 4, requires_grad=True), 1.0), StudentT(4.0)).backward()
        >>> list(loss.state_dict())
        ['mixture._extra_state']
    """

    def __init__(self, decay: float = 0.95) -> None:
        super().__init__()
        check_number("decay", decay)
        if not 0 < decay < 1:
            raise ValueError(f"decay must lie strictly between 0 and 1, got {decay!r}.")
        self.decay = decay
        self.moments: list[Tensor] = []

    def get_extra_state(self) -> list[Tensor]:
        """Return the moments, for `state_dict`."""
        return self.moments

    def set_extra_state(self, state: list[Tensor]) -> None:
        """Take the moments from a `state_dict`."""
        self.moments = list(state)

    def __repr__(self) -> str:
        return call_of(type(self), {"decay": self.decay})

    def recall(self, shapes: list[torch.Size]) -> list[Tensor] | None:
        """Return the moments of earlier steps; None if there are none, or q had parameters of other shapes."""
        return self.moments if [m.shape for m in self.moments] == shapes else None

    def update(self, moments: list[Tensor]) -> None:
        """Average the moments of a step into the state, if all of them are finite."""
        if not self.training or not moments:
            return
        earlier = self.recall([m.shape for m in moments]) or [torch.zeros_like(m) for m in moments]
        is_finite = torch.stack([m.isfinite().all() for m in moments]).all()
        if can_be_read(is_finite) and not is_finite:
            return
        self.moments = [
            torch.where(is_finite, self.decay * old.to(new) + new, old.to(new))
            for old, new in zip(earlier, moments, strict=True)
        ]


def check_mixed(q: Distribution, sampler: Sampler) -> None:
    """Raise a NotImplementedError if draws depend on one another, or scores are not known to have mean zero."""
    if not isinstance(sampler, IID):
        raise NotImplementedError(
            f"MonteCarlo(gradient='mixed') fits its coefficients to independent draws, and the draws of {sampler!r} "
            "are not; use sampler=IID(), or gradient='pathwise' or 'sticking_the_landing'."
        )
    base: Any = q
    while isinstance(base, (dist.Independent, dist.TransformedDistribution, dist.MixtureSameFamily)):
        mixture = isinstance(base, dist.MixtureSameFamily)
        if any(t.requires_grad for part in getattr(base, "transforms", ()) for t in tensors_of(part)):
            break
        base = getattr(base, "component_distribution" if mixture else "base_dist")
    if not isinstance(base, _FREE):
        raise NotImplementedError(
            f"MonteCarlo(gradient='mixed') knows the scores of {', '.join(f.__name__ for f in _FREE)} and of mixtures "
            f"of these, got {type(q).__name__}; use gradient='pathwise' or 'sticking_the_landing'."
        )


def estimate_mixed(
    pair: PreparedPair, plan: Plan, state: MixedGradient | None, source: AbstractContextManager[None]
) -> Expectation:
    """Return the mean of log q - log p, with the mixed gradient.

    Args:
        pair: the pair; its q has passed `check_mixed`.
        plan: the options.
        state: the moments of earlier steps.
        source: the context in which draws come from the right random stream.
    """
    rounded = RoundedDraws(pair.q)
    with source:
        log_ratio, carrier = _sample(pair, plan, state, rounded)
    weight = log_ratio.new_full((), 1 / plan.num_samples)
    points = Points(log_ratio, weight, num_replicates=plan.num_samples)
    value = points.expectation(log_ratio, pair.peeled) + sum_last(carrier, pair.peeled)
    components = 1 if (mixture := mixture_of(pair.q)) is None else mixture.component_distribution.batch_shape[-1]
    num_points = plan.num_samples * components
    std_error = rounded.trusted(points.std_error(log_ratio, pair.peeled), num_points, pair.peeled)
    skewness = points.skewness(log_ratio, pair.peeled)
    return Expectation(value, std_error, plan.num_samples - 1, skewness, num_points)


def _sample(
    pair: PreparedPair, plan: Plan, state: MixedGradient | None, rounded: RoundedDraws
) -> tuple[Tensor, Tensor]:
    """Return the log-ratio at every draw, and a term of value zero through which q's parameters get their gradient.

    The log-ratios are `[S, *batch]`, the mean over its components for a mixture, and carry a gradient to p alone; the
    term is `[*batch]`.
    """
    rows = pair.q.expand(torch.Size((plan.num_samples, *pair.q.batch_shape)))  # a gradient for every draw
    shape = rows.batch_shape
    own = {id(t): t for t in tensors_of(rows) if t.is_floating_point() and t.shape[: len(shape)] == shape}
    leaves = {key: t.detach().requires_grad_() for key, t in own.items()}
    with torch.enable_grad():
        copy = copy_with(rows, lambda t, *_: leaves.get(id(t), t))
        log_ratio, log_score, x = _terms(copy, pair, plan)
        rounded.see(0, x, draw_dims=2)
        wrt = list(leaves.values())
        grads, scores = _grads(log_ratio, wrt), _grads(log_score, wrt)
    if not (torch.is_grad_enabled() and reaches_others(log_ratio, wrt)):
        log_ratio = log_ratio.detach()
    carrier = torch.zeros_like(log_ratio[0])
    if torch.is_grad_enabled():
        for t, grad in zip(own.values(), _corrected(grads, scores, state, carrier.dim()), strict=True):
            if t.requires_grad:
                log_ratio = differentiable_once(log_ratio, t, ONCE) if log_ratio.requires_grad else log_ratio
                carrier = carrier + sum_after(zero_with_gradient(t, grad).mean(0), carrier.dim())
    return log_ratio, carrier


def _terms(q: Distribution, pair: PreparedPair, plan: Plan) -> tuple[Tensor, Tensor, Located]:
    """Return the log-ratio at a draw of every row, log q at the same point, which is fixed, and the point.

    The first two are `[S, *batch]`.
    """
    if mixture_of(q) is None:
        draw = Draw(*prepare_located(plan.sampler, q, 1, differentiable=True).part(0, 1))
    else:
        drawn = prepare_by_component(plan.sampler, q, 1, differentiable=True).part(0, 1)
        draw = Draw(drawn.points, drawn.x, drawn)
    x, weights = draw.x, draw.points.weights
    log_q = log_density_within(q, x)
    if not draw.has_path(q, log_q):
        plan.gradient_without_path(q)
    log_ratio = (weights * (log_q - pair.log_p(x))).sum(0)
    return log_ratio, (weights.detach() * log_density_within(q, fixed(x))).sum(0), x


def _grads(rows: Tensor, wrt: list[Tensor]) -> list[Tensor]:
    if not wrt:  # a class that keeps its parameters elsewhere
        return []
    return list(torch.autograd.grad(rows.sum(), wrt, retain_graph=True, allow_unused=True, materialize_grads=True))


def _corrected(grads: list[Tensor], scores: list[Tensor], state: MixedGradient | None, batch_dims: int) -> list[Tensor]:
    """Return the gradients `[S, *batch, *rest]` less their scores times coefficients from other draws."""
    controls = [torch.stack([c, *(s for s in scores if s is not c and s.shape == c.shape)], -1) for c in scores]
    pooled = batch_dims > 0
    moments = [_moments(g, c, pooled) for g, c in zip(grads, controls, strict=True)]
    earlier = None if state is None else state.recall([m.shape for m in moments])
    if state is not None:
        state.update(moments)
    if earlier is not None:
        return [g - _predicted(c, m.to(g), pooled) for g, c, m in zip(grads, controls, earlier, strict=True)]
    if not grads or len(grads[0]) < HELD_OUT:
        return grads
    half = len(grads[0]) // 2
    return [_held_out(g, c, half, pooled) for g, c in zip(grads, controls, strict=True)]


def _held_out(grad: Tensor, controls: Tensor, half: int, pooled: bool) -> Tensor:
    """Correct either half of the draws by coefficients from the other one."""
    parts = [(grad[:half], controls[:half]), (grad[half:], controls[half:])]
    fits = [_moments(*part, pooled) for part in reversed(parts)]
    return torch.cat([g - _predicted(c, fit, pooled) for (g, c), fit in zip(parts, fits, strict=True)])


def _moments(grad: Tensor, controls: Tensor, pooled: bool) -> Tensor:
    """Return Cov[c, c] and Cov[c, g] side by side, `[*rest, m, m + 1]`: over the draws and the first batch dimension.

    Both are centred alike, although the mean of c is known: a gradient that is nearly a combination of scores then has
    nearly the coefficients of that combination.
    """
    together = torch.cat([controls, grad.unsqueeze(-1)], -1)
    rounding = 8 * torch.finfo(grad.dtype).eps * together.abs().amax(0)
    together = together - together.mean(0)
    # A difference within rounding explains nothing.
    together = torch.where(together.abs() <= rounding, 0.0, together)
    return (together[..., :-1].unsqueeze(-1) * together.unsqueeze(-2)).mean((0, 1) if pooled else 0)


def _predicted(controls: Tensor, moments: Tensor, pooled: bool) -> Tensor:
    """Return the controls times their least-squares coefficients."""
    gram, cross = moments[..., :-1], moments[..., -1:]
    variance = gram.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(variance > 0, variance.rsqrt(), 0.0)
    # Scaled to ones on the diagonal; the ridge decides where scores coincide or vanish.
    gram = gram * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    ridge = (
        gram.shape[-1]
        * torch.finfo(gram.dtype).eps ** 0.5
        * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    )
    coefficients = torch.linalg.solve(gram + ridge, cross * scale.unsqueeze(-1)).squeeze(-1) * scale
    coefficients = torch.where(coefficients.isfinite(), coefficients, 0.0)
    return (controls * (coefficients.unsqueeze(0) if pooled else coefficients)).sum(-1)
