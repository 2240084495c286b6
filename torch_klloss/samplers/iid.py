"""Independent draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, VonMises

from torch_klloss.distributions.simplify import diagonal_normal_of
from torch_klloss.distributions.tensors import device_of, is_transparent, lacks_float64, on_host
from torch_klloss.numerics.tracing import concrete, is_func_transformed
from torch_klloss.samplers.draws import BLOCK, Draws, PreparedSampler, noise_in_blocks
from torch_klloss.samplers.points import Points, evenly_weighted


@dataclass(frozen=True)
class IID(PreparedSampler):
    """Draws independent samples from q, each with the weight 1/S.

    The error of an expectation falls as S^-1/2, and is estimated from the spread of the draws.

    Examples:
        >>> import torch
        >>> from torch_klloss.samplers import IID
        >>> points = IID().draw(torch.distributions.Normal(torch.zeros(3), 1.0), 8, differentiable=False)
        >>> points.x.shape, points.expectation(torch.ones(8, 3))
        (torch.Size([8, 3]), tensor([1., 1., 1.]))
    """

    def prepare(self, q: Distribution, num_samples: int, *, differentiable: bool) -> Draws:
        """Return the draws, which are computed in parts.

        Under `torch.func`, draws from a Normal are made of standard noise: torch's own know no randomness="different".
        """
        _refuse_endless_draws(q)

        def make(n: int) -> tuple[Tensor, ...]:
            if is_func_transformed() and (normal := diagonal_normal_of(q)) is not None:
                loc, scale = normal.loc, normal.scale
                x = loc + scale * torch.randn(n, *loc.shape, dtype=loc.dtype, device=loc.device)
                return (x if differentiable else x.detach(),)
            shape = torch.Size((n,))  # not a tuple: other libraries ask it for its numel()
            if not differentiable:
                return (_sample(q, shape).detach(),)  # torch.no_grad alone lets forward-mode tangents pass
            joint: Any = q
            return joint.rsample_and_log_prob(shape) if _gives_log_prob(q) else (q.rsample(shape),)

        is_slow = num_samples > BLOCK and not is_transparent(q)
        noise = noise_in_blocks(make, num_samples, device_of(q), is_slow=is_slow)
        return _IndependentDraws(q, num_samples, noise)


def _sample(q: Distribution, shape: torch.Size) -> Tensor:
    """Return draws; from a copy on the CPU of what torch draws in float64, where q's device has none."""
    if lacks_float64(q, q) and any(isinstance(d, VonMises) for d in _parts_of(q)):
        return on_host(q)[0].sample(shape).to(device_of(q))
    return q.sample(shape)


def _parts_of(q: Distribution) -> list[Distribution]:
    """Return q and the distributions that it is made of."""
    parts = [q]
    for d in parts:
        parts += [part for part in vars(d).values() if isinstance(part, Distribution)]
    return parts


def _refuse_endless_draws(q: Distribution) -> None:
    """Raise a NotImplementedError for a VonMises of which torch rejects every proposal."""
    for d in _parts_of(q):
        if isinstance(d, VonMises) and not d.concentration.is_meta:
            concentration = concrete(d.concentration)
            if not (concentration <= _MOST_CONCENTRATED).all():
                raise NotImplementedError(
                    f"VonMises.sample of torch never ends at a concentration above {_MOST_CONCENTRATED:g} or NaN, got "
                    f"{concentration.max().item():g}; use AutoKL or Quadrature, or a Normal of that precision."
                )


_MOST_CONCENTRATED = 1e14  # the proposal's r = 1 + 1/(2 concentration) must differ from 1 in float64


@dataclass(frozen=True)
class _IndependentDraws:
    q: Distribution
    num_samples: int
    noise: Callable[[int, int], tuple[Tensor, ...]]

    def part(self, start: int, stop: int) -> Points:
        x, *log_q = self.noise(start, stop)
        return evenly_weighted(self.q, x, self.num_samples, self.num_samples, *log_q)


def _gives_log_prob(q: Distribution) -> bool:
    """Return whether q has an `rsample_and_log_prob` that is no older than its `rsample` and `log_prob`."""
    for cls in type(q).__mro__:
        if "rsample_and_log_prob" in cls.__dict__:
            return True
        if "rsample" in cls.__dict__ or "log_prob" in cls.__dict__:
            return False
    return False
