"""Random streams that are seeded, saved and restored without changing the caller's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

_HOST = ("cpu", "meta")  # devices whose draws come from the CPU's generator
_LOCK = threading.RLock()  # the streams belong to all threads: one at a time replaces them


@contextmanager
def private_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators of the CPU and of `device` for the block, and restore their state after it."""
    with private_streams(device) as reseed:
        reseed(seed)
        yield


@contextmanager
def private_streams(device: torch.device) -> Iterator[Callable[[int], None]]:
    """Yield a function that seeds the CPU's generator and `device`'s; their state is restored after the block."""

    def reseed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        if device.type not in _HOST:
            module = torch.get_device_module(device)
            with module.device(device):
                module.manual_seed(seed)

    with _forked(device):
        yield reseed


@dataclass(frozen=True)
class RngState:
    """The states of the CPU's random stream, of a device's, and of a generator."""

    cpu: Tensor
    device: Tensor | None
    generator: tuple[torch.device, Tensor] | None


def rng_state(device: torch.device, generator: torch.Generator | None = None) -> RngState:
    """Return the states of all random streams that a draw on `device` could use."""
    return RngState(
        torch.get_rng_state(),
        None if device.type in _HOST else torch.get_device_module(device).get_rng_state(device),
        None if generator is None else (generator.device, generator.get_state()),
    )


@contextmanager
def replayed_rng(state: RngState, device: torch.device) -> Iterator[torch.Generator | None]:
    """Set the streams back to `state` for the block, to repeat its draws; yield a generator in the saved state."""
    with _forked(device):
        torch.set_rng_state(state.cpu)
        if state.device is not None:
            torch.get_device_module(device).set_rng_state(state.device, device)
        generator = None
        if state.generator is not None:
            generator = torch.Generator(state.generator[0])
            generator.set_state(state.generator[1])
        yield generator


def draw_seed(generator: torch.Generator, device: torch.device) -> int:
    """Return a seed for draws on a device, drawn from `generator`, which advances.

    A generator of an accelerator is waited for; one of the CPU serves every device.

    Raises:
        ValueError: if the generator is of another accelerator than the device.
    """
    if generator.device.type not in ("cpu", device.type):
        raise ValueError(
            f"generator must be on the CPU, or on the device of q, {device}; got one on {generator.device}: "
            "torch.Generator().manual_seed(0)."
        )
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))


@contextmanager
def _forked(device: torch.device) -> Iterator[None]:
    on_host = device.type in _HOST
    with _LOCK, torch.random.fork_rng([] if on_host else [device], device_type="cuda" if on_host else device.type):
        yield
