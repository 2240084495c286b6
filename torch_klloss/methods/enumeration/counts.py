"""Sums over all counts, with a bound of the terms beyond the last."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Geometric,
    MixtureSameFamily,
    NegativeBinomial,
    Poisson,
    TransformedDistribution,
)
from torch.utils.checkpoint import checkpoint

from torch_klloss.distributions.checks import type_name
from torch_klloss.distributions.supports import bounds_of
from torch_klloss.distributions.tensors import device_of
from torch_klloss.estimate import NotCertifiedError
from torch_klloss.methods.enumeration.masses import Masses, has_masses, kl_terms, masses, zero_gradient_where_infinite
from torch_klloss.methods.enumeration.support import align
from torch_klloss.numerics.devices import scalar
from torch_klloss.numerics.tracing import concrete, is_func_transformed

_NEGLIGIBLE = 1e-32  # of q's mass, on either side of the window
_RTOL, _ATOL = 1e-12, 1e-25  # of the certified error
_CHUNK = 2**20  # terms in memory at a time
_PROBES = 20  # steps beyond the last term, at doubling distances, at which -log p is evaluated

_MassesAt = Callable[[Tensor], tuple[Masses, Masses]]  # of q and of p at given counts


class Window(NamedTuple):
    """The counts lower ≤ x < upper that are summed over, `[*batch]` each."""

    lower: Tensor
    upper: Tensor

    @property
    def num_terms(self) -> int:
        """The largest number of terms over the batch."""
        return int(concrete(self.upper - self.lower).max())


class _Ratios(NamedTuple):
    """Bounds of d(j+1)/d(j) over all j ≥ x, and of d(j-1)/d(j) over all j ≤ x."""

    up: Tensor
    down: Tensor


class _Tail(NamedTuple):
    """Probabilities of at most u ρʲ at step j ≥ 0, with u = `first` and ρ = `ratio`."""

    first: Tensor
    ratio: Tensor

    @property
    def length(self) -> Tensor:
        """The typical length of the tail in steps, m = 1/(1 - ρ); inf where ρ bounds nothing."""
        return torch.where(self.ratio >= 1, math.inf, 1 / (1 - self.ratio))

    @property
    def mass(self) -> Tensor:
        """Σ u ρʲ; inf where ρ bounds nothing, even if `first` has underflowed."""
        return torch.where(self.ratio >= 1, math.inf, self.first * self.length)


def is_countable(q: Distribution) -> bool:
    """Return whether q lives on the counts 0, 1, … or their image, and its probabilities fall at a known rate."""
    if torch.compiler.is_compiling() or q.event_shape or device_of(q).type == "meta" or not has_masses(q):
        return False
    if isinstance(q, TransformedDistribution):
        return is_countable(q.base_dist) and all(transform.bijective for transform in q.transforms)
    if isinstance(q, MixtureSameFamily):
        return isinstance(q.component_distribution, tuple(_RATIOS))
    return isinstance(q, tuple(_RATIOS))


def sum_over_counts(q: Distribution, p: Distribution, max_terms: int) -> tuple[Tensor, Tensor, int]:
    """Return the KL in float64, a bound of its truncation error, both `[*batch]`, and the number of terms.

    The window around q's mean is widened until a geometric series bounds q's mass beyond either end by 1e-32.
    Beyond its upper end -log p is evaluated at doubling distances, so that the series bounds Σ q |log p| as well.

    Raises:
        NotImplementedError: if there are more than `max_terms` terms.
        NotCertifiedError: if the error is not below 1e-12 of the value.
    """
    shape = torch.broadcast_shapes(q.batch_shape, p.batch_shape)
    counts, push = _counts_of(q)
    with torch.no_grad():
        window = _window(counts, max_terms)

    def masses_at(x: Tensor) -> tuple[Masses, Masses]:
        x = align(x, len(shape))
        return masses(counts, x), masses(p, push(x))

    divergence, mass = _sums(masses_at, window, shape.numel())
    with torch.no_grad():
        bound, infinite = _truncation_error(counts, p, masses_at, window)
        infinite = infinite | _passes_end(q, p)
        beyond = _mass_outside(p, window) if counts is q else torch.full_like(bound, math.inf)
    # p's mass beyond the window is 1 less its mass within, which rounds; this is added only where it matters.
    is_negligible = beyond <= (1e-13 * divergence.detach()).clamp(_ATOL / 100, 1e-16)
    value = divergence + torch.where(is_negligible, 0.0, 1 - mass)
    value = zero_gradient_where_infinite(torch.where(infinite, math.inf, value))
    bound = torch.where(value.detach() == math.inf, 0.0, bound + torch.where(is_negligible, beyond, 0.0))
    _certify(q, p, value.detach(), bound)
    return value.expand(shape), bound.expand(shape), window.num_terms


def _counts_of(q: Distribution) -> tuple[Distribution, Callable[[Tensor], Tensor]]:
    """Return the distribution of the counts behind q, and the map from counts to the points of q."""
    if not isinstance(q, TransformedDistribution):
        return q, lambda x: x
    counts, inner = _counts_of(q.base_dist)

    def push(x: Tensor) -> Tensor:
        x = inner(x)
        for transform in q.transforms:
            x = transform(x)
        return x

    return counts, push


def _window(q: Any, max_terms: int) -> Window:
    """Return a window with at most 1e-32 of q's mass on either side of it."""
    if isinstance(q, MixtureSameFamily):
        each = _window(q.component_distribution, max_terms)
        return _within_limit(Window(each.lower.amin(-1), each.upper.amax(-1)), q, max_terms)
    mean, stddev = (t.double().nan_to_num(0.0) for t in (q.mean, q.stddev))
    reach = 12 * stddev + 16
    while True:
        lower, upper = (mean - reach).floor().clamp_min(0), (mean + reach).ceil()
        window = _within_limit(Window(lower, upper), q, max_terms)
        is_narrow = torch.stack([beyond.mass > _NEGLIGIBLE for beyond in _tails(q, window)]).any(0)
        if not concrete(is_narrow).any():
            return window
        reach = torch.where(is_narrow, 1.2 * reach, reach)


