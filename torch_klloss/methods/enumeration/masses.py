"""Probabilities of the points of a discrete distribution, accurate to float64, and the terms of a KL.

torch's `log_prob` clamps probabilities, and takes differences of lgammas that agree in most of their digits. Here the
parameter is used as given, and a large count is compared with its mean before anything is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Distribution,
    Geometric,
    Independent,
    MixtureSameFamily,
    Multinomial,
    NegativeBinomial,
    OneHotCategorical,
    Poisson,
    TransformedDistribution,
)
from torch.nn.functional import logsigmoid

from torch_klloss.distributions.densities import log_density
from torch_klloss.distributions.given import as_given
from torch_klloss.numerics.devices import scalar
from torch_klloss.numerics.elementary import at_least, at_most, horner, x_minus_log1p
from torch_klloss.numerics.exponentials import e2

# The logarithm of zero in products with counts, which may be zero themselves.
_LOG_ZERO = -1e300
# The series of stirling_error(x) in 1/x², without the leading 1/x; good to 1e-16 from x = 10 on.
_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156)
_SNAP = 2.0**-30  # how far from a whole number the transforms may move a count
_BOUND = 645.0  # stands for log p/q in a derivative where q is zero; the closed forms have the same


class Masses(NamedTuple):
    """Probabilities of points and their logarithms, `[n, *batch]` in float64.

    Both carry the same gradient, except where the probability is exactly zero: there `log` is -inf, without gradient,
    and `value` is still differentiable, as for a probability that is a parameter itself.
    """

    value: Tensor
    log: Tensor


def masses(d: Distribution, x: Tensor) -> Masses:
    """Return the probabilities that d gives to the points x `[n, *batch, *event]`; zero outside its support.

    torch's families are computed from their parameters, without a clamp; other classes, and subclasses that override
    `log_prob`, by their `log_prob`.
    """
    for cls, rule in _RULES.items():
        if isinstance(d, cls) and type(d).log_prob is cls.log_prob:
            return rule(d, x)
    log = _log_prob(d, x).double()
    return Masses(log.exp(), log)


def _log_prob(d: Distribution, x: Tensor) -> Tensor:
    """Return log d(x) of a class that has its own.

    Raises:
        NotImplementedError: if it cannot evaluate the points, as one whose draws have another form than its parent's.
    """
    try:
        return log_density(d, x, None)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise NotImplementedError(
            f"Enumeration cannot evaluate {type(d).__name__}.log_prob at the points of its support, of shape "
            f"{tuple(x.shape)}: {type(error).__name__}: {error} Use MonteCarloKL, or register a closed form."
        ) from error


def has_masses(d: Distribution) -> bool:
    """Return whether the probabilities of d come from its parameters, so that they are known to sum to one."""
    if not any(isinstance(d, cls) and type(d).log_prob is cls.log_prob for cls in _RULES):
        return False
    parts = getattr(d, "base_dist", None), getattr(d, "component_distribution", None)
    return all(has_masses(part) for part in parts if part is not None)


def kl_terms(q: Masses, p: Masses) -> Tensor:
    """Return q log(q/p) - q + p ≥ 0, point by point; inf where only p is zero.

    Their sum is the KL if q and p both sum to one over the points. In this form, and with the difference of the
    logarithms near equality, an error of the logarithms enters squared.
    """
    q_is_zero, p_is_zero = q.log == -math.inf, p.log == -math.inf
    missed, either = p_is_zero & ~q_is_zero, q_is_zero | p_is_zero
    z = torch.where(either, 0.0, p.log) - torch.where(either, 0.0, q.log)
    z = torch.where(q_is_zero & ~p_is_zero, _BOUND, z)
    near = q.value * e2(z.clamp(-1, 1))
    terms = torch.where(z.abs() < 1, torch.where(q_is_zero, p.value - q.value, near), p.value - q.value - q.value * z)
    return torch.where(missed, math.inf, terms)


def zero_gradient_where_infinite(kl: Tensor) -> Tensor:
    """Return the KL with a gradient of zero where it is infinite."""
    return torch.where(kl == math.inf, math.inf, kl)


class _Odds(NamedTuple):
    """Probabilities of success and failure, and their logarithms."""

    success: Tensor
    failure: Tensor
    log_success: Tensor
    log_failure: Tensor


def _odds(d: Distribution) -> _Odds:
    param, is_probs = as_given(d)
    param = param.double()
    if is_probs:
        return _Odds(param, 1 - param, _log(param), _log1m(param))
    logs = logsigmoid(param), logsigmoid(-param)
    return _Odds(torch.sigmoid(param), torch.sigmoid(-param), *(log.clamp_min(_LOG_ZERO) for log in logs))


def _log(x: Tensor) -> Tensor:
    return torch.where(x == 0, _LOG_ZERO, torch.where(x == 0, 1.0, x).log())


def _log1m(x: Tensor) -> Tensor:
    return torch.where(x == 1, _LOG_ZERO, torch.log1p(-torch.where(x == 1, 0.0, x)))


def _count(x: Tensor, most: Tensor | float = math.inf) -> tuple[Tensor, Tensor]:
    """Return where x is one of 0, 1, …, most, and x with 0 elsewhere."""
    inside = (x >= 0) & (x <= most) & (x == x.floor())
    return inside, torch.where(inside, x, 0.0)


def _finish(log: Tensor, inside: Tensor, value: Tensor) -> Masses:
    """Return masses with zeros outside the support, and -inf where `log` stands for the logarithm of zero."""
    is_zero = ~inside | (log < _LOG_ZERO / 1e10)
    return Masses(torch.where(inside, value, 0.0), torch.where(is_zero, -math.inf, log))


def _first_order(x: Tensor, mean: Tensor) -> Tensor:
    """Return the probabilities of counts to first order in a mean of 0: all mass is at 0, and moves to 1."""
    return torch.where(x == 0, 1 - mean, torch.where(x == 1, mean, 0.0))


def stirling_error(x: Tensor) -> Tensor:
    """Return lgamma(x + 1) - (x + ½) log x + x - ½ log 2π of x > 0, in float64.

    References:
        *Fast and accurate computation of binomial probabilities* (Loader, 2000).
    """
    near = at_most(x, 10.0)
    direct = torch.lgamma(near + 1) - (near + 0.5) * near.log() + near - 0.5 * math.log(2 * math.pi)
    inverse = 1 / at_least(x, 10.0)
    return torch.where(x < 10, direct, inverse * horner(inverse * inverse, _STIRLING))


def _deviance(x: Tensor, mean: Tensor, log_mean: Tensor) -> Tensor:
    """Return x log(x/mean) - x + mean ≥ 0 of x > 0, from the difference of x and mean if they are close."""
    near = mean > x / 2
    gap = torch.where(near, (mean - x) / x, 0.0)
    far = x * (x.log() - log_mean) - x + mean
    return torch.where(near, x * x_minus_log1p(gap), far)


def _log_poisson(x: Tensor, mean: Tensor, log_mean: Tensor) -> Tensor:
    """Return the logarithm of a Poisson probability of x ≥ 0."""
    positive = x.clamp_min(1)
    log = -stirling_error(positive) - _deviance(positive, mean, log_mean) - 0.5 * torch.log(2 * math.pi * positive)
    return torch.where(x == 0, -mean, log)


def _log_binomial(x: Tensor, y: Tensor, o: _Odds) -> Tensor:
    """Return the logarithm of Γ(x+y+1)/(Γ(x+1) Γ(y+1)) p^x (1-p)^y for positive real numbers x and y."""
    n = x + y
    deviance = _deviance(x, n * o.success, n.log() + o.log_success)
    deviance = deviance + _deviance(y, n * o.failure, n.log() + o.log_failure)
    stirling = stirling_error(n) - stirling_error(x) - stirling_error(y)
    return stirling - deviance - 0.5 * torch.log(2 * math.pi * x * (y / n))


def _poisson(d: Any, x: Tensor) -> Masses:
    rate = d.rate.double()
    inside, x = _count(x)
    log = _log_poisson(x, rate, _log(rate))
    return _finish(log, inside, torch.where(rate == 0, _first_order(x, rate), log.exp()))


def _binomial(d: Any, x: Tensor) -> Masses:
    n = d.total_count.double() if isinstance(d, Binomial) else x.new_ones(())
    o = _odds(d)
    inside, x = _count(x, n)
    within = (x > 0) & (x < n)
    inner = _log_binomial(torch.where(within, x, 1.0), torch.where(within, n - x, 1.0), o)
    log = torch.where(within, inner, torch.where(x == 0, n * o.log_failure, n * o.log_success))
    value = torch.where(o.success == 0, _first_order(x, n * o.success), log.exp())
    return _finish(log, inside, torch.where(o.failure == 0, _first_order(n - x, n * o.failure), value))


def _geometric(d: Any, x: Tensor) -> Masses:
    o = _odds(d)
    inside, x = _count(x)
    log = x * o.log_failure + o.log_success
    return _finish(log, inside, torch.where(o.failure == 0, _first_order(x, o.failure), log.exp()))


def _negative_binomial(d: Any, x: Tensor) -> Masses:
    """Return r/(x + r) times the Binomial probability of r failures in x + r trials: the last trial fails."""
    r, o = d.total_count.double(), _odds(d)
    inside, x = _count(x)
    size, count = torch.where(r > 0, r, 1.0), x.clamp_min(1)
    share = size.log() - (size + count).log()
    log = torch.where(r > 0, share + _log_binomial(count, size, o), _LOG_ZERO)
    log = torch.where(x == 0, r * o.log_failure, log)
    return _finish(log, inside, torch.where(o.success == 0, _first_order(x, r * o.success), log.exp()))


def _class_masses(d: Categorical) -> Masses:
    """Return the probabilities of the classes, `[*batch, classes]`."""
    key = next(key for key in d.__dict__ if key in ("raw_logits", "probs", "logits"))
    given = d.__dict__[key].double()
    if key == "probs":  # torch normalises in the given precision
        total = given.sum(-1, keepdim=True)
        return Masses(given / total, _log(given) - total.log())
    return Masses(given.softmax(-1), given.log_softmax(-1).clamp_min(_LOG_ZERO))


def _categorical(d: Any, x: Tensor) -> Masses:
    value, log = _class_masses(d)
    inside, x = _count(x, value.shape[-1] - 1)
    index = x.long().unsqueeze(-1)
    index, value, log = torch.broadcast_tensors(index, value, log)
    index = index[..., :1]
    return _finish(log.gather(-1, index).squeeze(-1), inside, value.gather(-1, index).squeeze(-1))


def _one_hot(d: Any, x: Tensor) -> Masses:
    at_class = _categorical(d._categorical, x.argmax(-1).to(torch.float64))
    inside = ((x == 0) | (x == 1)).all(-1) & (x.sum(-1) == 1)
    return _finish(at_class.log, inside, at_class.value)


def _multinomial(d: Any, x: Tensor) -> Masses:
    """Return the masses of independent Poisson counts of mean n p, given that they add up to n."""
    value, log = _class_masses(d._categorical)
    n = scalar(float(d.total_count), x.device, torch.float64)
    inside, x = _count(x, n)
    counts = _log_poisson(x, n * value, _log(n) + log)
    of_total = _log_poisson(n, n, _log(n))
    each = torch.where(value == 0, _first_order(x, n * value), counts.exp())
    probability = each.prod(-1) * torch.exp(-of_total)
    return _finish(counts.sum(-1) - of_total, inside.all(-1) & (x.sum(-1) == n), probability)


def _independent(d: Any, x: Tensor) -> Masses:
    dims = d.reinterpreted_batch_ndims
    value, log = masses(d.base_dist, x)
    return Masses(value.flatten(-dims).prod(-1), log.flatten(-dims).sum(-1)) if dims else Masses(value, log)


def _mixture(d: Any, x: Tensor) -> Masses:
    component, weight = masses(d.component_distribution, d._pad(x)), _class_masses(d.mixture_distribution)
    logs = component.log + torch.where(weight.log > _LOG_ZERO, weight.log, -math.inf)
    top = logs.detach().amax(-1, keepdim=True)
    top = torch.where(top == -math.inf, 0.0, top)
    total = torch.exp(logs - top).sum(-1)
    log = torch.where(total == 0, -math.inf, torch.where(total == 0, 1.0, total).log() + top.squeeze(-1))
    return Masses((weight.value * component.value).sum(-1), log)


def _transformed(d: Any, x: Tensor) -> Masses:
    """Return the masses of the points before the transforms: a bijection moves points with their mass."""
    for transform in reversed(d.transforms):
        x = transform.inv(x)
    whole = x.round()
    return masses(d.base_dist, torch.where((x - whole).abs() <= _SNAP * (1 + whole.abs()), whole, x))


_RULES: dict[type[Distribution], Callable[[Any, Tensor], Masses]] = {
    Bernoulli: _binomial,
    Binomial: _binomial,
    Categorical: _categorical,
    OneHotCategorical: _one_hot,
    Multinomial: _multinomial,
    Geometric: _geometric,
    NegativeBinomial: _negative_binomial,
    Poisson: _poisson,
    Independent: _independent,
    MixtureSameFamily: _mixture,
    TransformedDistribution: _transformed,
}
