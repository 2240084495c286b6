"""torch_klloss/auditing/training_step/together.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_klloss.auditing.training_step.comparison import Held
from torch_klloss.auditing.training_step.gradient import misses_loss, nodes_of
from torch_klloss.auditing.training_step.record import Checked, Number, is_same
from torch_klloss.auditing.training_step.report import ModuleVerdict
from torch_klloss.auditing.training_step.watcher import Watcher

UNREACHED = "does-not-reach-the-loss"
_OF_TERMS: dict[ModuleVerdict, str] = {  # the worst first
    "wrong": "are not all right",
    "cannot tell": "are not all known",
    "right": "are right",
}


@dataclass(frozen=True)
class Judged:
    """Hold what came of a number.

    Attributes:
        group: the number by all of its names.
        number: the one of them that tells most.
        held: what came of it.
    """

    group: list[Number]
    number: Number
    held: Held


def groups_of(run: Watcher) -> list[list[Number]]:
    """Return the numbers of a step, those that are one together, without what this library's losses returned."""
    groups: list[list[Number]] = []
    for number in run.numbers:
        if not _is_checked(number.value, run.checked):
            same = next((group for group in groups if is_same(group[0].value, number.value)), None)
            groups.append([number]) if same is None else same.append(number)
    return groups


def _is_checked(value: Tensor, checked: Sequence[Checked]) -> bool:
    """Return whether a number is what one of this library's losses returned, as it was or reduced."""
    for call in checked:
        output = call.output.detach()
        forms = [output, output.sum(), output.mean(), torch.tensor(call.per_example)]
        if output.dim() > 1:
            forms += [output.flatten(1).sum(1), output.flatten(1).sum(1).mean()]
        flat = [form.double().reshape(-1) for form in forms if form.numel() == value.numel()]
        if any(torch.allclose(form, value.double().reshape(-1)) for form in flat):
            return True
    return False


def as_sum(one: Judged, judged: Sequence[Judged]) -> Judged:
    """Return what is known of a number that is the sum of others, of one function's calls or of one function."""
    is_told = one.held.verdict == "right" or any(" + " not in mistake for mistake in one.held.mistakes)
    if is_told or one.number.value.numel() != 1:
        return one
    others = [other for other in judged if other is not one and other.number.value.numel() == 1]
    others = [other for other in others if not math.isnan(other.held.expected)]
    places: tuple[Callable[[Number], Hashable], ...] = (lambda n: (n.seen.code, n.label), lambda n: n.seen.place)
    for place in places:
        for key in dict.fromkeys(place(other.number) for other in others):
            terms = [other for other in others if place(other.number) == key]
            total = sum(float(term.number.value) for term in terms)
            if len(terms) > 1 and math.isclose(total, float(one.number.value), rel_tol=1e-5):
                return replace(one, held=_sum_of(terms))
    return one


def _sum_of(terms: Sequence[Judged]) -> Held:
    names = " + ".join(dict.fromkeys(f"{t.number.label} of {t.number.seen.code.co_name}" for t in terms))
    worst = min((t.held for t in terms), key=lambda held: list(_OF_TERMS).index(held.verdict))
    return replace(
        worst,
        explanation=f"it is the sum of {len(terms)} others, {names}, which {_OF_TERMS[worst.verdict]}",
        got=sum(t.held.got for t in terms),
        expected=sum(t.held.expected for t in terms),
        is_formula=False,
    )


def is_on_the_way(one: Judged, judged: Sequence[Judged]) -> bool:
    """Return whether a number is no KL yet, but what a right one is made of."""
    if one.held.verdict == "right":
        return False
    formulas = [n for other in judged if other.held.verdict == "right" and other.held.is_formula for n in other.group]
    nodes = nodes_of(*(n.live for n in formulas if n.live is not None))
    return any(n.live is not None and n.live.grad_fn is not None and n.live.grad_fn in nodes for n in one.group)


def in_the_loss(one: Judged, judged: Sequence[Judged], run: Watcher) -> Judged:
    """Return a number as it is, or with what is wrong where it does not reach the loss, and none of the same q does."""
    held = one.held
    if held.pair is None or held.verdict == "cannot tell":
        return one
    alike = [n for o in judged if o.held.pair is not None and o.held.pair.shares_q(held.pair) for n in o.group]
    if not misses_loss(run, held.pair, [*one.group, *alike]):
        return one
    detached = not any(n.live is not None and n.live.requires_grad for n in one.group)
    how = "it is detached, or computed under no_grad" if detached else "it is no part of what training_step returns"
    value = "its value is the KL's" if held.verdict == "right" else held.explanation
    said = f"{value}, but the KL does not reach the loss: {how}"
    mistakes = tuple(f"{mistake} + {UNREACHED}" for mistake in held.mistakes) or (UNREACHED,)
    return replace(one, held=replace(held, verdict="wrong", explanation=said, mistakes=mistakes))
