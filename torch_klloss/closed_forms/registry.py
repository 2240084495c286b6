"""Table of closed forms: from a pair (q, p) to the rule that computes its KL.

The library keeps a table of its own and asks it together with torch's; torch's table is read, never written to.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.kl import _KL_REGISTRY as _TORCH_RULES

from torch_klloss.distributions.checks import check_common_measure, check_pair, type_name
from torch_klloss.distributions.domains import where_outside
from torch_klloss.distributions.precision import HALF, in_floating_point, pair_in_full_precision
from torch_klloss.distributions.simplify import peel, simplify
from torch_klloss.distributions.tensors import device_of, dtype_of, lacks_float64, on_host, on_shared_device
from torch_klloss.estimate import NoRouteError, NotCertifiedError
from torch_klloss.numerics.dimensions import common_shape, sum_last
from torch_klloss.numerics.tracing import is_traced

Rule = Callable[[Any, Any], Tensor]
Types = tuple[type[Distribution], type[Distribution]]
_RuleT = TypeVar("_RuleT", bound=Rule)

_RULES: dict[Types, Rule] = {}


class Match(NamedTuple):
    """A rule, and the pair of types that it was registered for."""

    rule: Rule
    types: Types

    @property
    def is_ours(self) -> bool:
        """Whether the rule is this library's, and not torch's."""
        return _RULES.get(self.types) is self.rule

    def rival(self) -> Match | None:
        """Return the match with the rule that another library has put into torch's table for the same types, if any."""
        rule = _TORCH_RULES.get(self.types) if self.is_ours else None
        return None if rule is None or rule.__module__.startswith("torch.") else Match(rule, self.types)


class Resolution(NamedTuple):
    """The rule for a pair, and the simple pair that it is called with.

    Attributes:
        match: the rule.
        q: what is left of q once everything that it shares with p has been taken off.
        p: what is left of p.
        num_summed: how many of the last batch dimensions of q and p the KL is summed over.
        densities: the distributions met on the way, each with the type whose density the rule takes it to have.
    """

    match: Match
    q: Distribution
    p: Distribution
    num_summed: int
    densities: tuple[tuple[Distribution, type[Distribution]], ...]


def register_kl(
    type_q: type[Distribution],
    type_p: type[Distribution],
    *,
    supports: Callable[[Any, Any], bool] | None = None,
    summed: Callable[[Any, Any, int], Tensor] | None = None,
    needs_float64: bool | None = None,
) -> Callable[[_RuleT], _RuleT]:
    """Register the decorated function as the closed form of KL(q‖p) for q of `type_q` and p of `type_p`.

    The signature is that of `torch.distributions.register_kl`. The rule takes (q, p), already stripped of a shared
    `Independent`, and returns the KL in nats with the broadcast batch shape. The most specific rule over this
    table and torch's wins; on a tie, this one. torch's own table stays as it is.

    A rule may raise `NotImplementedError` for instances that it has no formula for. On a tie, the rule that another
    library has put into torch's table is then asked.

    Args:
        type_q: the type of the distribution that the expectation is under.
        type_p: the type of the other one.
        supports: says for which instances (q, p) the rule has a formula; without it, `has_closed_form` finds out
            by running the rule. May also be set as the attribute `supports` of the rule.
        summed: computes (q, p, n): the KL summed over its last n dimensions, where that can be done faster than by the
            rule followed by a sum. It is taken for a pair that was stripped of an `Independent`, and for dimensions
            that a loss sums.
        needs_float64: whether the rule computes in float64. On a device that has none it is then given a pair on the
            CPU, and its result is brought to the device of q. By default the library's own rules do, and others do not.

    Raises:
        TypeError: if one of the types is not a subclass of `torch.distributions.Distribution`.

    Examples:
        >>> import torch
        >>> from torch.distributions import Normal, StudentT
        >>> from torch_klloss import kl_divergence, register_kl
        >>> class UnitNormal(Normal):
        ...     def __init__(self, loc):
        ...         super().__init__(loc, torch.ones_like(loc))
        >>> @register_kl(UnitNormal, UnitNormal)
        ... def _unit_normal(q, p):
        ...     return (q.loc - p.loc) ** 2 / 2
        >>> kl_divergence(UnitNormal(torch.tensor(3.0)), UnitNormal(torch.tensor(1.0)))
        tensor(2.)
    """
    for cls in (type_q, type_p):
        if not (isinstance(cls, type) and issubclass(cls, Distribution)):
            raise TypeError(f"register_kl takes two subclasses of torch.distributions.Distribution, got {cls!r}.")

    def decorator(rule: _RuleT) -> _RuleT:
        if supports is not None:
            rule.supports = supports  # type: ignore[attr-defined]
        if summed is not None:
            rule.summed = summed  # type: ignore[attr-defined]
        needed = rule.__module__.startswith("torch_klloss.") if needs_float64 is None else needs_float64
        rule.needs_float64 = needed  # type: ignore[attr-defined]
        _RULES[type_q, type_p] = rule
        return rule

    return decorator


