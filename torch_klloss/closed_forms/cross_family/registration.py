"""Registration of pairs of unlike families: the declaration of a family, and the rule that a formula becomes."""

from __future__ import annotations

from collections.abc import Callable
from inspect import get_annotations
from itertools import permutations
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.closed_forms.registry import _RULES, Types, register_kl
from torch_klloss.distributions.checks import type_name
from torch_klloss.distributions.domains import where_outside
from torch_klloss.distributions.tails import declared_tails, is_infinite_by_tails
from torch_klloss.distributions.tensors import dtype_of
from torch_klloss.estimate import NotCertifiedError
from torch_klloss.numerics.devices import can_be_read
from torch_klloss.numerics.elementary import infinity
from torch_klloss.numerics.rounded import Rounded

Formula = Callable[..., "Rounded | Tensor"]
_FormulaT = TypeVar("_FormulaT", bound=Formula)

# The largest relative rounding error of a composed KL that is returned; float32 is computed in float64.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}

FAMILIES: dict[type[Distribution], type[Family]] = {}
FORMULAS: dict[Types, Formula] = {}


class Family:
    """Declaration of one family of distributions, by a subclass: its parameters, its moments and its cross-entropy.

    The parameters are the attributes that it annotates, `Rounded` and in float64. As q the family provides its
    `entropy` and the moments that it has methods for; a method may assume that the moment is finite:

    - mean, second, variance: of x; second is E[x²]
    - log_power(k), reciprocal: log E[x^k] and E[1/x], of q on the positive numbers
    - log, log_variance: mean and variance of log x, of q on the positive numbers
    - log1m: E[log(1 - x)], of q on [0, 1]
    - log_laplace(b): log E[exp(-x/b)], for b > 0
    - deviation(m): E|x - m|
    - log_square(m, c): E[log(c² + (x - m)²)]
    - log_affine(c): E[log(1 + c x)], of q on the positive numbers
    - cosine(m): E[cos(x - m)]

    As p it has `cross_entropy(q)`, E_q[-log p], made of the moments of q that it `needs`. A family without these takes
    part in the written formulas alone.

    Args:
        of: the type of distribution.
        placeholders: parameters that replace those of an infinite KL, with light tails, and mass on [¼, ¾] if anywhere.
        needs: the moments that the cross-entropy takes; None where the family cannot be p.
    """

    parameters: ClassVar[tuple[str, ...]]
    placeholders: ClassVar[tuple[float, ...]]
    needs: ClassVar[tuple[str, ...] | None]

    def __init_subclass__(
        cls, of: type[Distribution], placeholders: tuple[float, ...], needs: tuple[str, ...] | None = None
    ) -> None:
        cls.parameters, cls.placeholders, cls.needs = tuple(get_annotations(cls)), placeholders, needs
        FAMILIES[of] = cls

    def __init__(self, *values: Tensor) -> None:
        for key, value in zip(self.parameters, values, strict=True):
            setattr(self, key, Rounded(value))

    def __getattr__(self, key: str) -> Any:
        raise AttributeError(f"{type(self).__name__} does not provide {key}")

    @classmethod
    def parameters_of(cls, d: Any) -> tuple[Tensor, ...]:
        """Return the parameters of an instance, in float64."""
        return tuple([getattr(d, key).double() for key in cls.parameters])

    @classmethod
    def provides(cls, *moments: str) -> bool:
        """Return whether the family provides all of the moments as q."""
        return all(hasattr(cls, moment) for moment in moments)

    def cross_entropy(self, q: Any) -> Rounded:
        """Return E_q[-log p], for the family as p."""
        raise NotImplementedError


def nowhere(*parameters: Tensor) -> None:
    """Return None: the KL is finite for all parameters."""


