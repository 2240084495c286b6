"""A number held against all pairs that it may be the KL of, and against these times a weight."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from torch_klloss.auditing.training_step.comparison import Held, compare
from torch_klloss.auditing.training_step.pairs import Pair
from torch_klloss.auditing.training_step.record import Checked, Number, is_same
from torch_klloss.auditing.training_step.report import ModuleVerdict, described
from torch_klloss.auditing.training_step.runs import Runs
from torch_klloss.auditing.training_step.truth import Evidence, Truths
from torch_klloss.auditing.training_step.watcher import Watcher
from torch_klloss.closed_forms import kl_divergence
from torch_klloss.distributions.tensors import tensors_of
from torch_klloss.numerics.graph import nodes_of

_GRADIENT_TOLERANCE = 1e-2  # far above rounding, far below a parameter's share
_SAMPLER = re.compile(r"sampl|repar|latent|(?:^|_)z(?:_|$)")


def misses_loss(run: Watcher, pair: Pair, numbers: Sequence[Number]) -> bool:
    """Return whether the loss depends on q by the samples alone, and not by any of these numbers."""
    loss = _loss_of(run.returned)
    anchors = [t for t in pair.anchors if t.requires_grad]
    if loss is None or not anchors:
        return False
    of_loss = set(nodes_of(loss))
    if any(n.live is not None and (n.live is loss or n.live.grad_fn in of_loss) for n in numbers):
        return False
    of_q = set(nodes_of(*anchors))
    samples = [t for t in _samples_in(run) if t.grad_fn is not None and t.grad_fn not in of_q]
    return of_q.isdisjoint(nodes_of(loss, until={t.grad_fn for t in samples}))


def _loss_of(returned: Any) -> Tensor | None:
    loss = returned.get("loss") if isinstance(returned, Mapping) else getattr(returned, "loss", returned)
    return loss if isinstance(loss, Tensor) and loss.requires_grad else None


def _samples_in(run: Watcher) -> list[Tensor]:
    """Return the samples of the latents, which the reconstruction depends on."""
    found = [t for seen in run.seen for t in seen.samples]
    samplers = (seen for seen in run.seen if _SAMPLER.search(seen.code.co_name.lower()))
    return found + [seen.returned for seen in samplers if isinstance(seen.returned, Tensor)]


def gradient_differs(module: nn.Module, number: Number, pair: Pair) -> bool:
    """Return whether a number with the KL's value has another gradient, where p has none of its own."""
    live = number.live
    if live is None or not live.requires_grad or live._version != number.version or pair.of:
        return False
    if any(t.requires_grad for t in tensors_of(pair.p)):
        return False  # part of it may be left out on purpose, as where a KL is balanced
    wanted: list[Tensor] = [t for t in module.parameters() if t.requires_grad] or [t for t in pair.anchors if t.is_leaf]
    try:
        exact = kl_divergence(pair.q, pair.p).sum()
        scale = float(live.detach().sum() / exact.detach())
        ours = torch.autograd.grad(exact, wanted, retain_graph=True, allow_unused=True)
        its = torch.autograd.grad(live.sum(), wanted, retain_graph=True, allow_unused=True)
    except (RuntimeError, NotImplementedError):
        return False
    off = [
        (torch.zeros(()) if a is None else a.double().cpu())
        - (torch.zeros(()) if b is None else scale * b.double().cpu())
        for a, b in zip(its, ours, strict=True)
    ]
    size = sum(float((scale * b).double().square().sum()) for b in ours if b is not None)
    return sum(float(t.square().sum()) for t in off) > _GRADIENT_TOLERANCE**2 * size


WAY_OUT = "pass pairs=, a function (module, batch) -> {name: (q, p)}, as EstimatorGap takes it"
_LIKELIEST = 4  # pairs of a function for which mistakes are looked for

_Evidence = list[tuple[Pair, str, Evidence]]


@dataclass
class Judge:
    """Judge the numbers of a training step."""

    runs: Runs
    _truths: Truths = field(default_factory=Truths)

    def judge(self, number: Number) -> Held:
        """Hold a number against the pairs of its function, or of the nearest that has some."""
        try:
            evidence = self.runs.evidence(number)
            if not evidence:
                got = float(number.value.sum()) if number.value.numel() == 1 else math.nan
                return Held("cannot tell", f"no q and p were found with it: {WAY_OUT}", got=got)
            return self._right(number, evidence) or self._wrong(number, evidence)
        except Exception as error:
            return Held("cannot tell", f"it could not be compared: {described(error)}")

    def _right(self, number: Number, evidence: _Evidence) -> Held | None:
        """Return which KL a number is, with whether it has its gradient; None if it is none."""
        detached: Held | None = None
        for pair, where, seen in evidence:
            held = compare(seen, self._truths, explained=False)
            if held is not None and held.verdict == "right":
                held = replace(held, pair=pair, where=where)
                if not (held.is_formula and gradient_differs(self.runs.module, number, pair)):
                    return held
                said = "its value is the KL's and its gradient is not: a parameter of q is detached on the way"
                detached = replace(held, verdict="wrong", explanation=said, mistakes=("parameter-without-gradient",))
        return detached

    def _wrong(self, number: Number, evidence: _Evidence) -> Held:
        """Return which mistakes a number has, unless a weight with a name may have made it."""
        explained = []
        for pair, where, seen in evidence[:_LIKELIEST]:
            if (held := compare(seen, self._truths, explained=True)) is not None:
                explained.append(replace(held, pair=pair, where=where))
        best = min(explained, key=lambda held: (held.verdict != "wrong", sum(map(len, held.mistakes))))
        for label, weight in self.runs.weights(number.seen).items():
            for pair, where, seen in evidence if weight not in (0.0, 1.0) else ():
                held = self._weighted(number, label, weight, seen)
                if held is None:
                    continue
                if best.verdict == "wrong" and any(mistake != "constant-factor" for mistake in best.mistakes):
                    said = f"it is the KL times {label}; or {best.explanation}"
                    return replace(best, verdict="cannot tell", explanation=said)
                return replace(held, pair=pair, where=where)
        return best

    def _weighted(self, number: Number, label: str, weight: float, evidence: Evidence) -> Held | None:
        """Return that a number is the KL times a weight, if it is."""
        repeats = [(other.value, self.runs.weights(other.seen).get(label)) for _, other in self.runs.repeats(number)]
        values = tuple(value / its_weight for value, its_weight in repeats if its_weight)
        if len(values) != len(evidence.values):
            return None
        held = compare(Evidence(values, evidence.pairs), self._truths, explained=False)
        if held is None or held.verdict != "right":
            return None
        return replace(held, got=held.got * weight, explanation=f"it is {weight:.4g} times the KL, which is {label}")


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
    nodes = set(nodes_of(*(n.live for n in formulas if n.live is not None)))
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
