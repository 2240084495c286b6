"""Logistic‖Logistic of equal scale, and the relaxed Bernoulli of equal temperature, a Logistic behind a sigmoid."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli

from torch_klloss.closed_forms.alike import where_alike
from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.closed_forms.trials import log_odds
from torch_klloss.distributions.given import Given, both_as_given
from torch_klloss.distributions.logistic import Logistic
from torch_klloss.numerics.custom_gradient import custom_gradient
from torch_klloss.numerics.elementary import at_least, at_most, common_dtype, log_ratio, within

_LEVELS = tuple(range(25, 3, -2))  # of the continued fraction of coth, good to 1e-17 for t ≤ 2
_NEAR = 2.0


@register_kl(Logistic, Logistic)
def _logistic_logistic(q: Logistic, p: Logistic) -> Tensor:
    """2 (t coth t - 1) with t = (μq - μp)/(2s).

    Both scales receive a gradient too. For unequal scales there is no closed form, hence no second derivative by them;
    under `torch.compile` and `torch.func`, where values cannot be read, such an element is NaN.

    Raises:
        NotImplementedError: if the scales differ somewhere.
    """
    q_loc, q_scale, p_loc, p_scale = (t.double() for t in (q.loc, q.scale, p.loc, p.scale))
    value = _kl((q_loc - p_loc) / p_scale, (q_scale - p_scale) / p_scale)
    value = where_alike(q_scale, p_scale, value, "scales")
    return value.to(common_dtype(q.loc, q.scale, p.loc, p.scale))


@register_kl(LogitRelaxedBernoulli, LogitRelaxedBernoulli)
def _relaxed_relaxed(q: LogitRelaxedBernoulli, p: LogitRelaxedBernoulli) -> Tensor:
    """The KL of two Logistics of the location logit/temperature and the scale 1/temperature.

    Both temperatures receive a gradient too, as the scales of Logistics do.

    Raises:
        NotImplementedError: if the temperatures differ somewhere.

    References:
        *The concrete distribution* (Maddison, Mnih and Teh, 2017), appendix B, for the Logistic.
    """
    q_param, p_param, given = both_as_given(q, p)
    q_temperature, p_temperature = q.temperature.double(), p.temperature.double()
    excess = (p_temperature - q_temperature) / q_temperature  # of q's scale over p's
    d, q_odds = _gap_of_log_odds(q_param, p_param, given)
    value = where_alike(q_temperature, p_temperature, _kl(d + q_odds * excess, excess), "temperatures")
    return value.to(common_dtype(q.temperature, q_param, p.temperature, p_param))


def _kl(d: Tensor, excess: Tensor) -> Tensor:
    """Return 2 (t coth t - 1) of t = d/2, with a derivative by the excess of q's scale, which is 0."""
    return _shift_kl(d) + excess * _by_scale(d)


@custom_gradient(lambda needs, d: (_slope(d),))
def _shift_kl(d: Tensor) -> Tensor:
    t = d / 2
    near = t.clamp(-_NEAR, _NEAR)
    far = at_least(t.abs(), _NEAR)
    return 2 * torch.where(t.abs() < _NEAR, near * near * _fraction(near), far / torch.tanh(far) - 1)


def _slope(d: Tensor) -> Tensor:
    """Return coth t - t/sinh² t."""
    t = d / 2
    near = t.clamp(-_NEAR, _NEAR)
    square, c = near * near, _fraction(near)
    far = torch.where(t < 0, at_most(t, -_NEAR), at_least(t, _NEAR))
    slope = 1 / torch.tanh(far) - far / torch.sinh(within(far, -350.0, 350.0)).square()
    return torch.where(t.abs() < _NEAR, near * (1 - (1 + square * c) * c), slope)


def _by_scale(d: Tensor) -> Tensor:
    """Return t²/sinh² t - 1."""
    t = d / 2
    near = t.clamp(-_NEAR, _NEAR)
    square = near * near
    c = _fraction(near)
    far = within(t.abs(), _NEAR, 350.0)
    return torch.where(t.abs() < _NEAR, square * (2 * c + square * c * c - 1), (far / torch.sinh(far)).square() - 1)


def _fraction(t: Tensor) -> Tensor:
    """Return (t coth t - 1)/t², the continued fraction 1/(3 + t²/(5 + t²/(7 + …))), whose terms are all positive."""
    square = t * t
    tail = torch.full_like(t, _LEVELS[0])
    for level in _LEVELS[1:]:
        tail = level + square / tail
    return 1 / (3 + square / tail)


def _gap_of_log_odds(q_param: Tensor, p_param: Tensor, given: Given) -> tuple[Tensor, Tensor]:
    """Return the difference of the log-odds, and q's; probabilities are kept from 0 and 1, as torch keeps them."""
    q, p = (_inside(t) if is_probs else t for t, is_probs in zip((q_param, p_param), given, strict=True))
    q, p = q.double(), p.double()
    q_odds, p_odds = log_odds(q, given.q_is_probs), log_odds(p, given.p_is_probs)
    if not (given.q_is_probs and given.p_is_probs):
        return q_odds - p_odds, q_odds
    return log_ratio(q, p, q - p) - log_ratio(1 - q, 1 - p, p - q), q_odds


def _inside(probs: Tensor) -> Tensor:
    eps = torch.finfo(probs.dtype).eps
    return within(probs, eps, 1 - eps)