def cross_family(
    type_q: type[Distribution], type_p: type[Distribution], *, infinite: Callable[..., Tensor | None] | None = None
) -> Callable[[_FormulaT], _FormulaT]:
    """Register a formula of the parameters of q, then of p, which it is given in float64 and in one shape.

    Where the KL is inf its gradient is 0, and the formula is given the placeholders of both families. A formula that
    returns a `Rounded` is refused where its rounding may exceed `TOLERANCE`.

    Args:
        type_q: the family of q.
        type_p: the family of p.
        infinite: returns from the same parameters where the KL is inf. By default the supports and the declared tails
            decide, which may take longer than the formula does.
    """

    def decorator(formula: _FormulaT) -> _FormulaT:
        @register_kl(type_q, type_p)
        def rule(q: Distribution, p: Distribution) -> Tensor:
            family_q, family_p = FAMILIES[type_q], FAMILIES[type_p]
            given = torch.broadcast_tensors(*family_q.parameters_of(q), *family_p.parameters_of(p))
            mask = _by_tails(type_q, q, type_p, p) if infinite is None else infinite(*given)
            outside, parameters = where_outside(q, p), given
            if outside is not None:
                mask = outside if mask is None else mask | outside
            if mask is not None:
                placeholders = family_q.placeholders + family_p.placeholders
                parameters = [torch.where(mask, h, t) for h, t in zip(placeholders, given, strict=True)]
            kl, dtype = formula(*parameters), dtype_of(q, p)
            if isinstance(kl, Rounded):
                kl = _certified(kl, mask, dtype, q, p)
            return (kl if mask is None else torch.where(mask, infinity(*given), kl)).to(dtype)

        rule.__doc__ = formula.__doc__
        FORMULAS[type_q, type_p] = formula
        return formula

    return decorator


def fill_table() -> None:
    """Register every pair of unlike families for which q provides all that p needs, and which has no rule of ours."""
    for (type_q, family_q), (type_p, family_p) in permutations(FAMILIES.items(), 2):
        is_composed = family_p.needs is not None and family_q.provides("entropy", *family_p.needs)
        if is_composed and (type_q, type_p) not in _RULES:
            cross_family(type_q, type_p)(by_moments(family_q, family_p))


def by_moments(family_q: type[Family], family_p: type[Family]) -> Callable[..., Rounded]:
    """Return the formula that composes the KL of a pair from the moments of q."""

    def formula(*parameters: Tensor) -> Rounded:
        """E_q[-log p], of the moments of q that it takes, less the entropy of q."""
        q = family_q(*parameters[: len(family_q.parameters)])
        kl: Rounded = family_p(*parameters[len(family_q.parameters) :]).cross_entropy(q) - q.entropy()
        return kl

    return formula


def _by_tails(type_q: type[Distribution], q: Distribution, type_p: type[Distribution], p: Distribution) -> Tensor:
    """Return where the supports and the declared tails make the KL inf."""
    mask = is_infinite_by_tails(q, p, declared_tails(type_q, q), declared_tails(type_p, p))
    if mask is None:
        raise NotImplementedError("the supports of q and p cannot be compared")
    return mask


def _certified(kl: Rounded, mask: Tensor | None, dtype: torch.dtype, q: Distribution, p: Distribution) -> Tensor:
    """Return the value, once no element outside the mask can have lost more of it to rounding than `TOLERANCE`.

    Raises:
        NotCertifiedError: if one may have; not where values cannot be read, under `torch.compile` and `torch.func` and
            on accelerators.
    """
    if not can_be_read(kl.value):
        return kl.value
    value, tolerance = kl.value.detach(), TOLERANCE.get(dtype, TOLERANCE[torch.float32])
    good = (kl.error <= tolerance * value) | value.isnan()
    good = good if mask is None else good | mask
    if good.all():
        return kl.value
    lost = torch.where(good, 0.0, kl.error / value.abs()).max().item()
    raise NotCertifiedError(
        f"KL({type_name(q)}‖{type_name(p)}) as a sum of moments may lose {lost:.1e} of its value to rounding (allowed: "
        f"{tolerance:g}), because q and p are nearly equal or extreme: use AutoKL(fallback=[...]) with a method that "
        "computes it otherwise, such as quadrature or MonteCarlo."
    )
