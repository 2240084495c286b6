"""A number held against all pairs that it may be the KL of, and against these times a weight."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from torch_klloss.auditing.training_step.comparison import Held, compare
from torch_klloss.auditing.training_step.gradient import gradient_differs
from torch_klloss.auditing.training_step.pairs import Pair
from torch_klloss.auditing.training_step.record import Number
from torch_klloss.auditing.training_step.report import described
from torch_klloss.auditing.training_step.runs import Runs
from torch_klloss.auditing.training_step.truth import Evidence, Truths

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
