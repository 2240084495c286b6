"""Draws that are computed in parts, the same at every call, for expectations in chunks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.numerics.tracing import is_traced
from torch_klloss.rng import private_streams
from torch_klloss.samplers.points import Points, Sampler
from torch_klloss.samplers.streams import OtherNoiseError, draw_at_once


class Draws(Protocol):
    """S draws from q with their randomness fixed; the points need not have been computed."""

    def part(self, start: int, stop: int) -> Points:
        """Return the points of draws start … stop - 1, the same at every call.

        Their weights and `num_replicates` are for all S draws. No random stream is used.
        """
        ...


class PreparedSampler(ABC):
    """A sampler that fixes all randomness first, and computes points on demand."""

    def draw(self, q: Distribution, num_samples: int, *, differentiable: bool) -> Points:
        """Return `num_samples` points of q, reparameterised (`rsample`) if `differentiable`."""
        return self.prepare(q, num_samples, differentiable=differentiable).part(0, num_samples)

    @abstractmethod
    def prepare(self, q: Distribution, num_samples: int, *, differentiable: bool) -> Draws:
        """Return the draws, which are computed in parts."""


def prepare(sampler: Sampler, q: Distribution, num_samples: int, *, differentiable: bool) -> Draws:
    """Return draws from q that are computed in parts; a sampler without `prepare` computes all points now.

    So does a subclass that overrides `draw` and only inherits `prepare`.
    """
    if hasattr(sampler, "prepare") and _is_current(type(sampler)):
        return cast(PreparedSampler, sampler).prepare(q, num_samples, differentiable=differentiable)
    return StoredDraws(sampler.draw(q, num_samples, differentiable=differentiable))


def _is_current(kind: type) -> bool:
    """Return whether `prepare` agrees with `draw`: no subclass has overridden `draw` alone."""
    for cls in kind.__mro__:
        if "prepare" in cls.__dict__:
            return True
        if "draw" in cls.__dict__:
            return False
    return True


@dataclass(frozen=True)
class StoredDraws:
    """Draws whose points have been computed."""

    points: Points

    def part(self, start: int, stop: int) -> Points:
        """Return a slice of the points."""
        weights = self.points.weights
        if len(weights) > 1:
            weights = weights[start:stop]
        log_q = None if self.points.log_q is None else self.points.log_q[start:stop]
        return Points(self.points.x[start:stop], weights, self.points.num_replicates, log_q)


BLOCK = 64  # the number of draws of one seed

Noise = Callable[[int, int], Tensor]
_N = TypeVar("_N", Tensor, "tuple[Tensor, ...]")


def noise_in_blocks(
    make: Callable[[int], _N], num_draws: int, device: torch.device, *, is_slow: bool = False
) -> Callable[[int, int], _N]:
    """Return a function (start, stop) of the noise of those draws, the same noise at every call.

    Up to `BLOCK` draws come from the global random stream and are kept. More come in blocks, each from its own seed,
    which is drawn from the global stream now. Under tracing, which has no private streams, all are drawn now and kept.

    Args:
        make: returns fresh noise of n draws, `[n, …]`, from the global random stream; several tensors if it needs them.
        num_draws: S.
        device: the device of the noise.
        is_slow: whether to call `make` once for many blocks, if their numbers are the same then.
    """
    if num_draws <= BLOCK or is_traced():
        noise = make(num_draws)
        return lambda start, stop: noise if stop - start == num_draws else _rows(noise, start, stop)
    num_blocks = -(-num_draws // BLOCK)
    seeds = torch.randint(2**63 - 1, (num_blocks,), device="cpu").tolist()

    def blocks(first: int, last: int) -> _N:
        sizes = [min(BLOCK, num_draws - index * BLOCK) for index in range(first, last)]
        if is_slow and device.type == "cpu" and last - first > 1:
            with suppress(OtherNoiseError):
                made: _N = draw_at_once(make, seeds[first:last], sizes)
                return made
        made_each = []
        with private_streams(device) as reseed:
            for seed, size in zip(seeds[first:last], sizes, strict=True):
                reseed(seed)
                made_each.append(make(size))
        return _joined(made_each)

    def part(start: int, stop: int) -> _N:
        first, last = start // BLOCK, -(-stop // BLOCK)
        joined = blocks(first, last)
        return _rows(joined, start - first * BLOCK, stop - first * BLOCK)

    return part


def _joined(parts: list[_N]) -> _N:
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return torch.cat(parts) if isinstance(first, Tensor) else tuple(map(torch.cat, zip(*parts, strict=True)))


def _rows(noise: _N, start: int, stop: int) -> _N:
    return noise[start:stop] if isinstance(noise, Tensor) else tuple(t[start:stop] for t in noise)
