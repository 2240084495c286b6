"""The tails beyond the outermost nodes: whether their integral is finite, and an estimate of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Distribution, MixtureSameFamily

from torch_klloss.distributions.batch_dims import with_batch_dim
from torch_klloss.distributions.densities import log_density
from torch_klloss.distributions.supports import bounds_of
from torch_klloss.methods.quadrature.coordinates import Coordinate
from torch_klloss.methods.quadrature.integrand import Integrand
from torch_klloss.methods.quadrature.rules import weigh
from torch_klloss.methods.quadrature.scan import BEND, Scan, evaluate
from torch_klloss.numerics.exponentials import e2, expm1

DIVERGES = -1e-3  # slope of log(integrand) against log(distance): not falling
CONVERGES = -0.02
_NUM_BISECTIONS = 16
_BACK = 0.05, 1e-3  # in t, to see whether the integrand falls: by then a double exponential has not begun to grow
_ALIKE = 0.05, 1e-4  # relative and absolute
_SHARES = 1.0, 2 / 3, 4 / 9  # of the reach
_LEAST_REACH = 15.0  # e^15 times the scale of the mass
_EXCESS = 10.0  # times the mass: the scan is coarse
_CAUTION = 4.0  # a safety factor
_STEADY = 0.1  # the change of a rate that is one
_NEGLIGIBLE = -39.0  # log of 1e-17


def slopes(scan: Scan, coordinate: Coordinate) -> Tensor:
    """Return the slope of the log of the integrand against log distance towards either end, `[2, *integrals]`.

    The integral converges if m (1 + |ℓ|), with ℓ = log q - log p, falls over the three outermost points at which log p
    does not overflow. It diverges if these are the outermost of all, and if m ℓ⁺, the part that can be infinite, is a
    power of the distance that does not fall, while m itself falls. Elsewhere the slope lies between CONVERGES and
    DIVERGES.
    """
    size = scan.log_mass + scan.log_ratio.abs().log1p()
    positive = scan.log_mass + scan.log_ratio.clamp_min(0).log()
    v = coordinate.log_distance(scan.v).expand_as(size)
    centre = coordinate.log_distance(torch.zeros_like(scan.v[:1]))
    ends = []
    for at, outward in ((size, centre - v), (size.flip(0), v.flip(0) - centre)):
        bound = _steepest(at, outward)
        mass, parts = (scan.log_mass, positive) if at is size else (scan.log_mass.flip(0), positive.flip(0))
        rise = _power(parts, mass, outward)
        undecided = bound.clamp(CONVERGES, 2 * DIVERGES)
        ends.append(torch.where(bound < CONVERGES, bound, torch.where(rise >= DIVERGES, rise, undecided)))
    return torch.stack(ends)


def _steepest(size: Tensor, outward: Tensor) -> Tensor:
    """Return the larger of the two slopes between the three first points at which the size is finite."""
    known = size < torch.inf
    count = known.cumsum(0)
    three = torch.cat([(known & (count == k)).to(torch.uint8).argmax(0, keepdim=True) for k in (1, 2, 3)])
    return _rises(size, outward, three).nan_to_num(nan=-torch.inf).amax(0)


def _power(positive: Tensor, mass: Tensor, outward: Tensor) -> Tensor:
    """Return the slope if it is the same all the way from the outermost point, the first, inwards; else -inf.

    The slope of a power of the logarithm is not: it falls like 1/log distance. This shows over a factor of the latter.
    """
    reach = outward[:1]
    three = torch.cat([(outward - share * reach).abs().argmin(0, keepdim=True) for share in _SHARES])
    outer, inner = _rises(positive, outward, three)
    falls = _rises(mass, outward, three)[0] < CONVERGES
    is_power = (outer - inner).abs() <= _ALIKE[0] * outer.abs() + _ALIKE[1]
    return torch.where(is_power & falls & (reach[0] > _LEAST_REACH), torch.minimum(outer, inner), -torch.inf)


def _rises(log_size: Tensor, outward: Tensor, points: Tensor) -> Tensor:
    """Return the slopes between neighbouring points."""
    return log_size.gather(0, points).diff(dim=0) / outward.gather(0, points).diff(dim=0)


def is_excessive(scan: Scan, f: Integrand) -> Tensor:
    """Return where q has far too much mass for a density, so that its tails prove nothing, `[*batch]`."""
    step = scan.t[-1] - scan.t[-2]
    mass = (scan.log_mass + (BEND * scan.t.cosh() * step).log()).exp().sum(0)
    return f.total(mass) > _EXCESS


def matters_beyond_overflow(f: Integrand, coordinate: Coordinate, scan: Scan, outward: int) -> Tensor:
    """Return where, at one end, -log p overflows before m log(q/p) is negligible and falling, `[*integrals]`."""
    t = scan.t.expand_as(scan.size)
    is_over, t = (scan.log_ratio == torch.inf), t * outward
    over = torch.where(is_over & (t > 0), t, torch.inf).amin(0, keepdim=True)
    known = torch.where(t < over, t, -torch.inf).amax(0, keepdim=True)
    none = over.isinf()
    over, known = torch.where(none, 0.0, over), torch.where(none, 0.0, known)
    for _ in range(_NUM_BISECTIONS):
        middle = (over + known) / 2
        is_over = evaluate(f, coordinate, outward * middle)[1] == torch.inf
        over, known = torch.where(is_over, middle, over), torch.where(is_over, known, middle)
    last, *before = (_log_size(f, coordinate, outward * (known - back)) for back in (0.0, *_BACK))
    falls = torch.stack([last < each for each in before]).all(0)
    return (~none & ~((last < _NEGLIGIBLE) & falls))[0]


def _log_size(f: Integrand, coordinate: Coordinate, t: Tensor) -> Tensor:
    log_mass, log_ratio, _ = evaluate(f, coordinate, t)
    return log_mass + log_ratio.abs().clamp_min(1.0).log()


def tail_integrals(f: Integrand, coordinate: Coordinate, v: Tensor, is_open: Tensor) -> tuple[Tensor, Tensor]:
    """Return the integrals beyond the ends v that are open, of the plain form, the near form, the mass and its gap.

    Returns:
        The sums over both ends, `[4, *integrals]`, and their errors.
    """
    total, error = (torch.zeros(4, *f.shape, dtype=v.dtype, device=v.device) for _ in range(2))
    for end, outward, opened, name in zip(v, (-1, 1), is_open, ("lower", "upper"), strict=True):
        is_mixed = _is_mixed(f, name).to(v.device)
        points = end + outward * torch.arange(-4, 1, device=end.device).reshape(5, *(1,) * end.dim())
        x, mass, log_ratio = weigh(f, coordinate, points, torch.ones_like(end))
        noise = _rounding(coordinate, end.unsqueeze(0))
        inside = log_ratio.clamp(-2, 2)
        factors = (log_ratio - 1, e2(-inside), torch.ones_like(mass), expm1(-inside))
        parts, errors = zip(*(remainder(mass, factor, noise) for factor in factors), strict=True)
        rest, spread = torch.stack(parts), torch.stack(errors)
        if is_mixed.any():  # beyond the ends another component may take over, which no point shows
            hidden = _bent(mass, noise, _bend(f, f.q, x[-2:]) + _bend(f, f.p, x[-2:]))
            spread = torch.where(is_mixed, torch.maximum(spread, rest.detach().abs()) + hidden, spread)
        total = total + torch.where(opened, rest, 0.0)
        error = error + torch.where(opened, spread, 0.0)
    return total, error


def _is_mixed(f: Integrand, end: str) -> Tensor:
    """Return where q or p is a mixture, the components of which share this end of the support, `[*integrals]`."""
    measure, p = (bounds_of(d) for d in (f.measure, f.p))
    if f.is_mixture:
        return torch.ones((), dtype=torch.bool)
    if measure is None or p is None or not isinstance(f.p, MixtureSameFamily):
        return torch.zeros((), dtype=torch.bool)
    return torch.as_tensor(getattr(measure, end) == getattr(p, end))


def _bend(f: Integrand, d: Distribution, x: Tensor) -> Tensor:
    """Return by how much the slope of log d can still rise: that of the flattest component less the present one.

    Where components fall like powers, the logarithm of their sum is a convex function of v.

    Args:
        f: the integrand.
        d: its q or p.
        x: two points at a distance of 1 in v, the outer one last, `[2, *integrals]`.
    """
    if not isinstance(d, MixtureSameFamily):
        return torch.zeros_like(x[0])
    components, log_weights = d.component_distribution, d.mixture_distribution.logits.log_softmax(-1)
    if f.is_mixture:
        components, log_weights = with_batch_dim(components, 1), log_weights.unsqueeze(-2)
    logs = log_density(components, x.detach().unsqueeze(-1), None) + log_weights
    rises, rise = ((t[1] - t[0]).nan_to_num(nan=-torch.inf) for t in (logs, logs.logsumexp(-1)))
    return (rises.amax(-1) - rise).clamp_min(0.0).nan_to_num(nan=torch.inf)


def _bent(mass: Tensor, noise: Tensor, bend: Tensor) -> Tensor:
    """Return the integrals that `tail_integrals` would miss if log(q/p) grew by `bend` a unit of v, `[4, *integrals]`.

    With the mass m exp(-k v), these are m bend/k² in the plain form, and m bend/(k (k - bend)) in the near one.
    """
    is_gone = (mass == 0).any(0)
    rate, _ = _rates(torch.where(is_gone, 1.0, mass), noise)
    rest = mass[-1] / rate * bend
    plain, near = rest / rate, torch.where(bend < rate, rest / (rate - bend), torch.inf)
    found = torch.stack([plain, near, torch.zeros_like(plain), near])
    return torch.where(is_gone | (bend == 0), 0.0, found).detach()


def _rounding(coordinate: Coordinate, v: Tensor) -> Tensor:
    """Return the error of v that comes from the rounding of x."""
    x, log_slope = coordinate.points(v)
    return torch.finfo(x.dtype).eps * (x.detach().abs().log() - log_slope.detach()).exp()[0]


def remainder(mass: Tensor, factor: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return the integral of mass · factor beyond the last point, extrapolated, and its error.

    The mass falls like exp(-k v). The factor is a polynomial of v if q and p both fall like powers of the distance,
    and an exponential if -log p grows like one. Both are tried; the last term of each is its error, and the one with
    the smaller error is taken.

    Args:
        mass: at five points at a distance of 1, the last one at the end, `[5, *integrals]`.
        factor: at the same points.
        noise: the error of the points.
    """
    is_gone = (mass == 0).any(0)
    mass = torch.where(is_gone, 1.0, mass)
    (rest, error), (other, other_error) = _polynomial(mass, factor, noise), _exponential(mass, factor, noise)
    better = error <= other_error
    rest, error = torch.where(better, rest, other), torch.where(better, error, other_error)
    return torch.where(is_gone, 0.0, rest), torch.where(is_gone, 0.0, error).detach()


