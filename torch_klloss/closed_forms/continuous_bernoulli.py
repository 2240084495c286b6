"""ContinuousBernoulli‖ContinuousBernoulli, from the probabilities or the logits, whichever were given.

With t half the logit, the density is exp(2 t x) t / (exp(t) sinh t) on [0, 1], an exponential family: the KL is the
Bregman divergence of L(t) = log(sinh(t)/t).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import ContinuousBernoulli

from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.distributions.given import both_as_given
from torch_klloss.numerics.custom_gradient import custom_gradient
from torch_klloss.numerics.elementary import at_least, at_most, common_dtype, horner, isd_from_gap, log_ratio
from torch_klloss.numerics.exponentials import e2, expm1

_SMALL = 0.5
# L(t) = F(t²): the coefficients of F from t² on, 4^k B_2k / (2k (2k)!); good to 1e-17 for |t| ≤ ½.
_F = (
    1 / 6,
    -1 / 180,
    1 / 2835,
    -1 / 37800,
    1 / 467775,
    -691 / 3831077250,
    2 / 127702575,
    -3617 / 2605132530000,
    43867 / 350813659321125,
    -174611 / 15313294652906250,
    155366 / 147926426347074375,
)
_SLOPE_OF_F = tuple(k * c for k, c in enumerate(_F, 1))


@register_kl(ContinuousBernoulli, ContinuousBernoulli)
def _continuous_bernoulli_continuous_bernoulli(q: ContinuousBernoulli, p: ContinuousBernoulli) -> Tensor:
    """L(t_p) - L(t_q) - L'(t_q) (t_p - t_q), with t half the logit and L(t) = log(sinh(t)/t).

    Computed in float64, whatever the dtype of the parameters. Logits are used where they were given, since torch clamps
    the `probs`.

    References:
        *The continuous Bernoulli: fixing a pervasive error in variational autoencoders* (Loaiza-Ganem and Cunningham,
        2019), for the density.
    """
    q_param, p_param, given = both_as_given(q, p)
    if all(given):
        return _kl_of_probs(q_param, p_param)
    value = _kl_of_logits(logits_of(q_param, given.q_is_probs), logits_of(p_param, given.p_is_probs))
    return value.to(common_dtype(q_param, p_param))


def logits_of(param: Tensor, is_probs: bool) -> Tensor:
    """Return the logits as given, or of probabilities in float64."""
    return _logit(param.double()) if is_probs else param


def _logit(probs: Tensor) -> Tensor:
    return log_ratio(probs, 1 - probs, 2 * probs - 1)


def _halves_of_probs(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, p = torch.broadcast_tensors(q.double(), p.double())
    gap = log_ratio(p * (1 - q), q * (1 - p), p - q)
    return gap / 2, _logit(p) / 2, _logit(q) / 2


def _halves_of_logits(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, p = torch.broadcast_tensors(q.double(), p.double())
    return (p - q) / 2, p / 2, q / 2


def _partials_of_probs(needs: Sequence[bool], q: Tensor, p: Tensor) -> Sequence[Tensor | None]:
    by_q, by_p = _partials_by_logits(needs, *_halves_of_probs(q, p))
    q, p = q.double(), p.double()
    return by_q if by_q is None else by_q / (q * (1 - q)), by_p if by_p is None else by_p / (p * (1 - p))


@custom_gradient(_partials_of_probs)
def _kl_of_probs(q: Tensor, p: Tensor) -> Tensor:
    return _divergence(*_halves_of_probs(q, p)).to(common_dtype(q, p))


@custom_gradient(lambda needs, q, p: _partials_by_logits(needs, *_halves_of_logits(q, p)))
def _kl_of_logits(q: Tensor, p: Tensor) -> Tensor:
    return _divergence(*_halves_of_logits(q, p)).to(common_dtype(q, p))


def _partials_by_logits(needs: Sequence[bool], gap: Tensor, p: Tensor, q: Tensor) -> Sequence[Tensor | None]:
    by_q = -gap * _curvature(q.abs()) / 2 if needs[0] else None
    by_p = _slope_difference(gap, p, q) / 2 if needs[1] else None
    return by_q, by_p


def _regions(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return where both arguments are small, and where they are not but lie near one another; q ≥ 0."""
    small = torch.maximum(p.abs(), q) < _SMALL
    return small, ~small & (p > q / 4) & (p < 4 * q)


