"""Draws that were rounded to an end of the support, where what the densities depend on is lost."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor
from torch.distributions import Distribution, Uniform, VonMises, constraints

from torch_klloss.distributions.checks import type_name
from torch_klloss.distributions.located import Located
from torch_klloss.distributions.simplify import flatten_independent
from torch_klloss.distributions.stated_supports import believed_support, innermost, is_discrete
from torch_klloss.distributions.supports import Bounds, bounds_of
from torch_klloss.numerics.devices import can_be_read
from torch_klloss.numerics.dimensions import sum_last


class RoundedDrawsWarning(UserWarning):
    """Warns that draws were rounded to an end of the support of q."""


class RoundedDraws:
    """Counts the draws that lie on an end of q's support, some draws at a time.

    Args:
        q: what is drawn from.
    """

    def __init__(self, q: Distribution) -> None:
        self._q, self._ends = q, _open_ends(q)
        self._shares: dict[int, Tensor] = {}

    def see(self, start: int, x: Located, draw_dims: int = 1) -> None:
        """Count some draws, which the first dimensions index; the first one has this number."""
        if self._ends is not None:
            on_end = _is_on(self._ends, x)
            events = len(self._q.event_shape)
            on_end = on_end.flatten(-events).any(-1) if events else on_end
            self._shares[start] = on_end.to(x.x.dtype).sum(tuple(range(draw_dims)))

    def trusted(self, std_error: Tensor | None, num_draws: int, peeled: int) -> Tensor | None:
        """Return the standard error, NaN where draws were rounded; on the CPU a warning says how many."""
        if not self._shares:
            return std_error
        share = sum_last(torch.stack(list(self._shares.values())).sum(0), peeled) / num_draws
        if can_be_read(share) and bool((share > 0).any()):
            warnings.warn(
                f"{share.mean().item():.2g} of the draws of {type_name(self._q)} were rounded to an end of its "
                "support, where the densities are lost: the value is not reliable, and has no standard error. Use "
                "float64, or give q and p in a space without ends (their logits or logarithms).",
                RoundedDrawsWarning,
                stacklevel=2,
            )
        return None if std_error is None else torch.where(share > 0, math.nan, std_error)


def _open_ends(q: Distribution) -> Bounds | None:
    """Return the ends that no draw of q can lie on; None if there are none, or none are known."""
    if is_discrete(q) or isinstance(flatten_independent(q)[0], (Uniform, VonMises)):
        return None
    support = believed_support(q)
    bounds = Bounds(0.0, math.inf) if support and innermost(support) is constraints.simplex else bounds_of(q)
    ends = () if bounds is None else (bounds.lower, bounds.upper)
    return bounds if any(isinstance(end, Tensor) or math.isfinite(end) for end in ends) else None


def _is_on(ends: Bounds, x: Located) -> Tensor:
    """Return where points have the value of a finite end, and their distance to it is lost; torch's draws stop at tiny.

    Points beyond an end are the draws of a parameter outside its domain.
    """
    near = ends.lower + torch.finfo(x.x.dtype).tiny
    below = (x.x >= ends.lower) & (x.x <= near) if x.log_below is None else x.log_below == -math.inf
    above = x.x == ends.upper if x.log_above is None else x.log_above == -math.inf
    return (below | above) & x.x.isfinite()
