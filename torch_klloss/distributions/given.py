"""The parameter that a distribution was built from; torch stores the other one beside it, rounded and clamped."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.utils import probs_to_logits

from torch_klloss.numerics.tracing import is_traced


class Given(NamedTuple):
    """Whether q and p are given by `probs`, or by `logits`."""

    q_is_probs: bool
    p_is_probs: bool


GIVEN = [Given(q, p) for q in (False, True) for p in (False, True)]


def as_given(d: Distribution, *, is_binary: bool = True) -> tuple[Tensor, bool]:
    """Return the parameter that d was built from, and whether it is `probs`.

    Args:
        d: a distribution given by `probs` or `logits`.
        is_binary: whether there are two outcomes, and not as many classes as the last dimension has entries.
    """
    held = d.__dict__
    if "raw_logits" in held:
        return held["raw_logits"], False
    key = next(key for key in held if key in ("probs", "logits"))
    if key == "probs" and "logits" in held and not _comes_first(d, is_binary):
        key = "logits"
    return held[key], key == "probs"


def both_as_given(q: Distribution, p: Distribution, *, is_binary: bool = True) -> tuple[Tensor, Tensor, Given]:
    """Return the parameters that q and p were built from, and whether they are `probs`."""
    (q_param, q_is_probs), (p_param, p_is_probs) = (as_given(d, is_binary=is_binary) for d in (q, p))
    return q_param, p_param, Given(q_is_probs, p_is_probs)


def _comes_first(d: Distribution, is_binary: bool) -> bool:
    """Return whether the probabilities that d holds are what its logits were computed from.

    torch's `expand` always lists them first. If the logits do not follow from the probabilities, the logits came first.
    """
    probs, logits = d.__dict__["probs"], d.__dict__["logits"]
    if d.__dict__.get("_param") is probs:
        return True
    if is_traced() or probs.is_meta:
        return False
    with torch.no_grad():
        return torch.equal(probs_to_logits(probs, is_binary), logits)
