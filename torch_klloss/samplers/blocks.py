"""Random noise that can be had in parts: the noise of a draw depends on its number alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torch_klloss.numerics.tracing import is_traced
from torch_klloss.rng import private_rng

BLOCK = 64  # draws of one seed

Part = Callable[[int, int], Tensor]


def in_blocks(make: Callable[[int], Tensor], num_draws: int, device: torch.device) -> Part:
    """Return a function (start, stop) of the noise of those draws, the same noise at every call.

    Up to `BLOCK` draws come from the ambient random stream and are kept. More come block by block, each from a seed
    of its own, which are drawn from the ambient stream now. Under tracing, which has no private streams, all
    are drawn now and kept.

    Args:
        make: returns fresh noise of n draws, `[n, …]`, from the global random stream.
        num_draws: S.
        device: where `make` draws.
    """
    if num_draws <= BLOCK or is_traced():
        noise = make(num_draws)
        return lambda start, stop: noise[start:stop]
    num_blocks = -(-num_draws // BLOCK)
    seeds = torch.randint(2**63 - 1, (num_blocks,), device="cpu").tolist()

    def block(index: int) -> Tensor:
        with private_rng(seeds[index], device):
            return make(min(BLOCK, num_draws - index * BLOCK))

    def part(start: int, stop: int) -> Tensor:
        first, last = start // BLOCK, -(-stop // BLOCK)
        noise = [block(index) for index in range(first, last)]
        joined = noise[0] if len(noise) == 1 else torch.cat(noise)
        return joined[start - first * BLOCK : stop - first * BLOCK]

    return part
