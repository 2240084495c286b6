"""Methods: objects that turn a pair of distributions into a `KLEstimate`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.distributions.checks import check_pair, type_name
from torch_klloss.distributions.precision import in_floating_point
from torch_klloss.distributions.tensors import device_of, is_transparent, on_host, on_shared_device
from torch_klloss.estimate import KLEstimate
from torch_klloss.estimate import NotCertifiedError as NotCertifiedError  # methods raise it, and closed forms too
from torch_klloss.numerics.dimensions import sum_last


class Method(Protocol):
    """An object that turns a pair of distributions into a `KLEstimate`.

    `estimate` is all that is needed. A method that cannot take every pair raises `NotImplementedError` (no such
    route) or `NotCertifiedError` (a number that it cannot certify); on those two, and no others, `FirstOf` goes on to
    its next method. Three more attributes are used where they exist: `name`, by which `route` calls the method;
    `supports(q, p)`, which says without drawing or evaluating a density whether the method takes the pair (None:
    only computing can tell); and `route(q, p)`, for a method that chooses among others.

    Examples:
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


class BaseMethod(ABC):
    """A method of this library. The pair is checked once: by `estimate`, or by the loss or method that asks this one.

    Attributes:
        name: what `route` and `KLEstimate.method` call it.
    """

    name: ClassVar[str]

    def estimate(self, q: Distribution, p: Distribution, generator: torch.Generator | None = None) -> KLEstimate:
        """Return the KL of every batch element, with its error.

        Args:
            q: the distribution that the expectation is under, `[*batch, *event]`.
            p: the other one; its batch shape broadcasts against q's.
            generator: where a sampling method takes its randomness from.

        Returns:
            The KL in nats, of the broadcast batch shape.

        Raises:
            NotImplementedError: if the method has no route for the pair.
            NotCertifiedError: if it found a number that it cannot certify.
            ValueError: if the shapes do not fit, or q is discrete and p continuous, or the reverse.
            TypeError: if q or p is not a distribution.
        """
        batch_shape = check_pair(q, p)
        q, p = on_shared_device(q, p)
        return self.estimate_checked(in_floating_point(q), in_floating_point(p), batch_shape, generator)

    @abstractmethod
    def estimate_checked(
        self, q: Distribution, p: Distribution, batch_shape: torch.Size, generator: torch.Generator | None = None
    ) -> KLEstimate:
        """Return what `estimate` does, of a pair that `check_pair` found to have this batch shape."""

    def value_checked(
        self,
        q: Distribution,
        p: Distribution,
        batch_shape: torch.Size,
        num_summed: int,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the KL alone, summed over so many of its last dimensions: all that a training step needs."""
        return sum_last(self.estimate_checked(q, p, batch_shape, generator).value, num_summed)

    def supports(self, q: Distribution, p: Distribution) -> bool | None:
        """Return whether the method takes the pair; None where only computing can tell."""
        return None

    def route(self, q: Distribution, p: Distribution) -> str | None:
        """Return the route that the method would take on the pair; None where it would refuse it."""
        return self.name if self.supports(q, p) is not False else None


def estimate_on_host(method: BaseMethod, q: Distribution, p: Distribution, batch_shape: torch.Size) -> KLEstimate:
    """Return what a deterministic method gives of copies on the CPU, on the device of q.

    It is how a method that computes in float64 runs where the device has none.

    Raises:
        NotImplementedError: if a network, which cannot be copied along, may be behind q or p.
    """
    device = device_of(q)
    for d in (q, p):
        if not is_transparent(d):
            raise NotImplementedError(
                f"{type(method).__name__} computes in float64, which {device} has not, and {type_name(d)} may hold "
                "more than the tensors that can be copied to the CPU: use MonteCarloKL, or a pair on the CPU."
            )
    host_q, host_p = on_host(q, p)
    found = method.estimate_checked(host_q, host_p, batch_shape)
    bound = None if found.error_bound is None else found.error_bound.to(found.value.dtype).to(device)
    return replace(found, value=found.value.to(device), error_bound=bound)


@dataclass(frozen=True)
class _UserMethod(BaseMethod):
    """A method that a user wrote, with the attributes that it may lack."""

    method: Any

    @property
    def name(self) -> str:  # type: ignore[override]
        return str(getattr(self.method, "name", type(self.method).__name__))

    def estimate_checked(
        self, q: Distribution, p: Distribution, batch_shape: torch.Size, generator: torch.Generator | None = None
    ) -> KLEstimate:
        return self.method.estimate(q, p, generator)

    def supports(self, q: Distribution, p: Distribution) -> bool | None:
        return self.method.supports(q, p) if hasattr(self.method, "supports") else None

    def route(self, q: Distribution, p: Distribution) -> str | None:
        return self.method.route(q, p) if hasattr(self.method, "route") else super().route(q, p)


def as_method(method: Any) -> BaseMethod:
    """Return the method with all that a `BaseMethod` has.

    Raises:
        TypeError: if `method` has no `estimate`.
    """
    if isinstance(method, BaseMethod):
        return method
    if not callable(getattr(method, "estimate", None)) or isinstance(method, type):
        raise TypeError(
            f"a method must have estimate(q, p, generator=None), as ClosedForm() and MonteCarlo(64) do, got {method!r}."
        )
    return _UserMethod(method)
