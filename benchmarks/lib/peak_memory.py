"""The peak of memory that a step needs beyond its gradients, measured by the kernel in a fresh process."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from lib.kl_cases import vocabulary

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def extra_memory(name: str, size: tuple[int, int], side: str) -> float | None:
    """Return the peak of a Categorical step beyond its gradients, in units of one tensor of logits.

    The resident memory before the step and the gradients are subtracted from the largest resident memory during it.
    Tensors of this size are mapped by the kernel one by one, and given back when they are freed, so that this counts
    what is allocated, by whomever. None where the kernel is not Linux.
    """
    if not _CLEAR.exists():
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(_measure, name, size, side).result()


def _measure(name: str, size: tuple[int, int], side: str) -> float:
    torch.set_num_threads(1)
    vocabulary((8, 64), side, {}).step(name)  # what is loaded at the first call stays loaded
    case = vocabulary(size, side, {})
    before = _resident("VmRSS")
    _CLEAR.write_text("5")  # the peak starts anew
    case.step(name)
    peak = _resident("VmHWM")
    gradients = [leaf.grad.nbytes for leaf in case.leaves if leaf.grad is not None]
    return (peak - before - sum(gradients)) / gradients[0]


def _resident(key: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])