def kl_divergence(q: Distribution, p: Distribution) -> Tensor:
    """Compute KL(q‖p) = E_q[log q - log p] exactly, in nats; a drop-in for `torch.distributions.kl_divergence`.

    Value and gradient are those of the registered closed form. A subclass inherits the rule of its parents, as
    with torch. Half-precision parameters are computed with in float32, and the result is rounded back.

    Args:
        q: the distribution that the expectation is under, `[*batch, *event]`.
        p: the other one; its batch shape broadcasts against q's.

    Returns:
        The KL, of the broadcast batch shape. `inf` where p lacks q's support.

    Raises:
        NotImplementedError: if no closed form is registered for the pair, or the registered one has none for these
            instances.
        ValueError: if the event shapes differ, the batch shapes do not broadcast, or q is discrete and p continuous.
        TypeError: if q or p is not a distribution.

    Examples:
        >>> from torch.distributions import Normal
        >>> from torch_klloss import kl_divergence
        >>> kl_divergence(Normal(1.0, 1.0), Normal(0.0, 1.0))
        tensor(0.5000)
    """
    batch_shape = check_pair(q, p)
    full_q, full_p = pair_in_full_precision(q, p)
    resolution = resolve(full_q, full_p)
    if resolution is None:
        refuse(q, p)
    value = evaluate(resolution, batch_shape)
    if full_q is q and full_p is p:
        return value
    dtype = dtype_of(q, p)
    return value.to(dtype) if dtype in HALF else value


def has_closed_form(q: Distribution, p: Distribution) -> bool:
    """Return whether `kl_divergence(q, p)` has a closed form for these very instances; an infinite one counts.

    The rule's own `supports(q, p)` answers where it has one; otherwise the rule is run without gradients.

    Raises:
        ValueError: if the event shapes differ, or the batch shapes do not broadcast.
        TypeError: if q or p is not a distribution.

    Examples:
        >>> from torch.distributions import Gamma, Normal, StudentT
        >>> from torch_klloss import has_closed_form
        >>> has_closed_form(Gamma(2.0, 1.0), Normal(0.0, 1.0)), has_closed_form(Normal(0.0, 1.0), StudentT(4.0))
        (True, False)
    """
    batch_shape = check_pair(q, p)
    q, p = on_shared_device(q, p)
    resolution = resolve(in_floating_point(q), in_floating_point(p))
    return resolution is not None and has_formula(resolution, batch_shape)


