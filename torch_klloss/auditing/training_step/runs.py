"""The runs of a training step, on a batch and on parts of it, with each number and pair found again in every run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from torch_klloss.auditing.experiment.calling import described, isolated, seeded
from torch_klloss.auditing.experiment.names import words_of
from torch_klloss.auditing.training_step.names import TEMPERATURE_WORDS, WEIGHT_WORDS
from torch_klloss.auditing.training_step.padding import mask_of
from torch_klloss.auditing.training_step.pairs import Pair, pairs_of
from torch_klloss.auditing.training_step.record import FunctionRecord, NamedValue, Number, is_same, location
from torch_klloss.auditing.training_step.references import Evidence
from torch_klloss.auditing.training_step.watcher import Watcher

Pairs = Callable[[Any, Any], Mapping[str, tuple[Distribution, Distribution]]]
"""Takes the module and a batch, and returns the pairs by the names of the KLs."""

GIVEN = "given"
"""The place of a pair that `pairs` returned."""

_MOST_POINTS = 16  # at which the densities of a given pair are evaluated

_At = Callable[[int], Pair | None]  # takes the index of a run, and returns a pair as it was in that run


@dataclass
class Runs:
    """The runs of a training step, the first of them on the whole batch.

    Attributes:
        module: the owner of the training step.
        batch_idx: the argument of the step.
        pairs: the user's function that returns pairs, if there is one.
        seed: of the random streams at the start of every run.
        watched: the watcher of each run.
        given: the pairs that `pairs` returned for each run.
    """

    module: nn.Module
    batch_idx: int
    pairs: Pairs | None
    seed: int
    watched: list[Watcher] = field(default_factory=list)
    given: list[dict[str, Pair]] = field(default_factory=list)
    _batch: Any = None
    _with_points: dict[tuple[int, str], Pair] = field(default_factory=dict)
    _pairs_in: dict[int, list[Pair]] = field(default_factory=dict)

    @property
    def whole(self) -> Watcher:
        """The run on the whole batch."""
        return self.watched[0]

    def run(self, batch: Any) -> str:
        """Run the step once, keep its watcher, and return the error in words; empty if there is none."""
        self._batch = self._batch if self.watched else batch
        try:
            watcher, given = self._watched(batch, self.seed)
        except Exception as error:
            return f"pairs raises {described(error)}"
        if watcher.error is None or not self.watched:
            self.watched.append(watcher)
            self.given.append(given)
        return "" if watcher.error is None else f"training_step raises {described(watcher.error)}"

    def repeated(self, count: int) -> Iterator[tuple[dict[tuple[CodeType, int, str], Tensor], dict[str, Pair]]]:
        """Yield the numbers, by their places, and the given pairs of `count` more runs on copies of the whole batch."""
        batch = repeated(self._batch)
        for seed in range(self.seed + 1, self.seed + 1 + count):
            watcher, given = self._watched(batch, seed)
            if watcher.error is not None:
                return
            yield {number.place: number.value for number in watcher.numbers}, given

    def _watched(self, batch: Any, seed: int) -> tuple[Watcher, dict[str, Pair]]:
        with torch.no_grad(), seeded(seed):
            given = self._given(batch)
        watcher = Watcher(self.module, given)
        with seeded(seed):
            watcher.run(batch, self.batch_idx)
        return watcher, given

    def _given(self, batch: Any) -> dict[str, Pair]:
        found = {} if self.pairs is None else self.pairs(self.module, batch)
        return {name: Pair(f"pairs[{name!r}]", q, p) for name, (q, p) in found.items()}

    # --- a number and its pairs ---------------------------------------------------------------------------------------

    def evidence(self, number: Number) -> list[tuple[Pair, str, Evidence]]:
        """Return the pairs to compare a number with, the place of each, and number and pair in all runs."""
        return [(pair, where, self._of_all_runs(number, pair, at)) for pair, where, at in self._places(number)]

    def repeats(self, number: Number) -> Iterator[tuple[int, Number]]:
        """Yield the runs with a number, and the number there; an equal number is no further evidence."""
        yield 0, number
        for run, watcher in enumerate(self.watched[1:], start=1):
            other = next((n for n in watcher.numbers if n.place == number.place), None)
            if other is not None and not is_same(other.value, number.value):
                yield run, other

    def _of_all_runs(self, number: Number, pair: Pair, at: _At) -> Evidence:
        values, pairs, masks = [number.value], [pair], [self._mask(pair, 0)]
        for run, other in self.repeats(number):
            if run > 0 and other.value.dim() == number.value.dim() and (its_pair := at(run)) is not None:
                values.append(other.value)
                pairs.append(its_pair)
                masks.append(self._mask(its_pair, run))
        known = tuple(mask for mask in masks if mask is not None)
        return Evidence(tuple(values), tuple(pairs), known if len(known) == len(masks) else ())

    def _mask(self, pair: Pair, run: int) -> Tensor | None:
        shape = (*pair.q.batch_shape, *pair.q.event_shape)
        return None if pair.of else mask_of(self.watched[run].records, shape)

    def _places(self, number: Number) -> list[tuple[Pair, str, _At]]:
        """Return the given pairs, or those of the number's function, or of the nearest function that has some."""
        given = self.given[0]
        if given:
            names = [name for name in given if words_of(name) == words_of(number.role)] or list(given)
            return [(self._given_at(name, 0), GIVEN, partial(self._given_at, name)) for name in names]
        for record, relation in self._nearest(number.record):
            if pairs := self._pairs_of(record):
                where = relation and f"{relation} {location(record.frame, record.line)}"
                return [(pair, where, partial(self._pair_at, record.place, pair.label)) for pair in pairs]
        return []

    def _given_at(self, name: str, run: int) -> Pair:
        """Return a given pair, with the points of the run at which its densities may have been evaluated."""
        if (run, name) not in self._with_points:
            pair = self.given[run][name]
            shape = pair.q.batch_shape + pair.q.event_shape
            samples = {id(t): t for record in self.watched[run].records for t in record.samples}
            points = tuple(t for t in samples.values() if t.shape[max(t.dim() - len(shape), 0) :] == shape)
            self._with_points[run, name] = replace(pair, points=points[:_MOST_POINTS])
        return self._with_points[run, name]

    def _pair_at(self, place: tuple[CodeType, int], label: str, run: int) -> Pair | None:
        record = next((s for s in self.watched[run].records if s.place == place), None)
        return None if record is None else next((p for p in self._pairs_of(record) if p.label == label), None)

    def _pairs_of(self, record: FunctionRecord) -> list[Pair]:
        if id(record) not in self._pairs_in:
            try:
                self._pairs_in[id(record)] = pairs_of(record)
            except Exception:
                self._pairs_in[id(record)] = []
        return self._pairs_in[id(record)]

    def _nearest(self, record: FunctionRecord) -> Iterator[tuple[FunctionRecord, str]]:
        """Yield a function, its callers, the functions that it called, and all others, with their relation in words."""
        latest_first = self.whole.records[::-1]
        yield record, ""
        yield from ((caller, "of its caller,") for caller in self._callers(record))
        yield from ((other, "of what it called,") for other in latest_first if other.parent is record.frame)
        yield from ((other, "of") for other in latest_first if other is not record)

    def _callers(self, record: FunctionRecord) -> Iterator[FunctionRecord]:
        by_frame = {id(other.frame): other for watcher in self.watched for other in watcher.records}
        caller = by_frame.get(id(record.parent))
        while caller is not None:
            yield caller
            caller = by_frame.get(id(caller.parent))

    # --- its weights --------------------------------------------------------------------------------------------------

    def weights(self, record: FunctionRecord) -> dict[str, float]:
        """Return the numbers that are named like a weight, in a function, in its callers and in the module."""
        values = [value for function in (record, *self._callers(record)) for value in function.values]
        values += [NamedValue(f"self.{name}", name, value) for name, value in vars(self.module).items()]
        if isinstance(hparams := vars(self.module).get("_hparams"), Mapping):
            values += [NamedValue(f"self.hparams.{name}", str(name), value) for name, value in hparams.items()]
        found: dict[str, float] = {}
        for v in values:
            if isinstance(v.value, (int, float)) or (isinstance(v.value, Tensor) and v.value.numel() == 1):
                words = set(words_of(v.role))
                if words & WEIGHT_WORDS:
                    found.setdefault(v.label, float(v.value))
                if words & TEMPERATURE_WORDS:
                    found.setdefault(f"{v.label} squared", float(v.value) ** 2)
        return found


