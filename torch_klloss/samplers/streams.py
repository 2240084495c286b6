"""Several random streams for the rows of one draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torch_klloss.rng import private_rng

_RANDOM = frozenset(
    [torch.bernoulli, torch.normal, torch.poisson, torch.rand, torch.rand_like, torch.randn, torch.randn_like]
    + [torch._standard_gamma, torch._sample_dirichlet, torch.binomial, Tensor.normal_, Tensor.uniform_]
    + [getattr(Tensor, f"{name}_") for name in ("bernoulli", "cauchy", "exponential", "geometric", "log_normal")]
)


class OtherNoiseError(Exception):
    """The rows of a draw share random numbers, or take them from an unknown function."""


def draw_at_once(make: Callable[[int], Any], seeds: Sequence[int], sizes: Sequence[int]) -> Any:
    """Return what `make` returns for the sum of the sizes, every run of rows from a stream of its own, on the CPU.

    The numbers are those of one call of `make` for each run, but `make` runs once.

    Args:
        make: (n) -> tensors of n rows, from the global stream.
        seeds: of the streams.
        sizes: how many rows each of them is for.

    Raises:
        OtherNoiseError: if the random numbers of the rows cannot be told apart.
    """
    with private_rng(seeds[0], torch.device("cpu")):
        with _Streams(seeds, sizes) as streams:
            made = make(sum(sizes))
        if not torch.equal(torch.get_rng_state(), streams.latest):
            raise OtherNoiseError
    return made


class _Streams(TorchFunctionMode):
    """Calls every random function once for each run of rows, in the state of its stream."""

    def __init__(self, seeds: Sequence[int], sizes: Sequence[int]) -> None:
        super().__init__()
        self._states = [torch.Generator().manual_seed(seed).get_state() for seed in seeds]
        ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
        self._rows = [slice(start, stop) for start, stop in pairwise(ends)]
        self._num_rows = ends[-1]
        self.latest = torch.get_rng_state()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _RANDOM:
            return func(*args, **(kwargs or {}))
        parts = []
        for stream, rows in enumerate(self._rows):
            torch.set_rng_state(self._states[stream])
            parts.append(func(*self._part(args, rows), **(kwargs or {})))
            self._states[stream] = self.latest = torch.get_rng_state()
        return args[0] if parts[0]._is_view() and func.__name__.endswith("_") else torch.cat(parts)

    def _part(self, args: Any, rows: slice) -> list[Any]:
        """Return the arguments for these rows.

        Raises:
            OtherNoiseError: if no argument has a row for every draw.
        """
        parts = [self._rows_of(arg, rows, place) for place, arg in enumerate(args)]
        if all(part is arg for part, arg in zip(parts, args, strict=True)):
            raise OtherNoiseError
        return parts

    def _rows_of(self, arg: Any, rows: slice, place: int) -> Any:
        if isinstance(arg, Tensor):
            return arg[rows] if arg.dim() and len(arg) == self._num_rows else arg
        if place == 0 and arg == self._num_rows:  # torch.rand(n, …)
            return rows.stop - rows.start
        if place == 0 and isinstance(arg, (list, tuple)) and arg and arg[0] == self._num_rows:
            return [rows.stop - rows.start, *arg[1:]]
        return arg