def _within_limit(window: Window, q: Distribution, max_terms: int) -> Window:
    if window.lower.numel() == 0 or concrete(window.upper - window.lower).max() <= max_terms:
        return window
    raise NotImplementedError(
        f"Enumeration sums at most max_terms={max_terms} counts, but {type_name(q)} has mass on more: its standard "
        f"deviation is {float(concrete(q.stddev).max()):.3g}. Raise max_terms, or use MonteCarloKL."
    )


def _tails(d: Distribution, window: Window) -> tuple[_Tail, _Tail]:
    """Return d's tails below and above the window; the lower one is empty below zero."""
    below, above = window.lower - 1, window.upper
    first = masses(d, torch.stack([below, above])).value
    left = _Tail(torch.where(below < 0, 0.0, first[0]), torch.where(below < 0, 0.0, _ratios(d, below).down))
    return left, _Tail(first[1], _ratios(d, above).up)


def _sums(masses_at: _MassesAt, window: Window, num_elements: int) -> tuple[Tensor, Tensor]:
    """Return Σ (q log(q/p) - q + p) and Σ p over the window, `[*batch]`.

    The sums are taken chunk by chunk; the terms of a chunk are computed again for the gradient.
    """
    lower = window.lower
    if lower.numel() and (first := concrete(lower)).eq(first.max()).all():
        lower = first.max().reshape((1,) * lower.dim())  # functions of the counts alone are then computed once

    def part(start: int, stop: int) -> tuple[Tensor, Tensor]:
        x = lower + torch.arange(start, stop, dtype=torch.float64, device=lower.device).reshape(-1, *(1,) * lower.dim())
        at_q, at_p = masses_at(x)
        terms = kl_terms(at_q, at_p)
        inside = align(x < window.upper, terms.dim() - 1)
        return torch.where(inside, terms, 0.0).sum(0), torch.where(inside, at_p.value, 0.0).sum(0)

    size, num_terms = max(1, _CHUNK // max(1, num_elements)), window.num_terms
    starts = range(0, num_terms, size)
    if len(starts) == 1 or is_func_transformed():  # which has no checkpoints
        return part(0, num_terms)
    ends = [min(start + size, num_terms) for start in starts]
    again = partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False)
    parts = [again(start, stop) for start, stop in zip(starts, ends, strict=True)]
    divergence, mass = (torch.stack(each).sum(0) for each in zip(*parts, strict=True))
    return divergence, mass


def _truncation_error(q: Distribution, p: Distribution, masses_at: _MassesAt, window: Window) -> tuple[Tensor, Tensor]:
    """Return a bound of the sum of the terms beyond the window, and where these make the KL infinite."""
    left, right = _tails(q, window)
    steps = _steps(right)
    at_q, at_p = masses_at(window.upper + steps)
    bound, infinite = _tail_bound(right, steps, at_q, at_p, has_masses(p))
    is_cut = window.lower > 0
    if concrete(is_cut).any():  # a finite range down to zero: -log p is largest at one of its ends
        start = (window.lower - 1).clamp_min(0)
        steps = torch.minimum(_steps(left), start)
        at_q, at_p = masses_at(start - steps)
        of_left, reaches = _tail_bound(left, torch.zeros_like(steps), at_q, at_p, has_masses(p))
        bound, infinite = bound + torch.where(is_cut, of_left, 0.0), infinite | (reaches & is_cut)
    return bound, infinite


