"""Outcomes of probability zero, which torch's log_prob gives a small one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Distribution,
    Geometric,
    Independent,
    MixtureSameFamily,
    Multinomial,
    NegativeBinomial,
    OneHotCategorical,
    Poisson,
)


def is_impossible(d: Distribution, x: Tensor) -> Tensor | None:
    """Return where d, given by probabilities of exactly 0 or 1, has no mass, `[*sample, *batch]`; None for nowhere.

    Args:
        d: the distribution.
        x: points `[*sample, *batch, *event]`.
    """
    if isinstance(d, Multinomial):
        return (_is_zero(d._categorical) & (x > 0)).any(-1) if _gives_probs(d._categorical) else None
    if isinstance(d, OneHotCategorical):
        d, x = d._categorical, x.argmax(-1)
    if not isinstance(d, (Categorical, Bernoulli, Binomial)) or not _gives_probs(d):
        return None
    if isinstance(d, Categorical):
        index, never = torch.broadcast_tensors(x.long().unsqueeze(-1), _is_zero(d))
        return never.gather(-1, index[..., :1].clamp(0, never.shape[-1] - 1)).squeeze(-1)
    most = d.total_count if isinstance(d, Binomial) else 1
    return ((d.probs == 0) & (x > 0)) | ((d.probs == 1) & (x < most))


def lacks_an_outcome(q: Distribution, p: Distribution) -> Tensor | None:
    """Return where an outcome of q has probability zero under p, by their parameters, `[*batch]`; None if not known.

    A sample shows that only if the outcome is drawn.
    """
    if isinstance(q, Independent) and isinstance(p, Independent):
        if q.reinterpreted_batch_ndims != p.reinterpreted_batch_ndims:
            return None
        lacks = lacks_an_outcome(q.base_dist, p.base_dist)
        return None if lacks is None else lacks.flatten(-q.reinterpreted_batch_ndims).any(-1)
    of_q, of_p = _missing(q), _missing(p)
    if of_q is None or of_p is None or of_q.shape[-1] != of_p.shape[-1]:
        return None
    return (of_p & ~of_q).any(-1)


def _missing(d: Distribution) -> Tensor | None:
    """Return which classes have probability zero, or whether a count has none above 0 and none below its greatest."""
    if isinstance(d, MixtureSameFamily):
        each, unused = _missing(d.component_distribution), _is_zero(d.mixture_distribution)
        return None if each is None else (each | unused.unsqueeze(-1)).all(-2)
    if isinstance(d, (OneHotCategorical, Multinomial)):
        return _is_zero(d._categorical)
    if isinstance(d, Categorical):
        return _is_zero(d)
    if isinstance(d, (Bernoulli, Binomial)):
        ends = (d.probs == 0, d.probs == 1) if _gives_probs(d) else (d.logits == -torch.inf, d.logits == torch.inf)
        return torch.stack(ends, -1)
    never_above = _is_always_zero(d)
    return None if never_above is None else torch.stack([never_above, torch.zeros_like(never_above)], -1)


def _is_always_zero(d: Distribution) -> Tensor | None:
    """Return whether a count without a greatest one is 0 for certain; None if d is no such count."""
    if isinstance(d, Poisson):
        return d.rate == 0
    if isinstance(d, Geometric):
        return d.probs == 1 if _gives_probs(d) else d.logits == torch.inf
    if isinstance(d, NegativeBinomial):
        return (d.probs == 0 if _gives_probs(d) else d.logits == -torch.inf) | (d.total_count == 0)
    return None


def _is_zero(d: Categorical) -> Tensor:
    """Return which classes have the probability zero; that of finite logits may only round to it."""
    return d.probs == 0 if _gives_probs(d) else d.logits == -torch.inf


def _gives_probs(d: Any) -> bool:
    """Return whether d was made from probabilities: torch computes the others on demand, and stores them second."""
    return next((key for key in d.__dict__ if key in ("raw_logits", "probs", "logits")), None) == "probs"
