"""Checks that every pair (q, p) has to pass before its KL is computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import NoReturn, ParamSpec

import torch
from torch.distributions import (
    Distribution,
    Independent,
)

from torch_klloss.distributions.stated_supports import is_discrete

_P = ParamSpec("_P")


def check_pair(q: Distribution, p: Distribution) -> torch.Size:
    """Return the broadcast batch shape of q and p, once their shapes are known to fit.

    Raises:
        TypeError: if q or p is not a distribution.
        ValueError: if the event shapes differ, or the batch shapes do not broadcast.
    """
    if not (isinstance(q, Distribution) and isinstance(p, Distribution)):
        _refuse_kind(q, p)
    if q.event_shape != p.event_shape:
        _refuse_event_shapes(q, p)
    if q.batch_shape == p.batch_shape or not p.batch_shape:  # torch.broadcast_shapes takes its time
        return q.batch_shape
    try:
        return torch.broadcast_shapes(q.batch_shape, p.batch_shape)
    except RuntimeError:
        raise ValueError(
            f"q and p must have batch shapes that broadcast, got {tuple(q.batch_shape)} and {tuple(p.batch_shape)} "
            f"(event shape {tuple(q.event_shape)}): .expand() one of them, or use Independent to turn batch "
            "dimensions into event dimensions."
        ) from None


def check_common_measure(q: Distribution, p: Distribution) -> None:
    """Raise a ValueError if one of the two is discrete and the other continuous."""
    discrete = is_discrete(q), is_discrete(p)
    if None in discrete or discrete[0] == discrete[1]:
        return
    kinds = ["discrete" if d else "continuous" for d in discrete]
    raise ValueError(
        f"KL({type_name(q)}‖{type_name(p)}) is not defined: q is {kinds[0]} and p is {kinds[1]}, so that their "
        "log_prob are taken against different measures and cannot be subtracted. Make both discrete or both continuous."
    )


def type_name(d: Distribution) -> str:
    """Return the type of `d` as its expression would show it: Independent(Normal, 1)."""
    if isinstance(d, Independent):
        return f"{type(d).__name__}({type_name(d.base_dist)}, {d.reinterpreted_batch_ndims})"
    return type(d).__name__


def built_first(init: Callable[_P, None]) -> Callable[_P, None]:
    """Have the constructor of a loss say so where it is given the q and p of a call."""

    @wraps(init)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> None:
        if any(isinstance(argument, Distribution) for argument in args):
            name = type(args[0]).__name__
            raise TypeError(f"{name} is built first and then called with q and p: loss = {name}(…); loss(q, p).")
        init(*args, **kwargs)

    return checked


def _refuse_kind(q: object, p: object) -> NoReturn:
    which, got = ("p", p) if isinstance(q, Distribution) else ("q", q)
    raise TypeError(
        f"{which} must be a torch.distributions.Distribution, got {type(got).__name__}. For log-probabilities at "
        "samples use kl_from_log_probs; for a mean and a log-variance build q with diagonal_normal(mean, logvar), for "
        "the logits or log-probabilities of classes with categorical(logits), and for their probabilities with torch's "
        "Categorical(probs)."
    )


def _refuse_event_shapes(q: Distribution, p: Distribution) -> NoReturn:
    message = f"q and p must share an event shape, got {tuple(q.event_shape)} and {tuple(p.event_shape)}"
    missing = len(q.event_shape) - len(p.event_shape)
    if missing == 0:
        raise ValueError(f"{message}: they would broadcast silently. Give both the same number of components.")
    which, short = ("p", p) if missing > 0 else ("q", q)
    missing = abs(missing)
    lacks = (
        ""
        if len(short.batch_shape) >= missing
        else f" Its batch shape {tuple(short.batch_shape)} needs .expand() first."
    )
    raise ValueError(f"{message}: did you mean Independent({which}, {missing})?{lacks}")