def _polynomial(mass: Tensor, factor: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return m (f/k + f'/k² + f''/k³ + f'''/k⁴), with derivatives by backward differences, and its error.

    That of the series is its last term and the next one: either of them alone may be close to a zero.
    """
    rate, change = _rates(mass, noise)
    differences = [factor[-1]]
    for _ in range(4):
        factor = factor.diff(dim=0) / rate  # every derivative comes with one more 1/k
        differences.append(factor[-1])
    value, first, second, third, fourth = differences
    # From backward differences to derivatives at the last point: f' = ∇f + ∇²f/2 + ∇³f/3, f'' = ∇²f + ∇³f.
    slope = first + rate * second / 2 + rate**2 * third / 3
    terms = mass[-1] / rate * torch.stack([value, slope, second + rate * third, third])
    # n differences double the rounding of a point n times, by which f' is off; they are divided by kⁿ.
    roundings = [slope.abs() * noise * 2**n / rate ** (n - 1) for n in (3, 4)]
    following = (fourth.abs() - roundings[1]).clamp_min(0.0) + roundings[0]
    # A relative error of the rate changes the n-th term by n + 1 times as much.
    orders = torch.arange(1, 5, device=terms.device).reshape(-1, *(1,) * (terms.dim() - 1))
    error = _CAUTION * (terms[-1].abs() + mass[-1] / rate * following + change * (terms.abs() * orders).sum(0))
    return terms.sum(0), torch.where(rate.isfinite(), error, torch.inf)


def _exponential(mass: Tensor, factor: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return the last term over the rate at which the terms fall, and the error from the change of this rate.

    The terms fall without being exponential where the factor is about to change its sign.
    """
    rate, change = _rates(mass * factor, noise)
    rest = mass[-1] * factor[-1] / rate
    is_steady = (factor.abs().diff(dim=0) >= 0).all(0) | (change * rate < _STEADY)
    return rest, torch.where(rate.isfinite() & is_steady, _CAUTION * rest.abs() * change, torch.inf)


def _rates(terms: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rate k of exp(-k v), infinite where the terms do not fall, and its relative change per 1/k."""
    terms = terms[-3:]
    ratios = terms[:2] / torch.where(terms[1:] == 0, 1.0, terms[1:])
    falls = ((ratios > 1) & ratios.isfinite()).all(0)
    earlier, later = torch.where(falls, ratios, 2.0).log()
    rate = torch.where(falls, later, torch.inf)
    return rate, torch.where(falls, ((later - earlier).abs() / later + 2 * noise) / later, torch.inf)
