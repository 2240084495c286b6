"""What a method is."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.distributions import Distribution

from torch_klloss.estimate import KLEstimate
from torch_klloss.estimate import NotCertifiedError as NotCertifiedError  # methods raise it, and closed forms too


class Method(Protocol):
    """An object that turns a pair of distributions into a `KLEstimate`.

    `estimate` is all that is needed. A method that cannot take every pair raises `NotImplementedError` (no such
    route) or `NotCertifiedError` (a number, but one it cannot vouch for); on those two, and no others, `FirstOf` goes
    on to its next method. Two more attributes are used where they exist: `name`, by which `route` calls the method, and
    `supports(q, p)`, which says without drawing or evaluating a density whether the method takes the pair (None:
    only computing can tell).

    Example:
        A method of your own works in every place where the library's do:

        >>> import torch
        >>> from torch_klloss import KLEstimate, KLLoss
        >>> class Jeffreys:
        ...     def estimate(self, q, p, generator=None):
        ...         both = torch.distributions.kl_divergence(q, p) + torch.distributions.kl_divergence(p, q)
        ...         return KLEstimate(both, exact=True, method="jeffreys")
        >>> loss = KLLoss(Jeffreys())
        >>> loss(torch.distributions.Normal(torch.ones(4), 1.0), torch.distributions.Normal(torch.zeros(4), 1.0))
        tensor(1.)
    """

    def estimate(self, q: Distribution, p: Distribution, generator: torch.Generator | None = None) -> KLEstimate:
        """Return the KL of every batch element, with its error."""
        ...


def name_of(method: Any) -> str:
    """Return the name that `route` calls a method by."""
    return str(getattr(method, "name", type(method).__name__))


def route_of(method: Any, q: Distribution, p: Distribution) -> str | None:
    """Return the route that a method would take on the pair; None where it would refuse it."""
    if hasattr(method, "route"):
        route: str | None = method.route(q, p)
        return route
    return name_of(method) if supports(method, q, p) is not False else None


def supports(method: Any, q: Distribution, p: Distribution) -> bool | None:
    """Return whether a method takes the pair; None where only computing can tell."""
    answer: bool | None = method.supports(q, p) if hasattr(method, "supports") else None
    return answer
