"""The KL from its definition, E_q[log q - log p], by a sum or an integral that knows no formula; in float64.

Every function returns a `Reference`: differentiable in the parameters of q and p, and with what a comparison needs
to derive its tolerance. The distributions are to be built without validation.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.functional import logsigmoid

NODES = torch.linspace(-4.6, 4.6, 401, dtype=torch.float64)  # exp(π/2 sinh 4.6) = 1e34: poles and tails are followed
STEP = float(NODES[1] - NODES[0])

Density = Callable[[Distribution, Tensor], Tensor]
Ends = Sequence[Tensor | float]


class Reference(NamedTuple):
    """A KL `[*batch]`, a bound of what the rule may have missed, and E_q[|log q| + |log p|], the size of its terms."""

    value: Tensor
    error: Tensor
    magnitude: Tensor

    @classmethod
    def total(cls, parts: Sequence["Reference"]) -> "Reference":
        """Return the KL of a product of independent parts."""
        return cls(*(sum(each) for each in zip(*parts, strict=True)))


def log_density(d: Distribution, x: Tensor) -> Tensor:
    """Return log d(x), -inf outside the support."""
    return torch.where(d.support.check(x), d.log_prob(x), -math.inf)


def log_density_on_line(d: Distribution, x: Tensor) -> Tensor:
    """Return log d(x), -inf outside the support, and NaN where it overflows inside, as torch does."""
    log_d = log_density(d, x)
    return torch.where(log_d.isinf() & d.support.check(x), math.nan, log_d)


def sum_over(q: Distribution, p: Distribution, x: Tensor) -> Reference:
    """Return Σ_x q(x) (log q(x) - log p(x)) over the points x `[n, *event]`."""
    event = x.shape[1:]
    x = x.reshape(-1, *(1,) * len(q.batch_shape), *event).expand(-1, *q.batch_shape, *event)
    log_q, log_p = log_density(q, x), log_density(p, x)
    return _expectation(log_q, log_p, torch.zeros_like(log_q))


def integrate(q: Distribution, p: Distribution, ends: Ends, density_q: Density, density_p: Density) -> Reference:
    """Return ∫ q (log q - log p) dx, by a double-exponential rule between each two ends.

    The ends are in rising order; the first and the last may be infinite. q and p must be smooth in between.

    References:
        *Double exponential formulas for numerical integration* (Takahasi and Mori, 1974).
    """
    panels = [_panel(q.batch_shape, a, b) for a, b in itertools.pairwise(ends)]
    x, log_weights = (torch.cat(each) for each in zip(*panels, strict=True))
    with torch.no_grad():  # points without mass move to the mode, where no derivative overflows
        log_mass = density_q(q, x) + log_weights
        dead = ~(log_mass > -700)
        mode = log_mass.nan_to_num(nan=-math.inf).argmax(0, keepdim=True)
    x = torch.where(dead, x.gather(0, mode), x)
    log_weights = torch.where(dead, -math.inf, log_weights)
    return _expectation(density_q(q, x), density_p(p, x), log_weights, num_panels=len(panels))


def is_infinite(end: Tensor | float) -> bool:
    """Tell an end at infinity."""
    return isinstance(end, float) and math.isinf(end)


def _panel(batch_shape: torch.Size, a: Tensor | float, b: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return points `[n, *batch]` between a and b and the logarithms of their weights."""
    u = (math.pi * NODES.sinh()).reshape(-1, *(1,) * len(batch_shape)).expand(-1, *batch_shape)
    log_slope = (math.pi * STEP * NODES.cosh()).log().reshape(-1, *(1,) * len(batch_shape))
    if is_infinite(a) or is_infinite(b):
        x = a + (u / 2).exp() if is_infinite(b) else b - (u / 2).exp()
        return x, log_slope - math.log(2) + u / 2
    a, b = (torch.as_tensor(end, dtype=torch.float64).expand(batch_shape) for end in (a, b))
    x = torch.where(u < 0, a + (b - a) * u.sigmoid(), b - (b - a) * (-u).sigmoid())
    within = torch.minimum(torch.maximum(x, a.nextafter(b)), b.nextafter(a))
    x = x + (within - x).detach()
    log_width = torch.where(b > a, (b - a).clamp(min=1e-300).log(), -math.inf)
    return x, log_width + log_slope + logsigmoid(u) + logsigmoid(-u)


def _expectation(log_q: Tensor, log_p: Tensor, log_weights: Tensor, num_panels: int = 0) -> Reference:
    """Add up the terms, and bound what is missing.

    A double-exponential rule doubles its digits with its points, so that the rule of every second point bounds its
    error; what lies beyond the points shows in the outermost terms, and in the mass that is not there.
    """
    weights = (log_q + log_weights).exp()
    terms = torch.where(weights > 0, weights * (log_q - log_p), 0.0)
    sizes = torch.where(weights > 0, weights * (log_q.abs() + log_p.abs()), 0.0).detach()
    value, magnitude = terms.sum(0), sizes.sum(0)
    error = (1 - weights.detach().sum(0)).abs() * (1 + magnitude)
    if num_panels:
        panels, edges = terms.detach().unflatten(0, (num_panels, -1)), sizes.unflatten(0, (num_panels, -1))
        error = error + (value.detach() - 2 * panels[:, ::2].sum((0, 1))).abs()
        error = error + 100 * edges[:, (0, -1)].sum((0, 1))
    return Reference(value, error, magnitude)
