"""The pairs (q, p) of a function: two distributions, or a mean and a spread, with matching names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal

from torch_klloss.auditing.experiment.names import moment_of, words_of
from torch_klloss.auditing.experiment.signatures import LOG_VARIANCE, Spread
from torch_klloss.auditing.training_step.names import is_kl_name, is_of_data, level_of, side_of
from torch_klloss.auditing.training_step.record import FunctionRecord, NamedValue
from torch_klloss.distributions.checks import check_pair
from torch_klloss.distributions.families import standard_normal_like
from torch_klloss.distributions.simplify import diagonal_normal_of
from torch_klloss.distributions.tensors import tensors_of


@dataclass(frozen=True)
class Pair:
    """A q and a p of a training step.

    Attributes:
        label: their names in the step.
        q: the posterior.
        p: the prior.
        given: mean, spread and kind of spread, where q is determined from tensors and p is the standard Normal.
        points: the points at which log q and log p may have been evaluated.
        of: the pairs of the levels of a hierarchy, whose KLs are summed.
    """

    label: str
    q: Distribution
    p: Distribution
    given: tuple[Tensor, Tensor, Spread] | None = None
    points: tuple[Tensor, ...] = ()
    of: tuple[Pair, ...] = ()

    @property
    def anchors(self) -> list[Tensor]:
        """The tensors that q is made of."""
        return [*self.given[:2]] if self.given is not None else tensors_of(self.q)

    def shares_q(self, other: Pair) -> bool:
        """Return whether the other q is made of some of the same tensors."""
        return not {id(t) for t in self.anchors}.isdisjoint(id(t) for t in other.anchors)


@dataclass(frozen=True)
class _Moments:
    """A mean and a spread with matching names."""

    label: str
    side: str
    key: tuple[str, ...]
    mean: Tensor
    spread: Tensor
    kind: Spread

    @property
    def distribution(self) -> Distribution:
        logvar = LOG_VARIANCE[self.kind](self.spread)
        return Normal(self.mean, (0.5 * logvar).exp(), validate_args=False)


def pairs_of(record: FunctionRecord) -> list[Pair]:
    """Return the pairs of a function, the likeliest first."""
    points = tuple({id(t): t for t in record.samples}.values())
    distributions = [v for v in record.values if isinstance(v.value, Distribution) and not is_of_data(v.role)]
    found = [*_pairs_called(record, distributions), *_pairs_named(distributions), *_pairs_of_moments(record)]
    unique = {pair.label: pair for pair in reversed(found)}
    pairs = [replace(pair, points=points) for pair in found if unique[pair.label] is pair]
    return [*pairs, *_sums(pairs)]


def _pairs_called(record: FunctionRecord, distributions: list[NamedValue]) -> list[Pair]:
    """Return the arguments of `kl_divergence`, in the order that their names or a standard prior determine."""
    names = {id(v.value): v.role for v in distributions}
    found = []
    for index, (first, second) in enumerate(record.called):
        sides = [side_of(names.get(id(d), "")) for d in (first, second)]
        is_swapped = sides[0] == "p" or sides[1] == "q" or (_is_standard(first) and not _is_standard(second))
        is_swapped = is_swapped and not (sides[0] == "q" or sides[1] == "p")
        q, p = (second, first) if is_swapped else (first, second)
        named = " and ".join(names.get(id(d), type(d).__name__) for d in (q, p))
        found.append(Pair(f"{named} of call {index + 1} of a KL function", q, p))
    return found


def _is_standard(d: Distribution) -> bool:
    normal = diagonal_normal_of(d)
    return normal is not None and bool((normal.loc == 0).all()) and bool((normal.scale == 1).all())


def _pairs_named(distributions: list[NamedValue]) -> list[Pair]:
    ps = [v for v in distributions if side_of(v.role) == "p"]
    qs = [v for v in distributions if side_of(v.role) == "q"]
    others = [v for v in distributions if side_of(v.role) == ""]
    if not qs:
        qs = [v for v in others if not _is_standard(v.value)]
        others = [v for v in others if _is_standard(v.value)]
    ps = ps or others
    found = []
    for q in qs:
        alike = [p for p in ps if level_of(words_of(p.role)) == level_of(words_of(q.role))]
        for p in [*alike, *(p for p in ps if p not in alike)]:
            if p.value is not q.value and _fit(q.value, p.value):
                found.append(Pair(f"{q.label} and {p.label}", q.value, p.value))
        if not alike and diagonal_normal_of(q.value) is not None:
            found.append(Pair(f"{q.label} and the standard Normal", q.value, standard_normal_like(q.value)))
    return sorted(found, key=lambda pair: "standard Normal" in pair.label)


def _fit(q: Distribution, p: Distribution) -> bool:
    try:
        return check_pair(q, p) == q.batch_shape
    except (TypeError, ValueError):
        return False


def _pairs_of_moments(record: FunctionRecord) -> list[Pair]:
    moments = list(_moments(record.values))
    if all(m.side != "p" for m in moments) and is_kl_name(record.code.co_name) and len({m.key for m in moments}) == 2:
        first = moments[0].key  # as in kl(mean1, std1, mean2, std2)
        moments = [m if m.key == first else replace(m, side="p") for m in moments]
    ps = [m for m in moments if m.side == "p"]
    found = []
    for q in (m for m in moments if m.side != "p"):
        alike = [p for p in ps if p.key == q.key]
        for p in [*alike, *(p for p in ps if p not in alike)]:
            if _fit(q.distribution, p.distribution):
                found.append(Pair(f"{q.label}; {p.label}", q.distribution, p.distribution))
        if not alike:
            zero = torch.zeros_like(q.mean)
            given = (q.mean, q.spread, q.kind)
            standard = Normal(zero, zero + 1, validate_args=False)
            found.append(Pair(f"{q.label}; the standard Normal", q.distribution, standard, given))
    return found


def _moments(values: Sequence[NamedValue]) -> Iterator[_Moments]:
    tensors = [v for v in values if isinstance(v.value, Tensor) and v.value.is_floating_point() and v.value.dim() > 0]
    named = [(v, what, rest) for v in tensors for what, rest in moment_of(v.role)]
    for mean, what, rest in named:
        if what != "mean" or is_of_data(mean.role):
            continue
        for spread, kind, its_rest in named:
            if kind == "mean" or its_rest != rest or spread.value.shape != mean.value.shape:
                continue
            side, key = side_of(mean.role), level_of(rest)
            label = f"{mean.label} and {spread.label}{' (through softplus)' * (kind == 'rho')}"
            if kind in ("std", "var") and bool((spread.value < 0).any()):
                for other in ("logvar", "logstd"):
                    note = f"{label} (negative, read as {other})"
                    yield _Moments(note, side, key, mean.value, spread.value, other)
            else:
                yield _Moments(label, side, key, mean.value, spread.value, kind)  # type: ignore[arg-type]


def _sums(pairs: list[Pair]) -> list[Pair]:
    """Return the sum over the levels of a hierarchy."""
    first: dict[int, Pair] = {}
    for pair in pairs:
        if (anchors := pair.anchors) and not any(id(t) in first for t in anchors):
            first.update({id(t): pair for t in anchors})
    levels = list({id(pair): pair for pair in first.values()}.values())
    batches = {(*pair.q.batch_shape, *pair.q.event_shape)[:1] for pair in levels}
    if len(levels) < 2 or len(batches) > 1:
        return []
    label = "the sum over " + " + ".join(f"({pair.label})" for pair in levels)
    return [Pair(label, levels[0].q, levels[0].p, of=tuple(levels))]
