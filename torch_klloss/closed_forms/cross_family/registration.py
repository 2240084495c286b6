"""What a family declares, and how the table of pairs fills itself from that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    ContinuousBernoulli,
    Distribution,
    Exponential,
    Gamma,
    Gumbel,
    Laplace,
    Normal,
    Pareto,
    Poisson,
    Uniform,
)

from torch_klloss.closed_forms.registry import _RULES, Types, register_kl
from torch_klloss.distributions.checks import type_name
from torch_klloss.distributions.given import as_given
from torch_klloss.distributions.tails import Tails, compare, declare_tails, declared_tails
from torch_klloss.distributions.tensors import dtype_of
from torch_klloss.estimate import NotCertifiedError
from torch_klloss.numerics.elementary import infinity, log_ratio
from torch_klloss.numerics.rounded import Rounded
from torch_klloss.numerics.tracing import is_traced

# What the rounding of a composed value may be, relative to it, before it is refused; float32 is computed in float64.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}

FAMILIES: dict[type[Distribution], type[Family]] = {}
COMPOSED: dict[Types, Callable[..., Rounded | Tensor]] = {}  # formulas of the parameters of q, then of p


class Family:
    """What one family gives as q, and what its log-density asks of q as p. A subclass is the whole declaration.

    The parameters arrive as attributes, `Rounded` and in float64. As q the family gives its `entropy` and the moments
    that it has methods for; a method may assume that the moment is finite:

    - mean, second, variance: of x; second is E[x²]
    - power(k), reciprocal: E[x^k] and E[1/x], of q on the positive numbers
    - log, log_variance: mean and variance of log x, of q on the positive numbers
    - log1m: E[log(1 - x)], of q on [0, 1]
    - log_laplace(b): log E[exp(-x/b)], for b > 0
    - deviation(m): E|x - m|
    - log_square(m, c): E[log(c² + (x - m)²)]
    - log_affine(c): E[log(1 + c x)], of q on the positive numbers
    - cosine(m): E[cos(x - m)]

    As p it gives `cross_entropy(q)`, E_q[-log p], made of the moments that it `asks` for.

    Args:
        of: the type of distribution.
        parameters: the names of its parameters.
        harmless: parameters that stand in where a KL is infinite, with light tails, and mass on [¼, ¾] if anywhere.
        asks: the moments that the cross-entropy takes; None where the family cannot be p.
        tails: how its densities fall, as `declare_tails` takes it, unless that is declared already.
    """

    of: ClassVar[type[Distribution]]
    parameters: ClassVar[tuple[str, ...]]
    harmless: ClassVar[tuple[float, ...]]
    asks: ClassVar[tuple[str, ...] | None]

    def __init_subclass__(
        cls,
        of: type[Distribution],
        parameters: tuple[str, ...],
        harmless: tuple[float, ...],
        asks: tuple[str, ...] | None = None,
        tails: Callable[[Any], Tails] | None = None,
    ) -> None:
        cls.of, cls.parameters, cls.harmless, cls.asks = of, parameters, harmless, asks
        FAMILIES[of] = cls
        if tails is not None:
            declare_tails(of, tails)

    def __init__(self, *values: Tensor) -> None:
        for key, value in zip(self.parameters, values, strict=True):
            setattr(self, key, Rounded(value))

    def __getattr__(self, key: str) -> Any:
        raise AttributeError(f"{type(self).__name__} does not give {key}")

    @classmethod
    def parameters_of(cls, d: Any) -> tuple[Tensor, ...]:
        """Return the parameters of an instance."""
        return tuple(getattr(d, key) for key in cls.parameters)

    @classmethod
    def gives(cls, moment: str) -> bool:
        """Return whether the family gives a moment as q."""
        return hasattr(cls, moment)

    def cross_entropy(self, q: Any) -> Rounded:
        """Return E_q[-log p], for the family as p."""
        raise NotImplementedError


def fill_table() -> None:
    """Register every pair of unlike families for which q gives all that p asks for, and which has no rule of ours."""
    for type_q, family_q in FAMILIES.items():
        for type_p, family_p in FAMILIES.items():
            if family_p.asks is None or type_q is type_p or not family_q.gives("entropy"):
                continue
            if (type_q, type_p) not in _RULES and all(map(family_q.gives, family_p.asks)):
                register(type_q, type_p, by_moments(family_q, family_p))


def register(type_q: type[Distribution], type_p: type[Distribution], formula: Callable[..., Rounded | Tensor]) -> None:
    """Register a formula of the parameters of q, then of p, which it is given in float64 and in one shape.

    Where the supports and the declared tails say so, the KL is inf with gradient 0. A formula that returns a `Rounded`
    is refused where its rounding may exceed `TOLERANCE`.
    """
    family_q, family_p = FAMILIES[type_q], FAMILIES[type_p]
    harmless = family_q.harmless + family_p.harmless

    def rule(q: Distribution, p: Distribution) -> Tensor:
        dtype = torch.promote_types(dtype_of(q), dtype_of(p))
        given = (t.double() for t in (*family_q.parameters_of(q), *family_p.parameters_of(p)))
        parameters = torch.broadcast_tensors(*given)
        mask = compare(q, p, declared_tails(type_q, q), declared_tails(type_p, p))
        if mask is None:
            raise NotImplementedError("the supports of q and p cannot be compared")
        kept = (torch.where(mask, h, t) for h, t in zip(harmless, parameters, strict=True))
        kl = formula(*kept)
        if isinstance(kl, Rounded):
            if not is_traced():
                _certify(kl, mask, dtype, q, p)
            kl = kl.value
        return torch.where(mask, infinity(*parameters), kl).to(dtype)

    rule.__doc__ = formula.__doc__
    register_kl(type_q, type_p, supports=_runs(rule))(rule)
    COMPOSED[type_q, type_p] = formula


def by_moments(family_q: type[Family], family_p: type[Family]) -> Callable[..., Rounded]:
    """Return the formula that composes the KL of a pair from the moments of q."""

    def formula(*parameters: Tensor) -> Rounded:
        """E_q[-log p], of the moments of q that it takes, less the entropy of q."""
        q = family_q(*parameters[: len(family_q.parameters)])
        kl: Rounded = family_p(*parameters[len(family_q.parameters) :]).cross_entropy(q) - q.entropy()
        return kl

    return formula


def _runs(rule: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], bool]:
    def supports(q: Distribution, p: Distribution) -> bool:
        try:
            with torch.no_grad():
                rule(q, p)
        except (NotImplementedError, NotCertifiedError):
            return False
        return True

    return supports


def _certify(kl: Rounded, mask: Tensor, dtype: torch.dtype, q: Distribution, p: Distribution) -> None:
    value = kl.value.detach()
    tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.float32])
    good = (kl.error <= tolerance * value) | mask | value.isnan()
    if good.all():
        return
    lost = torch.where(good, 0.0, kl.error / value.abs()).max().item()
    raise NotCertifiedError(
        f"KL({type_name(q)}‖{type_name(p)}) as a sum of moments must be good to {tolerance:g} of its value, but "
        f"rounding may take {lost:.1e} of it here, where q and p are near to one another or far from 1: use "
        "AutoKL(fallback=[...]) with a method that computes it otherwise, such as quadrature or MonteCarlo."
    )


Formula = Callable[..., Tensor]

# Parameters that stand in where the KL is infinite whatever the formula says; every pair of them has a finite KL.
_HARMLESS: dict[type[Distribution], tuple[float, ...]] = {
    Beta: (2.0, 2.0),
    ContinuousBernoulli: (1.0,),
    Exponential: (1.0,),
    Gamma: (2.0, 2.0),
    Normal: (0.0, 1.0),
    Pareto: (0.125, 3.0),
    Uniform: (0.25, 0.75),
}


def cross(
    type_q: type[Distribution], type_p: type[Distribution], *, infinite: Formula | None = None
) -> Callable[[Formula], Formula]:
    """Register a formula of the parameters of q, then of p, which it is given in float64 and in one shape.

    Args:
        type_q: the family of q.
        type_p: the family of p.
        infinite: tells from the same parameters where the KL is inf. The gradient is 0 there.
    """

    def decorator(formula: Formula) -> Formula:
        @register_kl(type_q, type_p)
        def rule(q: Distribution, p: Distribution) -> Tensor:
            given = torch.broadcast_tensors(*parameters_of(q), *parameters_of(p))
            if infinite is None:
                value = formula(*given)
            else:
                mask = infinite(*given)
                harmless = _HARMLESS[type_q] + _HARMLESS[type_p]
                kept = (torch.where(mask, h, t) for h, t in zip(harmless, given, strict=True))
                value = torch.where(mask, infinity(*given), formula(*kept))
            return value.to(torch.promote_types(dtype_of(q), dtype_of(p)))

        rule.__doc__ = formula.__doc__
        return formula

    return decorator


def parameters_of(d: Distribution) -> tuple[Tensor, ...]:
    """Return the parameters of d in float64, from those that it was built from.

    They are torch's, but log-odds for a ContinuousBernoulli, and for a Bernoulli the probabilities of 1 and of 0.
    """
    for cls in type(d).__mro__:
        if cls in _PARAMETERS:
            return tuple(t.double() for t in _PARAMETERS[cls](d))
    raise NotImplementedError(f"no parameters are known for {type(d).__name__}")


def _probabilities(d: Bernoulli) -> tuple[Tensor, Tensor]:
    param, is_probs = as_given(d)
    param = param.double()
    return (param, 1 - param) if is_probs else (param.sigmoid(), (-param).sigmoid())


def _log_odds(d: ContinuousBernoulli) -> tuple[Tensor]:
    param, is_probs = as_given(d)
    param = param.double()
    return (log_ratio(param, 1 - param, 2 * param - 1) if is_probs else param,)


_PARAMETERS: dict[type[Distribution], Callable[[Any], tuple[Tensor, ...]]] = {
    Bernoulli: _probabilities,
    Beta: lambda d: (d.concentration1, d.concentration0),
    ContinuousBernoulli: _log_odds,
    Exponential: lambda d: (d.rate,),
    Gamma: lambda d: (d.concentration, d.rate),
    Gumbel: lambda d: (d.loc, d.scale),
    Laplace: lambda d: (d.loc, d.scale),
    Normal: lambda d: (d.loc, d.scale),
    Pareto: lambda d: (d.scale, d.alpha),
    Poisson: lambda d: (d.rate,),
    Uniform: lambda d: (d.low, d.high),
}
