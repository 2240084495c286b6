"""Points of q made from integers: the k-th of 2^b cells of the unit interval, its middle, its quantile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.distributions.tensors import dtype_and_device_of
from torch_klloss.samplers.blocks import Part
from torch_klloss.samplers.points import Points, evenly_weighted
from torch_klloss.samplers.transport import num_uniforms, transport


@dataclass(frozen=True)
class Cells:
    """Hold what integer noise for q looks like.

    Attributes:
        bits: b; middles of 2^b cells are represented exactly, and so is their distance to 1.
        dtype: of the integers.
        shape: `[*batch, d]`, d uniforms for one event.
        device: of q.
    """

    bits: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    device: torch.device

    def random(self, n: int) -> Tensor:
        """Return independent uniform integers below 2^b, `[n, *batch, d]`, from the global stream."""
        return torch.randint(2**self.bits, (n, *self.shape), dtype=self.dtype, device=self.device)


def cells_of(q: Distribution) -> Cells:
    """Return the integer noise that a point of q takes.

    Raises:
        NotImplementedError: if no way from uniform numbers to q is known.
    """
    dtype, device = dtype_and_device_of(q)
    wide = dtype == torch.float64
    shape = (*q.batch_shape, num_uniforms(q))
    return Cells(52 if wide else 23, torch.int64 if wide else torch.int32, shape, device)


def middles(k: Tensor, bits: int) -> Tensor:
    """Return the middles of cells of the unit interval, (k + ½) / 2^b: strictly inside, and exact."""
    return (k.to(torch.float64 if bits > 23 else torch.float32) + 0.5) * 2.0**-bits


@dataclass(frozen=True)
class Transported:
    """Draws that are quantiles of integer noise.

    Attributes:
        q: the distribution.
        cells: what its noise looks like.
        noise: the integers of draws start … stop - 1, `[stop - start, *batch, d]`.
        num_samples: S.
        num_replicates: how many independent randomisations they are.
        differentiable: whether the points carry a gradient to q.
    """

    q: Distribution
    cells: Cells
    noise: Part
    num_samples: int
    num_replicates: int
    differentiable: bool

    def part(self, start: int, stop: int) -> Points:
        """Return some of the points."""
        u = middles(self.noise(start, stop), self.cells.bits)
        x = transport(self.q, u, differentiable=self.differentiable)
        return evenly_weighted(self.q, x, self.num_samples, self.num_replicates)
