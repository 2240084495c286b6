"""The terms of KL(q‖p) over the points of a discrete q, each ≥ 0."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_klloss.methods.enumeration.masses import Masses
from torch_klloss.numerics.elementary import e2

_BOUND = 645.0  # stands for log p/q in a derivative where q is zero; the closed forms have the same


def kl_terms(q: Masses, p: Masses) -> Tensor:
    """Return q log(q/p) - q + p, point by point; inf where only p is zero.

    Their sum is the KL where q and p both sum to one over the points. Taken this way, and with the difference of the
    logarithms near equality, an error of the logarithms comes in by its square.
    """
    q_is_zero, p_is_zero = q.log == -math.inf, p.log == -math.inf
    missed, either = p_is_zero & ~q_is_zero, q_is_zero | p_is_zero
    z = torch.where(either, 0.0, p.log) - torch.where(either, 0.0, q.log)
    z = torch.where(q_is_zero & ~p_is_zero, _BOUND, z)
    near = q.value * e2(z.clamp(-1, 1))
    terms = torch.where(z.abs() < 1, torch.where(q_is_zero, p.value - q.value, near), p.value - q.value - q.value * z)
    return torch.where(missed, math.inf, terms)


def settled(kl: Tensor) -> Tensor:
    """Return the KL with a gradient of zero where it is infinite."""
    return torch.where(kl == math.inf, math.inf, kl)