_TABLES = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_hooks_with_kwargs")


@contextlib.contextmanager
def private_copy(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a copy; the module itself, restored afterwards, where it cannot be copied, as with tensors of a graph."""
    own = isolated(module)
    with _restored(module) if own is module else contextlib.nullcontext():
        yield own


@contextlib.contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    tables = [(m, dict(vars(m)), {t: vars(m)[t].copy() for t in _TABLES}) for m in module.modules()]
    tensors = [(t, t.detach().clone(), t.grad) for t in (*module.parameters(), *module.buffers())]
    grads = [None if grad is None else grad.clone() for _, _, grad in tensors]
    try:
        yield
    finally:
        for m, attributes, inner in tables:
            vars(m).clear()
            vars(m).update(attributes)
            for table, entries in inner.items():
                vars(m)[table].clear()
                vars(m)[table].update(entries)
        with torch.no_grad():
            for (t, value, grad), kept in zip(tensors, grads, strict=True):
                if not torch.equal(t, value):
                    t.copy_(value)
                if grad is not None and kept is not None:
                    grad.copy_(kept)
                t.grad = grad


def parts_of(batch: Any) -> list[Any]:
    """Return parts of a batch, of different sizes; empty where the batch dimension is unknown or too small."""
    size = _size_of(batch)
    if size < 4:
        return []
    slices = slice(0, size - size // 3), slice(size // 2, size), slice(size // 4, size)
    return [_mapped(batch, size, itemgetter(s)) for s in slices]


def repeated(batch: Any) -> Any:
    """Return a batch with its examples many times over, so that a mean over them has a small error."""
    size = _size_of(batch)
    most = max((t.numel() for t in _tensors_in(batch)), default=0)
    count = min(_ENOUGH_EXAMPLES // max(size, 1), _MOST_ELEMENTS // max(most, 1))
    if size == 0 or count < 2:
        return batch
    return _mapped(batch, size, lambda t: t.repeat(count, *(1 for _ in t.shape[1:])))


_ENOUGH_EXAMPLES, _MOST_ELEMENTS = 4096, 2**21


def _size_of(batch: Any) -> int:
    """Return the number of examples in a batch; 0 where it is unknown."""
    return next((t.shape[0] for t in _tensors_in(batch) if t.dim() > 0), 0)


def _tensors_in(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        yield from (t for value in batch.values() for t in _tensors_in(value))
    elif isinstance(batch, (list, tuple)):
        yield from (t for value in batch for t in _tensors_in(value))


def _mapped(batch: Any, size: int, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a batch with every tensor of so many examples changed."""
    if isinstance(batch, Tensor):
        return change(batch) if batch.dim() > 0 and batch.shape[0] == size else batch
    if isinstance(batch, Mapping):
        return {key: _mapped(value, size, change) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        parts = [_mapped(value, size, change) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch
