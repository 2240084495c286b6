"""A step on the pretended device, held against the same step on the CPU and against torch's own on the device."""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributions import Distribution

from tests.devices.cases import case
from tests.devices.pairs import Case, Step
from tests.devices.pretended import NAME, pretended
from torch_klloss.samplers import origins

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


def step_on(case: Case, device: str) -> Step:
    """Return the step of a case, with its own copy of the module on a device."""
    return case.step if case.module is None else partial(case.step, deepcopy(case.module).to(device))


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
    with patch.object(origins, "_has_small", lambda *_: True):  # an accelerator always draws in log space
        return Outcome(take(step_on(case, "cpu"), placed(case, dtype, "cpu")), {})


def on_device(case: Case, dtype: torch.dtype, *, float64: bool = True, step: Step | None = None) -> Outcome:
    """Return what the step, or another one, gives on the pretended device."""
    with pretended(float64=float64) as counts:
        tensors, taken = placed(case, dtype, NAME), step or step_on(case, NAME)
        counts.clear()
        before = counts.bytes
        results = take(taken, tensors)
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


def problem(it: Case, dtype: torch.dtype, float64: bool) -> str:
    """Return what is wrong with a case on the device; empty if nothing is.

    With float64 the waits are counted too. A wait for a constant that is then kept on the device does not count.
    """
    found, expected = on_device(it, dtype, float64=float64), on_host(it, dtype)
    wrong = differences(it, dtype, found, expected)
    if wrong or not float64:
        return wrong
    if found.num_waits > it.waits:
        found, peer = on_device(it, dtype), on_device(it, torch.float32, step=it.peer)  # torch samples little in half
        if found.num_waits > peer.num_waits + it.waits:
            return f"{found.num_waits} waits, torch's counterpart {peer.num_waits}: {found.waits}"
    return ""


def is_refused(it: Case, dtype: torch.dtype, error: Exception) -> bool:
    """Return whether the CPU raises the same error, as torch's factorisations do in half precision."""
    try:
        on_host(it, dtype)
    except NotImplementedError as refusal:
        return str(refusal) == str(error)
    return False


def problems(names: Sequence[str], dtype: str, float64: bool) -> dict[str, str]:
    """Return what is wrong with cases, by name."""
    found = {}
    for name in names:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what is compared
                found[name] = problem(case(name), DTYPES[dtype], float64)
        except Exception as error:  # which is reported with the others
            if is_refused(case(name), DTYPES[dtype], error):
                continue
            lines = [f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
            found[name] = f"{type(error).__name__}: {error}"[:300] + f" [{' < '.join(lines[:-8:-1])}]"
    return {name: text for name, text in found.items() if text}


def report(*runs: tuple[Sequence[str], str, bool]) -> None:
    """Print the problems of several runs, by name."""
    torch.set_num_threads(1)
    Distribution.set_default_validate_args(False)  # its checks wait, in torch's counterpart too
    json.dump([problems(*run) for run in runs], sys.stdout)
