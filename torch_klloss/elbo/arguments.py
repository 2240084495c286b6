"""Arguments of the VAE loss, checked and in one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.distributions import Distribution

Pair: TypeAlias = tuple[Distribution, Distribution]
Latents: TypeAlias = Distribution | Sequence[Distribution] | Sequence[Pair]


def pairs_of(q: Latents, p: Distribution | Sequence[Distribution] | None) -> list[Pair]:
    """Return the levels as a list of (q, p) pairs."""
    if isinstance(q, Tensor):
        raise TypeError(
            "loss(p_x, x, q, p) takes distributions, got a tensor as q: for a reconstruction, x, mean and log-variance "
            "call loss.from_tensors(recon, x, mean, logvar)."
        )
    if isinstance(q, Distribution):
        if p is None:
            raise TypeError("a posterior q needs its prior p: loss(p_x, x, q, standard_normal_like(q)).")
        return [(q, p)]  # type: ignore[list-item]
    levels = list(q)
    if not levels:
        raise ValueError("a hierarchy needs at least one (q, p) pair, got an empty list.")
    if p is None:
        if not all(isinstance(level, tuple) and len(level) == 2 for level in levels):
            raise TypeError("without p, q must be a list of (q, p) pairs: loss(p_x, x, [(q1, p1), (q2, p2)]).")
        return levels  # type: ignore[return-value]
    if isinstance(p, Distribution) or len(p) != len(levels):
        got = type(p).__name__ if isinstance(p, Distribution) else f"{len(p)} priors"
        raise ValueError(f"a list of {len(levels)} posteriors needs as many priors, got {got}.")
    return list(zip(levels, p, strict=True))  # type: ignore[arg-type]


def same_shape(recon: Tensor, x: Tensor, elements: torch.Size) -> tuple[Tensor, Tensor]:
    """Return recon and x in one shape: if one of them is flat, the other is flattened."""
    dims = len(elements)
    if recon.shape != x.shape and min(recon.dim(), x.dim()) == dims + 1 and recon.numel() == x.numel() > 0:
        recon, x = recon.flatten(dims), x.flatten(dims)
    if recon.shape != x.shape or x.shape[:dims] != elements:
        raise ValueError(
            f"recon and x must have the same shape, with the examples {tuple(elements)} of mean and logvar first, got "
            f"{tuple(recon.shape)} and {tuple(x.shape)}: x.view_as(recon)?"
        )
    return recon, x


def sum_levels(terms: Sequence[Tensor]) -> Tensor:
    """Return the sum of one tensor a level."""
    return terms[0] if len(terms) == 1 else torch.stack(list(terms)).sum(0)


def check_moments(mean: Tensor, logvar: Tensor) -> None:
    """Raise a ValueError if mean and logvar differ in shape."""
    if mean.shape != logvar.shape:
        raise ValueError(
            f"mean and logvar must have the same shape, got {tuple(mean.shape)} and {tuple(logvar.shape)}; a "
            "log-variance that is shared on purpose can be passed as logvar.expand_as(mean)."
        )
