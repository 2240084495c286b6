"""The error of an expectation from the spread of its replicates, in pieces."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_klloss.samplers.points import skewness_of_mean


class Spread:
    """Spread and skewness of two or more replicates, in pieces (Chan, Golub and LeVeque, 1983; Pébay, 2008)."""

    _mean: Tensor
    _squares: Tensor
    _cubes: Tensor
    _started: Tensor  # the sum of the first `_filled` terms of a replicate that the last piece ended in

    def __init__(self, num_replicates: int, points_each: int) -> None:
        self._num_replicates, self._points_each = num_replicates, points_each
        self._count = self._filled = 0

    def add(self, terms: Tensor) -> None:
        """Add the next weighted terms, `[n, *batch]`."""
        num_terms = terms.shape[0]
        head = min(self._points_each - self._filled, num_terms) if self._filled else 0
        if head:
            self._started, self._filled = self._started + terms[:head].sum(0), self._filled + head
        if self._filled == self._points_each:
            self._merge(self._started.unsqueeze(0))
            self._filled = 0
        whole = (num_terms - head) // self._points_each * self._points_each
        if whole:
            self._merge(terms[head : head + whole].unflatten(0, (-1, self._points_each)).sum(1))
        if head + whole < num_terms:
            self._started, self._filled = terms[head + whole :].sum(0), num_terms - head - whole

    def std_error(self) -> Tensor:
        """Return the standard error of the sum of all terms."""
        return (self._squares * self._num_replicates / (self._num_replicates - 1)).sqrt()

    def skewness(self) -> Tensor:
        """Return the skewness of that error; 0 for two replicates, which do not determine it."""
        if self._num_replicates < 3:
            return torch.zeros_like(self._mean)
        return skewness_of_mean(self._squares, self._cubes)

    def _merge(self, sums: Tensor) -> None:
        old, new, total = self._count, sums.shape[0], self._count + sums.shape[0]
        mean = sums.mean(0)
        centred = sums - mean
        powers = centred**2
        squares, cubes = powers.sum(0), (powers * centred).sum(0)
        if old:
            shift = mean - self._mean
            cubes = cubes + self._cubes + shift**3 * (old * new * (old - new) / total**2)
            cubes = cubes + 3 * shift * (old * squares - new * self._squares) / total
            squares = squares + self._squares + shift**2 * (old * new / total)
            mean = self._mean + shift * (new / total)
        self._mean, self._squares, self._cubes, self._count = mean, squares, cubes, total
