"""A step on the pretended device, held against the same step on the CPU and against torch's own on the device."""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from tests.devices.cases import Case, Step, case
from tests.devices.pretended import NAME, pretended

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Outcome:
    """What a step gives.

    Attributes:
        results: its value and its derivatives, on the host.
        waits: where the host waited, and how often.
        num_waits: how often it did.
        num_kernels: how many kernels were launched.
        peak: how many bytes were in use at most, beyond those before the step.
    """

    results: list[Tensor]
    waits: dict[str, int]
    num_waits: int = 0
    num_kernels: int = 0
    peak: int = 0


def placed(case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Return the tensors of a case as leaves on a device."""
    tensors = [(t.to(dtype) if t.is_floating_point() else t).to(device) for t in case.tensors]
    return [
        t.requires_grad_() if t.is_floating_point() and i not in case.fixed else t.detach()
        for i, t in enumerate(tensors)
    ]


def take(step: Step, tensors: list[Tensor]) -> list[Tensor]:
    """Return the value of a step and its derivatives by the leaves."""
    torch.manual_seed(0)
    value = step(*tensors)
    leaves = [t for t in tensors if t.requires_grad]
    if not value.requires_grad:
        return [value]
    # infinity has no derivative, and adds none
    total = torch.where(value.detach().isfinite(), value, 0.0).sum()
    return [value.detach(), *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)]


def on_host(case: Case, dtype: torch.dtype) -> Outcome:
    """Return what the step gives on the CPU."""
    return Outcome(take(case.step, placed(case, dtype, "cpu")), {})


def on_device(case: Case, dtype: torch.dtype, *, float64: bool = True, step: Step | None = None) -> Outcome:
    """Return what the step, or another one, gives on the pretended device."""
    with pretended(float64=float64) as counts:
        tensors = placed(case, dtype, NAME)
        counts.clear()
        before = counts.bytes
        results = take(step or case.step, tensors)
        waits, num_waits, kernels, peak = dict(counts.waits), counts.num_waits, counts.num_kernels, counts.peak
        strays = [t.device for t in results if t.device.type != NAME]
        if strays and step is None:
            raise AssertionError(f"a result is on {strays[0]}")
        return Outcome([t.cpu() for t in results], waits, num_waits, kernels, peak - before)


def differences(case: Case, dtype: torch.dtype, found: Outcome, expected: Outcome) -> str:
    """Return what is wrong with an outcome; empty if nothing is.

    Both make the same roundings but where one computes in another dtype, and every number is a sum of terms of the size
    of the largest number beside it.
    """
    eps = torch.finfo(dtype).eps
    for i, (a, b) in enumerate(zip(found.results, expected.results, strict=True)):
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"result {i} is {a.dtype} {tuple(a.shape)}, on the CPU {b.dtype} {tuple(b.shape)}"
        size = b[b.isfinite()].double().abs().max().item() if b.isfinite().any() else 0.0
        atol = (64 if case.exact else 1024) * eps * max(size, 1e-3)
        try:
            torch.testing.assert_close(a.double(), b.double(), rtol=64 * eps, atol=atol, equal_nan=True)
        except AssertionError as error:
            return f"result {i}: {error}"
    return ""


def failure(name: str, dtype: str, float64: bool) -> str:
    """Return what is wrong with a case on the device; empty if nothing is."""
    it, kind = case(name), DTYPES[dtype]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, expected = on_device(it, kind, float64=float64), on_host(it, kind)
    except Exception as error:
        where = [f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
        return f"{type(error).__name__}: {error}"[:300] + f" [{' < '.join(where[:-6:-1])}]"
    return differences(it, kind, found, expected)


def waiting(name: str, dtype: str = "float32") -> dict[str, int] | None:
    """Return where the host waits in a case, if it does so more often than in torch's counterpart."""
    it, kind = case(name), DTYPES[dtype]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, peer = on_device(it, kind), on_device(it, kind, step=it.peer)
    return ours.waits if ours.num_waits > peer.num_waits + it.waits else None


def main(question: str, names: list[str], *options: Any) -> None:
    """Print the answers that are not empty, by name."""
    torch.set_num_threads(1)
    Distribution.set_default_validate_args(False)  # its checks wait
    answer = {"failure": failure, "waiting": waiting}[question]
    found = {name: answer(name, *options) for name in names}
    json.dump({name: text for name, text in found.items() if text}, sys.stdout)
