"""torch_klloss/methods/quadrature/verdict.py."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_klloss.distributions.supports import contained
from torch_klloss.distributions.tails import is_infinite
from torch_klloss.distributions.tensors import tensors_of
from torch_klloss.methods.quadrature.coordinates import Coordinate
from torch_klloss.methods.quadrature.integrand import Integrand
from torch_klloss.methods.quadrature.remainder import CONVERGES, DIVERGES, matters_beyond_overflow, slopes
from torch_klloss.methods.quadrature.scan import Scan

FINITE, INFINITE, UNDECIDED, OVERFLOWN, NOT_A_NUMBER = range(5)


def verdict_of(f: Integrand, coordinate: Coordinate, seen: Scan) -> tuple[Tensor, Tensor]:
    """Return what is known beforehand, and the slope that tells it where no tails are declared."""
    declared, within = is_infinite(f.q, f.p), contained(f.q, f.p)
    slope = torch.full(f.batch_shape, -torch.inf, dtype=torch.float64, device=seen.v.device)
    if declared is None and not f.is_closed:
        slope = f.widest(slopes(seen).amax(0))
    verdict = torch.where(slope >= DIVERGES, INFINITE, torch.where(slope < CONVERGES, FINITE, UNDECIDED))
    is_beyond = False if within is None else ~torch.as_tensor(within)
    is_beyond = is_beyond if declared is None else is_beyond | declared
    verdict = torch.where(torch.as_tensor(is_beyond, device=slope.device), INFINITE, verdict)
    verdict = torch.where((verdict == FINITE) & _is_overflown(f, coordinate, seen), OVERFLOWN, verdict)
    return torch.where(_is_nan(f, seen), NOT_A_NUMBER, verdict), slope


def _is_overflown(f: Integrand, coordinate: Coordinate, seen: Scan) -> Tensor:
    """Tell where log p overflows within its support, and what is lost by that may matter."""
    is_over = (seen.log_ratio == torch.inf) & bool(f.reach)
    if not is_over.any():
        return torch.zeros((), dtype=torch.bool, device=is_over.device)
    lanes = torch.stack([matters_beyond_overflow(f, coordinate, seen, outward) for outward in (-1, 1)]).any(0)
    return lanes.any(-1) if f.is_mixture else lanes


def _is_nan(f: Integrand, seen: Scan) -> Tensor:
    """Tell where a parameter is NaN."""
    nothing = seen.log_mass.isnan().all(0)
    is_nan = nothing.any(-1) if f.is_mixture else nothing
    for t in (*tensors_of(f.q), *tensors_of(f.p)) if f.is_flat else ():
        is_nan = is_nan | t.isnan().flatten(1).any(1) if t.dim() > 1 else is_nan | t.isnan()
    return is_nan
