"""KLs of discrete pairs as sums at 50 digits, and their gradients, from the textbook formula of every probability."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import mpmath
import torch
import torch.distributions as dist
from torch import Tensor
from torch.distributions import Distribution

DIGITS = 50


@dataclass(frozen=True)
class Law:
    """A family of counts: how torch builds it, and the logarithm of its probabilities."""

    build: Callable[..., Distribution]
    log_mass: Callable[..., Any]

    def __call__(self, *parameters: Any) -> Distribution:
        return self.build(*parameters)


@cache
def _log_factorial(k):
    with mpmath.workdps(DIGITS):
        return mpmath.loggamma(k + 1)


def _choose(n, k):
    return _log_factorial(n) - _log_factorial(k) - _log_factorial(n - k)


def _negative_binomial(x, r, p):
    return mpmath.loggamma(x + r) - _log_factorial(x) - mpmath.loggamma(r) + x * mpmath.log(p) + r * _log1m(p)


def _log1m(p):
    return mpmath.log(1 - p)


def _log_odds(logit):
    return -mpmath.log1p(mpmath.exp(-logit)), -mpmath.log1p(mpmath.exp(logit))


def _binomial(n):
    return Law(
        lambda p: dist.Binomial(n, p, validate_args=False),
        lambda x, p: _choose(mpmath.mpf(n), x) + x * mpmath.log(p) + (n - x) * _log1m(p) if x <= n else -mpmath.inf,
    )


POISSON = Law(dist.Poisson, lambda x, m: x * mpmath.log(m) - m - _log_factorial(x))
GEOMETRIC = Law(dist.Geometric, lambda x, p: x * _log1m(p) + mpmath.log(p))
GEOMETRIC_LOGITS = Law(
    lambda logits: dist.Geometric(logits=logits), lambda x, logit: x * _log_odds(logit)[1] + _log_odds(logit)[0]
)
NEGATIVE_BINOMIAL = Law(dist.NegativeBinomial, _negative_binomial)
BERNOULLI = Law(
    lambda logits: dist.Bernoulli(logits=logits),
    lambda x, logit: _log_odds(logit)[1 - int(x)] if x <= 1 else -mpmath.inf,
)
BINOMIAL_4, BINOMIAL_7, BINOMIAL_4000 = _binomial(4), _binomial(7), _binomial(4000)


def leaves(values: Iterable[float], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return the parameters as tensors that require a gradient."""
    return [torch.tensor(value, dtype=dtype, requires_grad=True) for value in values]


def exact_kl(q: Law, p: Law, of_q: list[Tensor], of_p: list[Tensor], num_points: int) -> tuple[Any, list[Any]]:
    """Return KL(q‖p) over the counts below `num_points`, and its derivatives, at the very parameters that are given."""
    with mpmath.workdps(DIGITS):
        at = [mpmath.mpf(t.item()) for t in (*of_q, *of_p)]

        def kl(*parameters):
            a, b = parameters[: len(of_q)], parameters[len(of_q) :]
            logs = [(q.log_mass(mpmath.mpf(x), *a), p.log_mass(mpmath.mpf(x), *b)) for x in range(num_points)]
            return mpmath.fsum(mpmath.exp(u) * (u - v) for u, v in logs if u > -mpmath.inf)

        gradient = []
        for i in range(len(at)):
            step = at[i] * mpmath.mpf(10) ** -20
            up, down = (kl(*at[:i], at[i] + sign * step, *at[i + 1 :]) for sign in (1, -1))
            gradient.append((up - down) / (2 * step))
        return kl(*at), gradient


def check(estimate: Tensor, parameters: list[Tensor], exact: tuple[Any, list[Any]], rtol: float, grad_rtol: float):
    """Compare a value and its gradient with the exact ones, the gradient relative to its largest entry."""
    value, gradient = exact
    assert abs(mpmath.mpf(estimate.item()) - value) <= rtol * abs(value)
    computed = torch.autograd.grad(estimate, parameters)
    largest = max(abs(g) for g in gradient)
    for c, g in zip(computed, gradient, strict=True):
        assert abs(mpmath.mpf(c.item()) - g) <= grad_rtol * largest
