"""The judgement of the numbers of a training step, by value, by gradient and as part of the loss."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from torch_klloss.auditing.experiment.calling import described
from torch_klloss.auditing.training_step.comparison import Comparison, compare
from torch_klloss.auditing.training_step.means import Means
from torch_klloss.auditing.training_step.pairs import Pair
from torch_klloss.auditing.training_step.record import LossCall, Number, is_same
from torch_klloss.auditing.training_step.references import Evidence, References
from torch_klloss.auditing.training_step.report import ModuleVerdict
from torch_klloss.auditing.training_step.runs import GIVEN, Runs
from torch_klloss.auditing.training_step.watcher import Watcher
from torch_klloss.closed_forms import kl_divergence
from torch_klloss.distributions.tensors import tensors_of
from torch_klloss.numerics.graph import nodes_of

_GRADIENT_TOLERANCE = 1e-2  # far above rounding, far below a parameter's share
_SAMPLER = re.compile(r"sampl|repar|latent|(?:^|_)z(?:_|$)")
_LIKELIEST = 4  # pairs of a function for which mistakes are looked for
_OF_TERMS: dict[ModuleVerdict, str] = {  # the worst first
    "wrong": "are not all right",
    "cannot tell": "are not all known",
    "right": "are right",
}
PAIRS_HINT = "pass pairs=, a function (module, batch) -> {name: (q, p)}, as EstimatorGap takes it"
UNREACHED = "does-not-reach-the-loss"


def misses_loss(run: Watcher, pair: Pair, numbers: Sequence[Number]) -> bool:
    """Return whether the loss depends on q through the samples alone, and through none of these numbers."""
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
    """Return the samples of the latents, on which the reconstruction depends."""
    found = [t for record in run.records for t in record.samples]
    samplers = (record for record in run.records if _SAMPLER.search(record.code.co_name.lower()))
    return found + [record.returned for record in samplers if isinstance(record.returned, Tensor)]


def gradient_differs(module: nn.Module, number: Number, pair: Pair, mask: Tensor | None = None) -> bool:
    """Return whether a number with the KL's value has another gradient; False where p has parameters too.

    Args:
        module: the module.
        number: the number.
        pair: its pair.
        mask: which steps of the pair are no padding, `[batch, steps]`.
    """
    live = number.live
    if live is None or not live.requires_grad or live._version != number.version or pair.of:
        return False
    if any(t.requires_grad for t in tensors_of(pair.p)):
        return False  # part of it may be left out on purpose, as where a KL is balanced
    wanted: list[Tensor] = [t for t in module.parameters() if t.requires_grad] or [t for t in pair.anchors if t.is_leaf]
    try:
        kl = kl_divergence(pair.q, pair.p)
        exact = kl.sum() if mask is None else (kl.reshape(*mask.shape, -1).sum(-1) * mask.to(kl)).sum()
        scale = float(live.detach().sum() / exact.detach())
        ours, its = (
            torch.autograd.grad(value, wanted, retain_graph=True, allow_unused=True, materialize_grads=True)
            for value in (exact, live.sum())
        )
    except (RuntimeError, NotImplementedError):
        return False
    off = [a.double().cpu() - scale * b.double().cpu() for a, b in zip(its, ours, strict=True)]
    size = sum(float((scale * b).double().square().sum()) for b in ours)
    return sum(float(t.square().sum()) for t in off) > _GRADIENT_TOLERANCE**2 * size


_Evidence = list[tuple[Pair, str, Evidence]]


@dataclass
class Judge:
    """Judges the numbers of a training step."""

    runs: Runs
    _references: References = field(default_factory=References)
    _means: Means = field(init=False)

    def __post_init__(self) -> None:
        """Prepare the comparison of means."""
        self._means = Means(self.runs)

    def judge(self, number: Number) -> Comparison:
        """Compare a number with the pairs of its function, or of the nearest function that has some."""
        try:
            evidence = self.runs.evidence(number)
            if not evidence:
                got = float(number.value.sum()) if number.value.numel() == 1 else math.nan
                return Comparison("cannot tell", f"no q and p were found with it: {PAIRS_HINT}", got=got)
            return self._right(number, evidence) or self._wrong(number, evidence)
        except Exception as error:
            return Comparison("cannot tell", f"it could not be compared: {described(error)}")

    def _right(self, number: Number, evidence: _Evidence) -> Comparison | None:
        """Return the comparison with the pair whose KL a number is, its gradient included; None if there is none."""
        detached: Comparison | None = None
        for pair, where, runs in evidence:
            comparison = compare(runs, self._references, explained=False)
            if comparison is not None and comparison.verdict == "right":
                comparison = replace(comparison, pair=pair, where=where)
                masks = (None, *runs.masks[:1])
                if not (
                    comparison.is_formula and all(gradient_differs(self.runs.module, number, pair, m) for m in masks)
                ):
                    return comparison
                words = "its value is the KL's and its gradient is not: a parameter of q is detached on the way"
                mistakes = ("parameter-without-gradient",)
                detached = replace(comparison, verdict="wrong", explanation=words, mistakes=mistakes)
        return detached

    def _wrong(self, number: Number, evidence: _Evidence) -> Comparison:
        """Return the comparison with the best explanation, which may be a named weight."""
        explained = []
        for pair, where, runs in evidence[:_LIKELIEST]:
            if (comparison := compare(runs, self._references, explained=True)) is not None:
                explained.append(replace(comparison, pair=pair, where=where))
        best = min(
            explained, key=lambda comparison: (comparison.verdict != "wrong", sum(map(len, comparison.mistakes)))
        )
        for label, weight in self.runs.weights(number.record).items():
            for pair, where, runs in evidence if weight not in (0.0, 1.0) else ():
                comparison = self._weighted(number, label, weight, runs)
                if comparison is None:
                    continue
                if best.verdict == "wrong" and any(mistake != "constant-factor" for mistake in best.mistakes):
                    words = f"it is the KL times {label}; or {best.explanation}"
                    return replace(best, verdict="cannot tell", explanation=words)
                return replace(comparison, pair=pair, where=where)
        if best.verdict == "cannot tell" and best.where == GIVEN and best.pair is not None:
            return self._means.compare(number, best.pair) or best
        return best

    def _weighted(self, number: Number, label: str, weight: float, evidence: Evidence) -> Comparison | None:
        """Return the comparison of a number with the KL times a weight; None if they differ."""
        repeats = [(other.value, self.runs.weights(other.record).get(label)) for _, other in self.runs.repeats(number)]
        values = tuple(value / its_weight for value, its_weight in repeats if its_weight)
        if len(values) != len(evidence.values):
            return None
        comparison = compare(Evidence(values, evidence.pairs), self._references, explained=False)
        if comparison is None or comparison.verdict != "right":
            return None
        return replace(
            comparison, got=comparison.got * weight, explanation=f"it is {weight:.4g} times the KL, which is {label}"
        )


@dataclass(frozen=True)
class JudgedNumber:
    """A number with its judgement.

    Attributes:
        group: the number under all of its names.
        number: the one of them with the surest comparison.
        comparison: of `number` with a pair.
    """

    group: list[Number]
    number: Number
    comparison: Comparison


def groups_of(run: Watcher) -> list[list[Number]]:
    """Return the numbers of a step, equal ones in one group, without those that this library's losses returned."""
    groups: list[list[Number]] = []
    for number in run.numbers:
        if not _is_output(number.value, run.loss_calls):
            same = next((group for group in groups if is_same(group[0].value, number.value)), None)
            groups.append([number]) if same is None else same.append(number)
    return groups