def resolve(q: Distribution, p: Distribution) -> Resolution | None:
    """Return the rule for the pair with the simple pair that it takes; None where there is no rule.

    A shared `Independent` is peeled. Where only the structure of a pair leads on, it is simplified, once, and the rule
    of the simpler pair is taken.
    """
    q, p, peeled = peel(q, p)
    match = find_rule(q, p)
    if match is None:
        return None
    densities = ((q, match.types[0]), (p, match.types[1]))
    if match.rule is not structural:
        return Resolution(match, q, p, peeled, densities)
    simple_q, simple_p, taken_off = simplify(q, p)
    is_simple = simple_q is q and simple_p is p
    simpler = None if is_simple else resolve(*pair_in_full_precision(simple_q, simple_p))
    if simpler is None:
        rival = match.rival()
        return None if rival is None else Resolution(rival, q, p, peeled, densities)
    num_summed = peeled + taken_off + simpler.num_summed
    return simpler._replace(num_summed=num_summed, densities=densities + simpler.densities)


def structural(q: Distribution, p: Distribution) -> Tensor:
    """Stand for a pair whose structure may lead to a simpler pair; `resolve` follows it, and nothing calls it.

    A transform that is not injective, such as the absolute value, maps different distributions to the same one: it is
    not taken off.
    """
    return kl_divergence(q, p)


def has_formula(resolution: Resolution, batch_shape: torch.Size) -> bool:
    """Return whether the rule has a formula for these instances: it says so, or is run without gradients."""
    supports = getattr(resolution.match.rule, "supports", None)
    if supports is not None and (supports(resolution.q, resolution.p) or resolution.match.rival() is None):
        return bool(supports(resolution.q, resolution.p))
    try:
        with torch.no_grad():
            evaluate(resolution, batch_shape)
    except (NotImplementedError, NotCertifiedError):
        return False
    return True


def find_rule(q: Distribution, p: Distribution) -> Match | None:
    """Return the most specific rule for the pair over both tables, ours on a tie.

    Specific means near in the method resolution order, of q first and then of p, which is torch's order; where p
    first would lead elsewhere, the match is ambiguous and a `RuntimeWarning` says so, as torch's does.
    """
    for type_q in type(q).__mro__:
        for type_p in type(p).__mro__:
            types = (type_q, type_p)
            if types in _RULES or types in _TORCH_RULES:
                if types != (type(q), type(p)):
                    _warn_if_ambiguous(q, p, types)
                return Match(_rule_at(types), types)
    return None


def evaluate(resolution: Resolution, batch_shape: torch.Size, num_summed: int = 0) -> Tensor:
    """Return the KL in the broadcast batch shape of the pair, summed over so many of its last dimensions."""
    match, q, p, peeled, _ = resolution
    if getattr(match.rule, "needs_float64", False) and lacks_float64(q, p):
        host_q, host_p = on_host(q, p)
        value = evaluate(resolution._replace(q=host_q, p=host_p), batch_shape, num_summed)
        return value.to(device_of(q))
    try:
        value = _by_rule(match, q, p, peeled + num_summed, batch_shape)
    except NotImplementedError as error:
        rival = match.rival()
        if rival is None:
            refuse(q, p, because=str(error))
        return evaluate(resolution._replace(match=rival), batch_shape, num_summed)
    shape = batch_shape[: len(batch_shape) - num_summed]
    return value if value.shape == shape else value.expand(shape)


def _by_rule(match: Match, q: Distribution, p: Distribution, num_summed: int, batch_shape: torch.Size) -> Tensor:
    """Return the rule's KL of the simple pair, NaN outside of the parameters' domains, summed."""
    summed, outside = getattr(match.rule, "summed", None), _where_masked(match.rule, q, p)
    if summed is not None and num_summed and outside is None:
        value: Tensor = summed(q, p, num_summed)
        return value
    value = match.rule(q, p) if match.is_ours else _call_torch(match.rule, q, p)
    value = _of_shape(value, q, p, match)
    if outside is not None:
        value = torch.where(outside.to(value.device), math.nan, value)
    return sum_last(value, num_summed)