def _divergence(gap: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Return the Bregman divergence of L at (p, q), given gap = p - q as exactly as it is known."""
    flip = torch.where(q < 0, -1.0, 1.0).to(q.dtype)  # L is even
    gap, p, q = flip * gap, flip * p, flip * q
    is_small, is_near = _regions(p, q)
    small = _small_divergence(*(torch.where(is_small, t, 0.0) for t in (gap, p, q)))
    near = _near_divergence(torch.where(is_near, gap, 0.0), *(torch.where(is_near, t, 1.0) for t in (p, q)))
    far = (p.abs() - p) + _log_excess(p.abs()) - _log_excess(q) + _slope_deficit(q) * gap
    return torch.where(is_small, small, torch.where(is_near, near, far))


def _small_divergence(gap: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Return gap² (F'(q²) + (p + q)² F[p², q², q²]), the last by Horner's rule for divided differences."""
    at_p, at_q = p * p, q * q
    value = slope = second = torch.zeros_like(q)
    for c in reversed((0.0, *_F)):
        second = second * at_p + slope
        slope = slope * at_q + value
        value = value * at_q + c
    return gap * gap * (slope + (p + q).square() * second)


def _near_divergence(gap: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Return isd(p, q) less the Bregman divergence of -log(sinh), for p, q > 0."""
    drop = _exp_difference(gap, p, q)
    decay_q = torch.exp(-2 * q)
    is_close = gap.abs() < 0.5
    rest = torch.where(is_close, decay_q * e2(torch.where(is_close, -2 * gap, 0.0)), drop + 2 * gap * decay_q)
    below_p, below_q = -expm1(-2 * p), -expm1(-2 * q)
    return isd_from_gap(gap, p, q) - isd_from_gap(-drop, below_p, below_q) - rest / below_q


def _exp_difference(gap: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Return exp(-2p) - exp(-2q)."""
    decay_q = torch.exp(-2 * q)
    is_close = gap.abs() < 0.5
    return torch.where(is_close, decay_q * expm1(torch.where(is_close, -2 * gap, 0.0)), torch.exp(-2 * p) - decay_q)


def _log_excess(t: Tensor) -> Tensor:
    """Return L(t) - t for t ≥ 0."""
    small, large = at_most(t, _SMALL), at_least(t, _SMALL)
    series = small.square() * horner(small.square(), _F) - small
    return torch.where(t < _SMALL, series, torch.log(-expm1(-2 * large) / (2 * large)))


def _slope_deficit(t: Tensor) -> Tensor:
    """Return 1 - L'(t) for t ≥ 0."""
    small, large = at_most(t, _SMALL), at_least(t, _SMALL)
    series = 1 - 2 * small * horner(small.square(), _SLOPE_OF_F)
    closed = large.reciprocal() + 2 * torch.exp(-2 * large) / expm1(-2 * large)
    return torch.where(t < _SMALL, series, closed)


def _slope_difference(gap: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Return L'(p) - L'(q)."""
    flip = torch.where(q < 0, -1.0, 1.0).to(q.dtype)
    gap, p, q = flip * gap, flip * p, flip * q
    is_small, is_near = _regions(p, q)
    small = _small_slope_difference(*(torch.where(is_small, t, 0.0) for t in (gap, p, q)))
    near = _near_slope_difference(torch.where(is_near, gap, 0.0), *(torch.where(is_near, t, 1.0) for t in (p, q)))
    sign = torch.where(p < 0, -1.0, 1.0).to(p.dtype)
    far = (sign - 1) + _slope_deficit(q) - sign * _slope_deficit(p.abs())
    return flip * torch.where(is_small, small, torch.where(is_near, near, far))


def _small_slope_difference(gap: Tensor, p: Tensor, q: Tensor) -> Tensor:
    at_p, at_q = p * p, q * q
    slope = second = torch.zeros_like(q)
    for c in reversed(_SLOPE_OF_F):
        second = second * at_p + slope
        slope = slope * at_q + c
    return 2 * gap * (slope + p * (p + q) * second)


def _near_slope_difference(gap: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return gap / (p * q) + 2 * _exp_difference(gap, p, q) / (expm1(-2 * p) * expm1(-2 * q))


def _curvature(t: Tensor) -> Tensor:
    """Return L''(t) for t ≥ 0: 1/t² - 1/sinh(t)²."""
    small, large = at_most(t, _SMALL), at_least(t, _SMALL)
    series = horner(small.square(), tuple(2 * (2 * k - 1) * c for k, c in enumerate(_SLOPE_OF_F, 1)))
    closed = large.reciprocal().square() - 4 * torch.exp(-2 * large) / expm1(-2 * large).square()
    return torch.where(t < _SMALL, series, closed)
