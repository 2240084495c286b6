"""The first method that takes the pair."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar, cast

import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.distributions.checks import type_name
from torch_klloss.estimate import KLEstimate
from torch_klloss.methods.base import BaseMethod, Method, NotCertifiedError, as_method

_FoundT = TypeVar("_FoundT")


@dataclass(init=False, repr=False, unsafe_hash=True)
class FirstOf(BaseMethod):
    """Ask the methods in turn and return what the first one that takes the pair returns.

    A method passes by raising `NotImplementedError` or `NotCertifiedError`; any other error is an error. A batch goes
    to one method as a whole. Bias and variance are those of the method taken, which `KLEstimate.method` names.

    Args:
        methods: the preferred method, or a sequence of at least one, the preferred one first.
        others: the methods after it.

    Raises:
        ValueError: if no method is given.
        TypeError: if one of them is no method.

    Examples:
        >>> import torch
        >>> from torch.distributions import Normal, StudentT
        >>> from torch_klloss.methods import ClosedForm, FirstOf, MonteCarlo
        >>> method = FirstOf(ClosedForm(), MonteCarlo(64))
        >>> method.estimate(Normal(0.0, 1.0), Normal(0.0, 2.0)).method
        'closed_form'
        >>> method.estimate(Normal(0.0, 1.0), StudentT(4.0)).method
        'monte_carlo'
    """

    methods: tuple[Method, ...]
    name: ClassVar[str] = "first_of"

    def __init__(self, methods: Method | Sequence[Method] = (), *others: Method) -> None:
        first = tuple(methods) if isinstance(methods, (list, tuple)) else (methods,)
        self.methods = cast("tuple[Method, ...]", (*first, *others))
        if not self.methods:
            raise ValueError("FirstOf needs at least one method, got none: FirstOf(ClosedForm(), MonteCarlo(64)).")
        self._methods = [as_method(method) for method in self.methods]

    def estimate_checked(
        self, q: Distribution, p: Distribution, batch_shape: torch.Size, generator: torch.Generator | None = None
    ) -> KLEstimate:
        """Return the estimate of the first method that takes the pair.

        Raises:
            NotImplementedError: if every method passes; it says what each of them said.
            NotCertifiedError: the same, where at least one method had a number that it could not certify.
        """
        return self._first(lambda method: method.estimate_checked(q, p, batch_shape, generator), q, p)

    def value_checked(
        self,
        q: Distribution,
        p: Distribution,
        batch_shape: torch.Size,
        num_summed: int,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the value alone of the first method that takes the pair; raises as `estimate_checked`."""
        return self._first(lambda method: method.value_checked(q, p, batch_shape, num_summed, generator), q, p)

    def _first(self, ask: Callable[[BaseMethod], _FoundT], q: Distribution, p: Distribution) -> _FoundT:
        """Return what the first method returns that does not pass."""
        refusals: list[NotImplementedError | NotCertifiedError] = []
        for method in self._methods:
            try:
                return ask(method)
            except (NotImplementedError, NotCertifiedError) as refusal:
                refusals.append(refusal)
        tried = "".join(f"\n  {m.name}: {r}" for m, r in zip(self._methods, refusals, strict=True))
        kind = NotCertifiedError if any(isinstance(r, NotCertifiedError) for r in refusals) else NotImplementedError
        raise kind(f"No method took KL({type_name(q)}‖{type_name(p)}):{tried}")

    def route(self, q: Distribution, p: Distribution) -> str | None:
        """Return the name of the method that would be taken, without drawing or evaluating a density.

        "quadrature, else monte_carlo" where only computing can tell; None where every method would pass.
        """
        names = []
        for method in self._methods:
            route = method.route(q, p)
            if route is None:
                continue
            names.append(route)
            if method.supports(q, p):
                break
        return ", else ".join(names) or None

    def supports(self, q: Distribution, p: Distribution) -> bool | None:
        """Return whether one of the methods takes the pair; None where only computing can tell."""
        answers = [method.supports(q, p) for method in self._methods]
        return True if True in answers else None if None in answers else False

    def __repr__(self) -> str:
        return f"FirstOf({', '.join(map(repr, self.methods))})"


@dataclass(frozen=True)
class WarnFirst(BaseMethod):
    """Warn, then let another method estimate: the fallback of AutoKL(on_fallback="warn")."""

    method: BaseMethod
    name: ClassVar[str] = "fallback"

    def estimate_checked(
        self, q: Distribution, p: Distribution, batch_shape: torch.Size, generator: torch.Generator | None = None
    ) -> KLEstimate:
        """Return the estimate of `method`, after a warning that names it and the pair."""
        self._warn(q, p)
        return self.method.estimate_checked(q, p, batch_shape, generator)

    def value_checked(
        self,
        q: Distribution,
        p: Distribution,
        batch_shape: torch.Size,
        num_summed: int,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the value alone, after the same warning."""
        self._warn(q, p)
        return self.method.value_checked(q, p, batch_shape, num_summed, generator)

    def _warn(self, q: Distribution, p: Distribution) -> None:
        warnings.warn(
            f"KL({type_name(q)}‖{type_name(p)}) has no exact route: AutoKL falls back on {self.method.route(q, p)}.",
            stacklevel=3,
        )

    def route(self, q: Distribution, p: Distribution) -> str | None:
        """Return the route of `method`."""
        return self.method.route(q, p)

    def supports(self, q: Distribution, p: Distribution) -> bool | None:
        """Return what `method` supports."""
        return self.method.supports(q, p)


@dataclass(frozen=True)
class Refuse(BaseMethod):
    """Refuse what another method would take: the fallback of AutoKL(on_fallback="error")."""

    method: BaseMethod
    name: ClassVar[str] = "fallback"

    def estimate_checked(
        self, q: Distribution, p: Distribution, batch_shape: torch.Size, generator: torch.Generator | None = None
    ) -> KLEstimate:
        """Raise a `NotImplementedError` that names `method` and says what to do instead."""
        raise NotImplementedError(
            f"on_fallback='error' keeps AutoKL from {self.method.route(q, p)}; take it with on_fallback='warn' or "
            "'allow', or register a closed form with @register_kl."
        )

    def supports(self, q: Distribution, p: Distribution) -> bool:
        """Return False."""
        return False