def _passes_end(q: Distribution, p: Distribution) -> Tensor:
    """Return where q has mass beyond the last point of p, however small; False where no such point is known."""
    bounds = None if isinstance(q, TransformedDistribution) else bounds_of(p)
    end = scalar(math.inf if bounds is None else bounds.upper, device_of(q), torch.float64)
    beyond = torch.where(end.isfinite(), 2 * end + 1, 0.0)
    dims = max(end.dim(), len(q.batch_shape))
    return end.isfinite() & (masses(q, align(beyond.unsqueeze(0), dims)).log.squeeze(0) > -math.inf)


def _mass_outside(p: Distribution, window: Window) -> Tensor:
    """Return a bound of p's mass outside the window; inf if no bound is known."""
    if not is_countable(p) or isinstance(p, TransformedDistribution):
        return torch.full_like(window.lower, math.inf)
    zero = window.lower.new_zeros(p.batch_shape)
    left, right = _tails(p, Window(window.lower + zero, window.upper + zero))
    return left.mass + right.mass


def _certify(q: Distribution, p: Distribution, value: Tensor, bound: Tensor) -> None:
    is_certified = concrete((bound <= _RTOL * value.abs() + _ATOL) | value.isnan())
    if not is_certified.all():
        beyond = concrete(torch.where(bound <= _RTOL * value.abs() + _ATOL, 0.0, bound))
        raise NotCertifiedError(
            f"The tail of the sum for KL({type_name(q)}‖{type_name(p)}) cannot be bounded: the terms left out may be "
            f"as large as {float(beyond.nan_to_num(math.inf, math.inf).max()):.3g}. Use MonteCarloKL."
        )


def _tail_bound(tail: _Tail, steps: Tensor, q: Masses, p: Masses, p_is_known: bool) -> tuple[Tensor, Tensor]:
    """Return a bound of Σ q (|log q| + |log p|) over a tail of q, from both at some steps, and where it is infinite.

    If -log p ≤ A (1 + j/m)² at step j, as at the given steps, then Σ ρʲ (1 + j/m)² ≤ 5m and so Σ q |log p| ≤ 5 m u A.
    The sum is infinite if q |log p| exceeds one and rises from step to step, or if q reaches a zero of p. A p whose
    log_prob is -inf, but not known to be zero, may have underflowed: then nothing is bounded.
    """
    steps = align(steps, p.log.dim() - 1)
    growth = torch.where(q.log > -math.inf, (-p.log).clamp_min(0), 0.0) / (1 + steps / tail.length) ** 2
    of_q = tail.mass * (_abs_log(tail.first) + tail.length * _abs_log(tail.ratio))
    bound = torch.where(growth.isinf().any(0), math.inf, 5 * tail.mass * growth.amax(0) + of_q)
    size = q.log + (-p.log).clamp_min(1e-300).log()
    infinite = ((size[1:] >= size[:-1]) & (size[:-1] > 0) & size[1:].isfinite()).any(0)
    return bound, infinite | growth.isinf().any(0) if p_is_known else infinite


def _abs_log(x: Tensor) -> Tensor:
    return x.clamp_min(1e-300).log().abs()


def _steps(tail: _Tail) -> Tensor:
    """Return the steps into a tail at which p is evaluated, `[n, *batch]`, at doubling distances."""
    doublings = 2.0 ** torch.arange(_PROBES, dtype=torch.float64, device=tail.first.device) - 1
    return (doublings.reshape(-1, *(1,) * tail.first.dim()) * tail.length).ceil()


def _ratios(d: Distribution, x: Tensor) -> _Ratios:
    if isinstance(d, MixtureSameFamily):
        each = _ratios(d.component_distribution, x.unsqueeze(-1))
        return _Ratios(each.up.amax(-1), each.down.amax(-1))
    return next(rule(d, x) for cls, rule in _RATIOS.items() if isinstance(d, cls))


def _poisson(d: Any, x: Tensor) -> _Ratios:
    rate = d.rate.double()
    return _Ratios(rate / (x + 1), x / rate)


def _geometric(d: Any, x: Tensor) -> _Ratios:
    failure = 1 - d.probs.double() + torch.zeros_like(x)
    return _Ratios(failure, 1 / failure)


def _negative_binomial(d: Any, x: Tensor) -> _Ratios:
    r, success = d.total_count.double(), d.probs.double()
    up = success * ((x + r) / (x + 1)).clamp_min(1)
    return _Ratios(up, torch.where(r > 1, x / (success * (x + r - 1)), math.inf))


_RATIOS: dict[type[Distribution], Callable[[Any, Tensor], _Ratios]] = {
    Poisson: _poisson,
    Geometric: _geometric,
    NegativeBinomial: _negative_binomial,
}
