"""The memory that a step in chunks allocates at its peak, and its time, against all draws at once."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, Normal, StudentT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch_klloss.methods.monte_carlo.chunks import expectation_in_chunks
from torch_klloss.samplers import Sampler
from torch_klloss.samplers.draws import prepare

_BATCH = (256, 32)


def extra_memory(samplers: Mapping[str, Sampler]) -> list[dict[str, Any]]:
    """Return the ratios for every sampler: of 4096 draws in chunks to 64 draws, and in time to 4096 draws at once.

    Memory is what live tensors hold at the peak, and what the process grows by: resident memory includes what an
    allocator has broken up, and that of 64 draws is hence taken over as many steps as there are chunks. It is NaN where
    there is no /proc.
    """
    rows = []
    for name, sampler in samplers.items():
        few, chunked = _peak(sampler, 64, None), _peak(sampler, 4096, 64)
        seconds = {size: min(_seconds(sampler, 4096, size) for _ in range(2)) for size in (64, None)}
        resident = _growth(sampler, 4096, 64, steps=1) / _growth(sampler, 64, None, steps=64)
        time_ratio = seconds[64] / seconds[None]
        rows.append({"sampler": name, "memory": chunked / few, "resident": resident, "time": time_ratio})
    return rows


def _growth(sampler: Sampler, *options: int | None, steps: int) -> float:
    """Return by how much the resident memory of a fresh process grows at its peak."""
    if not Path("/proc/self/status").exists():
        return math.nan
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_grown, (sampler, *options, steps))


def _grown(sampler: Sampler, num_samples: int, chunk_size: int | None, steps: int) -> int:
    torch.set_num_threads(1)
    _step(sampler, 4, None)
    _step(sampler, 4, 2)  # what is imported on first use
    before = _peak_resident()
    for _ in range(steps):
        _step(sampler, num_samples, chunk_size)
    return _peak_resident() - before


def _peak_resident() -> int:
    """Return the kilobytes; `getrusage` would count the parent's as well, which outlive the start of a child."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def _step(sampler: Sampler, num_samples: int, chunk_size: int | None, batch: tuple[int, int] = _BATCH) -> None:
    loc, log_scale = (torch.zeros(batch, requires_grad=True) for _ in range(2))
    q, p = Independent(Normal(loc, log_scale.exp()), 1), Independent(StudentT(torch.full(batch[1:], 4.0)), 1)
    draws = prepare(sampler, q, num_samples, differentiable=True)

    def evaluate(start: int, stop: int) -> tuple[Any, Tensor]:
        points = draws.part(start, stop)
        return points, q.log_prob(points.x) - p.log_prob(points.x)

    torch.autograd.grad(expectation_in_chunks(evaluate, num_samples, chunk_size).value.sum(), (loc, log_scale))


def _seconds(sampler: Sampler, num_samples: int, chunk_size: int | None) -> float:
    begin = time.perf_counter()
    _step(sampler, num_samples, chunk_size)
    return time.perf_counter() - begin


def _peak(sampler: Sampler, num_samples: int, chunk_size: int | None) -> int:
    _step(sampler, num_samples, chunk_size, batch=(1, _BATCH[1]))  # nets and rules that are kept
    with _Allocated() as allocated:
        _step(sampler, num_samples, chunk_size)
    return allocated.peak


class _Allocated(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, whoever holds them: what an allocator cannot do without."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        import weakref

        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = weakref.finalize(storage, self._free, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _free(self, key: int, size: int) -> None:
        if self._alive.pop(key, None) is not None:
            self.now -= size
