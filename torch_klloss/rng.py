"""Random draws that leave the caller's random stream where it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def private_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators of the CPU and of `device` for the block, and give them back as they were."""
    on_cpu = device.type in ("cpu", "meta")
    devices = [] if on_cpu else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if on_cpu else device.type):
        torch.default_generator.manual_seed(seed)
        if not on_cpu:
            module = torch.get_device_module(device)
            with module.device(device):
                module.manual_seed(seed)
        yield


def draw_seed(generator: torch.Generator) -> int:
    """Draw a seed from `generator`, which advances by it."""
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
