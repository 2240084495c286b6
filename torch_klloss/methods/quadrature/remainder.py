"""What lies beyond the nodes: whether it is infinite, and otherwise how much it is."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_klloss.methods.quadrature.coordinates import Coordinate
from torch_klloss.methods.quadrature.integrand import Integrand
from torch_klloss.methods.quadrature.scan import Scan, look

DIVERGES = -1e-3  # slope of the integrand's logarithm against that of the distance: not falling
CONVERGES = -0.02
_NUM_BISECTIONS = 12
_BACK = 0.05  # in t, to tell whether the integrand falls
_NOTHING = -39.0  # 1e-17


def slopes(scan: Scan) -> Tensor:
    """Return how m ℓ⁺, the part of the integrand that can be infinite, grows towards either end, `[2, *lanes]`.

    In the limit of large v, the slope of its logarithm against v: where it is not below 0, the integral diverges. It is
    taken between the two outermost points at which log p did not overflow, and -inf where ℓ is negative.
    """
    log_positive = scan.log_mass + scan.log_ratio.clamp_min(0).log()
    v = scan.v.expand_as(log_positive)
    return torch.stack([_outward(log_positive, -v), _outward(log_positive.flip(0), v.flip(0))])


def _outward(height: Tensor, outward: Tensor) -> Tensor:
    """Return the slope between the first two of the points that are not infinite upwards, nor NaN."""
    known = height < torch.inf
    first = known.to(torch.uint8).argmax(0, keepdim=True)
    position = torch.arange(len(height), device=height.device).reshape(-1, *(1,) * (height.dim() - 1))
    second = (known & (position > first)).to(torch.uint8).argmax(0, keepdim=True)
    rise = height.gather(0, first) - height.gather(0, second)
    slope = rise / (outward.gather(0, first) - outward.gather(0, second))
    return torch.where(height.gather(0, first).isneginf(), -torch.inf, slope)[0]


def matters_beyond_overflow(f: Integrand, coordinate: Coordinate, seen: Scan, outward: int) -> Tensor:
    """Tell, for one end, where -log p overflows before m log(q/p) is nothing and falls, `[*lanes]`."""
    t = seen.t.expand_as(seen.size)
    is_over, t = (seen.log_ratio == torch.inf), t * outward
    over = torch.where(is_over & (t > 0), t, torch.inf).amin(0, keepdim=True)
    known = torch.where(t < over, t, -torch.inf).amax(0, keepdim=True)
    none = over.isinf()
    over, known = torch.where(none, 0.0, over), torch.where(none, 0.0, known)
    for _ in range(_NUM_BISECTIONS):
        middle = (over + known) / 2
        is_over = look(f, coordinate, outward * middle)[1] == torch.inf
        over, known = torch.where(is_over, middle, over), torch.where(is_over, known, middle)
    last, before = (_log_size(f, coordinate, outward * at) for at in (known, known - _BACK))
    return (~none & ~((last < _NOTHING) & (last < before)))[0]


def _log_size(f: Integrand, coordinate: Coordinate, t: Tensor) -> Tensor:
    log_mass, log_ratio, _ = look(f, coordinate, t)
    return log_mass + log_ratio.abs().clamp_min(1.0).log()


def remainder(mass: Tensor, factor: Tensor, step: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return the integral of mass · factor beyond the last point, if both go on as they did, and the error of that.

    The mass falls like exp(-k v). The factor is a polynomial of v where q and p both fall like powers of the distance,
    and an exponential where -log p grows like one; the better of the two is taken, and what its last term adds is
    its error.

    Args:
        mass: at four points in even steps, the last one at the end, `[4, *lanes]`.
        factor: the same.
        step: the distance between the points.
        noise: by how much the points may be off.
    """
    is_gone = (mass == 0).any(0)
    mass = torch.where(is_gone, 1.0, mass)
    (rest, error), (other, other_error) = (
        _polynomial(mass, factor, step, noise),
        _exponential(mass * factor, step, noise),
    )
    better = error <= other_error
    rest, error = torch.where(better, rest, other), torch.where(better, error, other_error)
    return torch.where(is_gone, 0.0, rest), torch.where(is_gone, 0.0, error).detach()


def _polynomial(mass: Tensor, factor: Tensor, step: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return m (f/k + f'/k² + f''/k³ + f'''/k⁴), with the derivatives by backward differences."""
    rate, change = _rates(mass, step, noise)
    differences = [factor[-1]]
    for _ in range(3):
        factor = factor.diff(dim=0) / (step * rate)  # every derivative comes with one more 1/k
        differences.append(factor[-1])
    value, first, second, third = differences
    slack = step * rate  # of a difference against the derivative at its end
    first = first + slack * second / 2 + slack**2 * third / 3
    second = second + slack * third
    terms = mass[-1] / rate * torch.stack([value, first, second, third])
    # A rate that is off by a share changes the n-th term by n + 1 times that share.
    # Eight roundings meet in the third difference.
    error = (
        terms[-1].abs()
        + mass[-1] / rate * first.abs() * 8 * noise * rate / slack**3
        + 4 * change * (terms.abs() * _orders(terms)).sum(0)
    )
    return terms.sum(0), torch.where(rate.isfinite(), error, torch.inf)


def _orders(terms: Tensor) -> Tensor:
    return torch.arange(1, len(terms) + 1, device=terms.device).reshape(-1, *(1,) * (terms.dim() - 1))


def _exponential(terms: Tensor, step: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return the last term over the rate at which the terms fall, and how much that changes."""
    rate, change = _rates(terms, step, noise)
    rest = terms[-1] / rate
    return rest, torch.where(rate.isfinite(), 4 * rest.abs() * change, torch.inf)


def _rates(terms: Tensor, step: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rate k of exp(-k v), infinite where the terms do not fall, and its relative change per 1/k."""
    terms = terms[-3:]
    ratios = terms[:2] / torch.where(terms[1:] == 0, 1.0, terms[1:])
    falls = ((ratios > 1) & ratios.isfinite()).all(0)
    earlier, later = torch.where(falls, ratios, 2.0).log() / step
    rate = torch.where(falls, later, torch.inf)
    return rate, torch.where(falls, ((later - earlier).abs() / later + 2 * noise / step) / (step * later), torch.inf)
