"""Control variates: a quadratic part of log p is integrated, and only the rest is sampled.

q is a Normal with independent coordinates, x = μ + σ z. A quadratic h of them has a known expectation, so that

    KL = -H(q) - E_q[h] - E_q[log p - h]

holds for any h that does not depend on the points it is evaluated at, in value and in gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_klloss.numerics.dimensions import sum_after, sum_last
from torch_klloss.numerics.graph import leaves_of
from torch_klloss.numerics.once import differentiable_once

ONCE = (
    "MonteCarlo(value='control_variate') and gradient='mixed' take derivatives ahead of the backward pass, which "
    "cannot be differentiated again (create_graph=True); use value='log_ratio' with gradient='pathwise'."
)


@dataclass(frozen=True)
class Quadratic:
    """The quadratic Σⱼ aⱼ zⱼ + bⱼ zⱼ²/2 of z = (x - center) / scale; no gradient flows into it.

    All are `[*batch, *event]`.
    """

    center: Tensor
    scale: Tensor
    linear: Tensor
    quadratic: Tensor
    event_dims: int

    def at(self, x: Tensor) -> Tensor:
        """Return h(x), `[n, *batch]`."""
        z = (x - self.center) / self.scale
        return self._sum(self.linear * z + self.quadratic * z**2 / 2)

    def expectation(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Return the mean of h under a Normal, `[*batch]`."""
        mean, variance = (loc - self.center) / self.scale, (scale / self.scale) ** 2
        return self._sum(self.linear * mean + self.quadratic * (mean**2 + variance) / 2)

    def _sum(self, t: Tensor) -> Tensor:
        return sum_last(t, self.event_dims)


class ScoreRegression:
    """Regresses ∇log p on the noise, coordinate by coordinate, from draws that arrive in parts.

    Each of the two folds is fitted on its own draws; `fit` returns the fits swapped, so that no quadratic is evaluated
    at the points it was fitted to.

    Args:
        loc: the mean of q, `[2, *batch, *event]`: fold by fold.
        scale: its standard deviation.
        event_dims: how many dimensions make up an event.
    """

    def __init__(self, loc: Tensor, scale: Tensor, event_dims: int) -> None:
        self.center, self.scale, self.event_dims = loc.detach(), scale.detach(), event_dims
        self.num_points = 0
        zero = torch.zeros_like(self.center)
        self.sums = [zero] * 4

    def add(self, x: Tensor, score: Tensor) -> None:
        """Add points, with ∇log p there."""
        z = (x.detach() - self.center) / self.scale
        u = torch.where(score.isfinite(), score, 0.0) * self.scale
        self.num_points += len(z)
        self.sums = [total + part.sum(0) for total, part in zip(self.sums, (z, z * z, u, u * z), strict=True)]

    def fit(self) -> Quadratic:
        """Return for each fold the quadratic fitted to the other: intercept, and slope from four draws on."""
        mean_z, mean_zz, mean_u, mean_uz = (total / self.num_points for total in self.sums)
        slope = torch.zeros_like(mean_z)
        if self.num_points >= 4:  # with fewer, the variance of a slope is infinite
            spread = mean_zz - mean_z**2
            slope = torch.where(spread > 0, (mean_uz - mean_u * mean_z) / spread, 0.0)
        intercept = mean_u - slope * mean_z
        return Quadratic(self.center, self.scale, intercept.flip(0), slope.flip(0), self.event_dims)


def taylor(log_prob: Any, loc: Tensor, scale: Tensor, event_dims: int) -> Quadratic:
    """Return the second-order expansion of log p about the mean of q, without mixed derivatives."""
    with torch.enable_grad():
        center = loc.detach().clone().requires_grad_()
        score = _derivative(log_prob(center.unsqueeze(0)).sum(), center, create_graph=True)
        columns = score.flatten(-event_dims).unbind(-1) if event_dims else (score,)
        curvature = [_own_derivative(column, center, j, event_dims) for j, column in enumerate(columns)]
    diagonal = torch.stack(curvature, -1).reshape(center.shape)
    center, scale = center.detach(), scale.detach()
    return Quadratic(center, scale, score.detach() * scale, diagonal * scale**2, event_dims)


def _own_derivative(column: Tensor, center: Tensor, j: int, event_dims: int) -> Tensor:
    row = _derivative(column.sum(), center)
    return row.flatten(-event_dims)[..., j] if event_dims else row


def _derivative(value: Tensor, x: Tensor, *, create_graph: bool = False) -> Tensor:
    """Return dvalue/dx, zeros where value does not depend on x, as a constant or linear log p may not."""
    if not value.requires_grad:
        return torch.zeros_like(x)
    (found,) = torch.autograd.grad(
        value, x, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return found


def with_score(log_prob: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p(x) and ∇log p(x) from one pass through log p and one back.

    The gradient to x is this score, without another pass through log p. A second pass back follows only if log p has
    parameters of its own that require a gradient.

    Args:
        log_prob: the function; its rows are independent.
        x: points `[n, *batch, *event]`.
    """
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        value = log_prob(leaf)
        score = _derivative(value.sum(), leaf)
    if not (torch.is_grad_enabled() and reaches_others(value, [leaf])):
        value = value.detach()
    elif x.requires_grad:
        value = differentiable_once(value, x, ONCE)
    if x.requires_grad:
        value = value + sum_after(zero_with_gradient(x, score), value.dim())
    return value, score


def reaches_others(t: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Return whether t depends on any other leaf than these."""
    own = {id(leaf) for leaf in leaves}
    return any(id(leaf) not in own for leaf in leaves_of(t))


class _OnceDifferentiable(torch.autograd.Function):
    """The identity, with an error if its backward pass is to be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise NotImplementedError(ONCE)
        return grad


def zero_with_gradient(t: Tensor, gradient: Tensor) -> Tensor:
    """Return zeros of the shape of t, with this gradient to t; it is 0 where it is not finite."""
    return (_OnceDifferentiable.apply(t) - t.detach()) * torch.where(gradient.isfinite(), gradient, 0.0)
