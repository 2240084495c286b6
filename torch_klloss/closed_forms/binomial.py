"""Binomial‖Binomial of equal numbers of trials, and of unequal ones where the KL is infinite."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.distributions import Binomial

from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.closed_forms.trials import Trial, careful_trial, quick_trial
from torch_klloss.distributions.given import GIVEN, Given, both_as_given
from torch_klloss.numerics.blocks import Derivatives
from torch_klloss.numerics.custom_gradient import formula_of
from torch_klloss.numerics.devices import can_be_read
from torch_klloss.numerics.elementary import may_fall_to, replaced
from torch_klloss.numerics.quick_kernels import quick_or_careful


def _quick(
    given: Given, needs: Sequence[bool], count: Tensor, q: Tensor, p: Tensor
) -> tuple[Tensor, Derivatives] | None:
    one = quick_trial(given, needs[1], needs[2], q, p)
    return None if one is None else _repeated(needs[0], count, one)


def _careful(given: Given, needs: Sequence[bool], count: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Derivatives]:
    return _repeated(needs[0], count, careful_trial(given, needs[1], needs[2], q, p))


def _of_unequal(
    given: Given, needs: Sequence[bool], q_count: Tensor, p_count: Tensor, q: Tensor, p: Tensor
) -> tuple[Tensor, Derivatives]:
    """Return the KL of numbers that may differ: inf where q has more trials and may succeed, NaN where it has fewer.

    There the derivatives are 0.
    """
    one = careful_trial(given, needs[2], needs[3], q, p)
    more = replaced((q_count - p_count).detach(), q == (0.0 if given.q_is_probs else -torch.inf), 0.0)
    count, without = replaced(p_count, more != 0, 0.0), torch.xlogy(more.sqrt(), torch.inf)
    value, (by_count, by_q, by_p) = _repeated(needs[1], count, one, without)
    return value, (None, by_count, by_q, by_p)


def _repeated(by_count: bool, count: Tensor, one: Trial, without: Tensor | float = 0.0) -> tuple[Tensor, Derivatives]:
    """Return the KL of so many trials, and another number without any; by default none, be it infinite for one."""
    value = count * one.value
    if may_fall_to(count, 0):
        value = torch.where(count == 0, without, value)
    by_q, by_p = (d if d is None else count * d for d in (one.by_q, one.by_p))
    return value, (one.value if by_count else None, by_q, by_p)


_KL = {given: formula_of(quick_or_careful(partial(_quick, given), partial(_careful, given))) for given in GIVEN}
_KL_OF_UNEQUAL = {given: formula_of(partial(_of_unequal, given)) for given in GIVEN}


def _summed(q: Binomial, p: Binomial, num_summed: int) -> Tensor:
    q_param, p_param, given = both_as_given(q, p)
    if _are_equal(q.total_count, p.total_count):
        return _KL[given](p.total_count, q_param, p_param, num_summed=num_summed)
    if can_be_read(q_param, q.total_count, p.total_count):
        succeeds = q_param > (0 if given.q_is_probs else -torch.inf)
        if bool((succeeds & (q.total_count < p.total_count)).any()):
            raise NotImplementedError("q has fewer trials than p; a sum over q's support is exact: Enumeration()")
    return _KL_OF_UNEQUAL[given](q.total_count, p.total_count, q_param, p_param, num_summed=num_summed)


def _are_equal(a: Tensor, b: Tensor) -> bool:
    """Return whether the numbers are known to be equal: they are one tensor, or can be read."""
    return a is b or (can_be_read(a, b) and bool((a == b).all()))


@register_kl(Binomial, Binomial, summed=_summed, needs_float64=False)
def _binomial_binomial(q: Binomial, p: Binomial) -> Tensor:
    """The KL of one trial times their number; inf where q has more trials than p.

    The number does not matter for a q that never succeeds. Where q has fewer trials than p there is no closed form;
    where values cannot be read, under `torch.compile` and `torch.func` and on accelerators, such an element is NaN.

    Raises:
        NotImplementedError: if q has fewer trials than p somewhere.
    """
    return _summed(q, p, 0)