def _where_masked(rule: Rule, q: Distribution, p: Distribution) -> Tensor | None:
    """Return where the KL must be made NaN: on an accelerator and while traced, some rules do so themselves."""
    if getattr(rule, "is_nan_outside", False) and (is_traced() or device_of(q).type != "cpu"):
        return None
    return where_outside(q, p)


def _of_shape(value: Tensor, q: Distribution, p: Distribution, match: Match) -> Tensor:
    """Return the value of a rule, which must have the broadcast batch shape: any other would be broadcast."""
    if value.shape == q.batch_shape == p.batch_shape:
        return value
    shape = common_shape(q.batch_shape, p.batch_shape)
    if value.shape != shape:
        types = "‖".join(cls.__name__ for cls in match.types)
        raise ValueError(
            f"the closed form of KL({types}) must return the broadcast batch shape {tuple(shape)}, got "
            f"{tuple(value.shape)}: it must sum over the event, and over no batch dimension."
        )
    return value


def refuse(q: Distribution, p: Distribution, because: str = "") -> NoReturn:
    """Raise the error for a pair without a closed form, which says what to do instead.

    Raises:
        ValueError: if one of the two is discrete and the other continuous, so that there is no KL at all.
        NotImplementedError: otherwise.
    """
    check_common_measure(q, p)
    raise NoRouteError(_refusal, q, p, because)


def _refusal(q: Distribution, p: Distribution, because: str) -> str:
    because = because or _what_structure_leaves(q, p)
    detail = f" for these instances ({because})" if because else ""
    return (
        f"No closed form is registered for KL({type_name(q)}‖{type_name(p)}){detail}. Use AutoKL(), which samples "
        f"where there is none, or MonteCarloKL(num_samples=…); or register one with @register_kl({type(q).__name__}, "
        f"{type(p).__name__})."
    )


def _what_structure_leaves(q: Distribution, p: Distribution) -> str:
    """Return why a pair behind transforms has no closed form; empty for any other pair."""
    q, p, _ = peel(q, p)
    match = find_rule(q, p)
    if match is None or match.rule is not structural:
        return ""
    simple_q, simple_p, _ = simplify(q, p)
    if simple_q is q and simple_p is p:
        return (
            "a transform is taken off where both end with it, or the other one is a family that it maps to a family; "
            "it must be injective and, where it learns, the same object"
        )
    return f"the pair simplifies to KL({type_name(simple_q)}‖{type_name(simple_p)}), which has none"


def _call_torch(rule: Rule, q: Distribution, p: Distribution) -> Tensor:
    """Return the KL by a rule of torch's, on the terms that it needs."""
    if q.batch_shape != p.batch_shape:  # it may write through a boolean mask of one side's shape
        shape = torch.broadcast_shapes(q.batch_shape, p.batch_shape)
        with suppress(NotImplementedError):  # other people's classes need no expand, and their rules do without
            q, p = q.expand(shape), p.expand(shape)
    if torch.is_grad_enabled():
        return rule(q, p)
    with torch.enable_grad():  # the one for exponential families differentiates on its way
        return rule(q, p).detach()


def _rule_at(types: Types) -> Rule:
    rule = _RULES.get(types)
    return _TORCH_RULES[types] if rule is None else rule


def _warn_if_ambiguous(q: Distribution, p: Distribution, chosen: Types) -> None:
    for type_p in type(p).__mro__:
        for type_q in type(q).__mro__:
            types = (type_q, type_p)
            if Distribution not in types and (types in _RULES or types in _TORCH_RULES):  # one for all yields to any
                if _rule_at(types) is not _rule_at(chosen):
                    warnings.warn(
                        f"KL({type(q).__name__}‖{type(p).__name__}) is ambiguous between the rules for "
                        f"{chosen[0].__name__}‖{chosen[1].__name__} and {type_q.__name__}‖{type_p.__name__}; the "
                        f"first is taken. Register one for ({type(q).__name__}, {type(p).__name__}).",
                        RuntimeWarning,
                        stacklevel=4,
                    )
                return
