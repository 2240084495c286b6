"""A coarse scan of the integrand from one end of float64 to the other: its extent, its size, its tails."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_klloss.methods.quadrature.coordinates import Coordinate
from torch_klloss.methods.quadrature.integrand import Integrand

NUM_POINTS = 32
NUM_EVALUATIONS = NUM_POINTS + 6  # three bisections at either end
BEND = 2.0  # v = 2 sinh t: even steps of t are even in v near the centre and proportional to v far out
NEGLIGIBLE = 1e-17  # of the whole; nothing smaller is integrated
_NUM_BISECTIONS = 3
_FLATTEN = 1 / 12


class Scan(NamedTuple):
    """The integrand at points `[points, *integrals]` in rising order of v.

    Attributes:
        t: the points, in even steps, with v = 2 sinh t.
        v: the points.
        log_mass: log of the mass per unit of v.
        log_ratio: log q - log p.
        size: the mass times 1 + |log q - log p| of each step, as a share of all steps.
        ends: the ends in t of everything worth integrating, `[2, *integrals]`.
    """

    t: Tensor
    v: Tensor
    log_mass: Tensor
    log_ratio: Tensor
    size: Tensor
    ends: Tensor

    def select(self, index: Tensor) -> Scan:
        """Return the scan of some elements of a flat batch."""
        return Scan(*(t[:, index] if t.shape[1] > 1 else t for t in self))

    def edges(self, num_panels: int) -> Tensor:
        """Return the edges in v of panels that are about equally hard to resolve, `[panels + 1, *integrals]`.

        A panel's share is the integral of a low power of the integrand: a panel far out covers many decades of it.
        """
        weight = self.size.clamp_min(1e-300) ** _FLATTEN
        steps = (weight[1:] + weight[:-1]) * self.t.diff(dim=0)
        is_within = (self.t[1:] > self.ends[0]) & (self.t[:-1] < self.ends[1])
        steps = torch.where(is_within, steps, 0.0)
        reached = steps.cumsum(0)
        t = self.t.expand_as(self.size)
        ends = self.ends.unsqueeze(1)
        inner = [self._invert(reached, steps, t, k / num_panels) for k in range(1, num_panels)]
        return BEND * torch.cat([ends[0], *(t.clamp(ends[0], ends[1]) for t in inner), ends[1]]).sinh()

    @staticmethod
    def _invert(reached: Tensor, steps: Tensor, t: Tensor, share: float) -> Tensor:
        """Return the t at which the steps so far are a given share of all steps."""
        target = share * reached[-1:]
        index = (reached < target).sum(0, keepdim=True).clamp_max(len(steps) - 1)
        step = steps.gather(0, index)
        missing = (reached.gather(0, index) - target) / step.clamp_min(1e-300)
        return t.gather(0, index + 1) - missing.clamp(0, 1) * (t.gather(0, index + 1) - t.gather(0, index))


def scan_support(f: Integrand, coordinate: Coordinate) -> Scan:
    """Return a scan of the integrand between the limits of its coordinate."""
    low, high = ((end / BEND).asinh() for end in coordinate.limits())
    grid = torch.linspace(0, 1, NUM_POINTS, dtype=torch.float64, device=low.device)
    grid = grid.reshape(-1, *(1,) * low.dim())
    t = low + (high - low) * grid
    if low.dim() == 0:
        t = t.reshape(-1, *(1,) * len(f.shape))
    log_mass, log_ratio, log_size = evaluate(f, coordinate, t)
    log_whole = log_size.logsumexp(0).nan_to_num(neginf=0.0)
    size = (log_size - log_whole).exp()
    ends = _ends(f, coordinate, t.expand_as(size), size, log_whole)
    return Scan(t, BEND * t.sinh(), log_mass, log_ratio, size, ends)


def evaluate(f: Integrand, coordinate: Coordinate, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log of the mass per unit of v, log q - log p, and log of the size per unit of t."""
    sinh = t.sinh()
    x, log_slope = coordinate.points(BEND * sinh)
    log_mass, log_ratio = f.densities(x.expand(len(t), *f.shape))
    log_mass = log_mass + log_slope
    log_size = log_mass + (1 + sinh * sinh).log() / 2 + log_ratio.abs().clamp_max(1e300).log1p()
    is_known = (log_size < torch.inf) & (log_ratio > -torch.inf)  # log p = inf can only be an overflow
    return log_mass, log_ratio, torch.where(is_known, log_size, -torch.inf)


def _ends(f: Integrand, coordinate: Coordinate, t: Tensor, size: Tensor, log_whole: Tensor) -> Tensor:
    """Return the ends in t, `[2, *integrals]`: the points next to the outermost that matter, moved in by bisection."""
    n = len(t)
    matters = size > NEGLIGIBLE
    position = torch.arange(n, device=t.device).reshape(-1, *(1,) * (t.dim() - 1))
    first = torch.where(matters, position, n).amin(0).clamp_max(n - 1)
    last = torch.where(matters, position, -1).amax(0).clamp_min(0)
    inner = t.gather(0, torch.stack([first, last]))
    outer = t.gather(0, torch.stack([(first - 1).clamp_min(0), (last + 1).clamp_max(n - 1)]))
    for _ in range(_NUM_BISECTIONS):
        middle = (inner + outer) / 2
        is_negligible = (evaluate(f, coordinate, middle)[2] - log_whole).exp() <= NEGLIGIBLE
        inner, outer = torch.where(is_negligible, inner, middle), torch.where(is_negligible, middle, outer)
    return outer
