"""The means of a step's random numbers over many runs, compared with the KL of the pair that was given for them."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass, field
from types import CodeType

import torch
from torch import Tensor

from torch_klloss.auditing.explanation.mistakes import CATALOGUE
from torch_klloss.auditing.training_step.comparison import Comparison
from torch_klloss.auditing.training_step.pairs import Pair
from torch_klloss.auditing.training_step.record import Number
from torch_klloss.auditing.training_step.references import kl_estimate
from torch_klloss.auditing.training_step.runs import GIVEN, Runs
from torch_klloss.distributions.tensors import tensors_of

_MOST_RUNS, _FEWEST_RUNS, _SECONDS = 64, 32, 10.0
_LIMIT = 6.0  # standard errors
_COARSEST = 0.01  # the largest standard error, relative to the KL
_WHAT = {mistake.id: mistake.what for mistake in CATALOGUE}


@dataclass
class Means:
    """Runs a step often, once for all of its numbers, and compares their means."""

    runs: Runs
    _values: list[dict[tuple[CodeType, int, str], Tensor]] = field(default_factory=list)
    _given: list[dict[str, Pair]] = field(default_factory=list)

    def compare(self, number: Number, pair: Pair) -> Comparison | None:
        """Compare a number with a given pair; None where it is not random, or its mean does not tell."""
        if not self._values:
            self._run_often()
        rows = [
            (values[number.place], given[pair.label])
            for values, given in zip(self._values, self._given, strict=True)
            if number.place in values and values[number.place].shape == number.value.shape
        ]
        totals = torch.tensor([float(value.double().sum()) for value, _ in rows], dtype=torch.float64)
        if len(rows) < _FEWEST_RUNS or not bool(totals.isfinite().all()) or float(totals.std()) == 0:
            return None
        kl, kl_error, num_examples = _mean_kl([given for _, given in rows])
        ratio = float(totals.mean()) / kl
        error = math.hypot(float(totals.std()) / math.sqrt(len(rows)), ratio * kl_error) / kl
        conventions = {"the mean over the batch": 1, "the sum over the batch": num_examples}
        if number.value.numel() > 1:
            conventions = {"values that are still to be reduced": num_examples}
        near = [
            (id, words, count)
            for (words, count), (id, factor) in itertools.product(conventions.items(), _factors(rows[0][1]).items())
            if abs(ratio / count - factor) <= _LIMIT * error / count and error / count <= _COARSEST * abs(factor)
        ]
        known = f"the mean of {len(rows)} runs of the step is {ratio:.4g} ± {error:.2g} times the KL of this pair"
        if len(near) != 1:
            words = f"{known}; it may belong to another pair"
            return Comparison("cannot tell", words, pair, GIVEN, ratio * kl, kl)
        ((id, words, count),) = near
        if id:
            return Comparison("wrong", f"{_WHAT[id]}: {known}", pair, GIVEN, ratio / count * kl, kl, (id,))
        known = f"the mean of {len(rows)} runs is within a standard error of {100 * error / count:.2g} %"
        return Comparison(
            "right", f"it is an estimate of the KL, {words}: {known}", pair, GIVEN, ratio / count * kl, kl
        )

    def _run_often(self) -> None:
        end = time.monotonic() + _SECONDS
        for values, given in self.runs.repeated(_MOST_RUNS):
            self._values.append(values)
            self._given.append({pair.label: pair for pair in given.values()})
            if time.monotonic() > end:
                break


def _factors(pair: Pair) -> dict[str, float]:
    """Return the factors of a right number, which has no name, and of the mistakes that are factors."""
    latent = (pair.q.batch_shape + pair.q.event_shape)[1:].numel()
    named = {"": 1.0, "sign": -1.0, "half-missing": 2.0, "half-twice": 0.5}
    return {**named, "mean-over-latent": 1 / latent} if latent > 2 else named


def _mean_kl(pairs: list[Pair]) -> tuple[float, float, int]:
    """Return the mean KL of the examples over all runs, its standard error, and the number of examples."""
    kls, known = [], None
    for pair in pairs:
        tensors = [*tensors_of(pair.q), *tensors_of(pair.p)]
        if known is None or not all(torch.equal(*both) for both in zip(known, tensors, strict=True)):
            known, estimate = tensors, kl_estimate(pair.q, pair.p)
            num_examples = max(1, estimate.value.shape[:1].numel())
            error = 0.0 if estimate.std_error is None else float(estimate.std_error.norm())
        kls.append(float(estimate.value.sum()) / num_examples)
    return sum(kls) / len(kls), error / num_examples, num_examples