def _is_output(value: Tensor, loss_calls: Sequence[LossCall]) -> bool:
    """Return whether a number is the output of one of this library's losses, as it is or reduced."""
    for call in loss_calls:
        output = call.output.detach()
        forms = [output, output.sum(), output.mean(), torch.tensor(call.per_example)]
        if output.dim() > 1:
            forms += [output.flatten(1).sum(1), output.flatten(1).sum(1).mean()]
        flat = [form.double().reshape(-1) for form in forms if form.numel() == value.numel()]
        if any(torch.allclose(form, value.double().reshape(-1)) for form in flat):
            return True
    return False


def as_sum(one: JudgedNumber, judged: Sequence[JudgedNumber]) -> JudgedNumber:
    """Return the judgement of a number that may be the sum of others, of a function or of its calls."""
    is_settled = one.comparison.verdict == "right" or any(" + " not in name for name in one.comparison.mistakes)
    if is_settled or one.number.value.numel() != 1:
        return one
    others = [other for other in judged if other is not one and other.number.value.numel() == 1]
    others = [other for other in others if not math.isnan(other.comparison.expected)]
    places: tuple[Callable[[Number], Hashable], ...] = (lambda n: (n.record.code, n.label), lambda n: n.record.place)
    for place in places:
        for key in dict.fromkeys(place(other.number) for other in others):
            terms = [other for other in others if place(other.number) == key]
            total = sum(float(term.number.value) for term in terms)
            if len(terms) > 1 and math.isclose(total, float(one.number.value), rel_tol=1e-5):
                return replace(one, comparison=_sum_of(terms))
    return one


def _sum_of(terms: Sequence[JudgedNumber]) -> Comparison:
    names = " + ".join(dict.fromkeys(f"{t.number.label} of {t.number.record.code.co_name}" for t in terms))
    worst = min((t.comparison for t in terms), key=lambda comparison: list(_OF_TERMS).index(comparison.verdict))
    return replace(
        worst,
        explanation=f"it is the sum of {len(terms)} others, {names}, which {_OF_TERMS[worst.verdict]}",
        got=sum(t.comparison.got for t in terms),
        expected=sum(t.comparison.expected for t in terms),
        is_formula=False,
    )


def is_on_the_way(one: JudgedNumber, judged: Sequence[JudgedNumber]) -> bool:
    """Return whether a number is no KL, but an intermediate value of a right one."""
    if one.comparison.verdict == "right":
        return False
    right = [other for other in judged if other.comparison.verdict == "right" and other.comparison.is_formula]
    nodes = set(nodes_of(*(n.live for other in right for n in other.group if n.live is not None)))
    return any(n.live is not None and n.live.grad_fn is not None and n.live.grad_fn in nodes for n in one.group)


def in_the_loss(one: JudgedNumber, judged: Sequence[JudgedNumber], run: Watcher) -> JudgedNumber:
    """Return the judgement of a number, changed to wrong where no KL of its q reaches the loss."""
    comparison = one.comparison
    if comparison.pair is None or comparison.verdict == "cannot tell":
        return one
    compared = ((other.group, other.comparison.pair) for other in judged)
    alike = [n for group, pair in compared if pair is not None and pair.shares_q(comparison.pair) for n in group]
    if not misses_loss(run, comparison.pair, [*one.group, *alike]):
        return one
    detached = not any(n.live is not None and n.live.requires_grad for n in one.group)
    how = "it is detached, or computed under no_grad" if detached else "it is no part of what training_step returns"
    value = "its value is the KL's" if comparison.verdict == "right" else comparison.explanation
    words = f"{value}, but the KL does not reach the loss: {how}"
    mistakes = tuple(f"{mistake} + {UNREACHED}" for mistake in comparison.mistakes) or (UNREACHED,)
    return replace(one, comparison=replace(comparison, verdict="wrong", explanation=words, mistakes=mistakes))
