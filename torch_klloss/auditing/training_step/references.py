"""References for the numbers of a training step: the KL of pairs, and what each mistake makes of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Normal, OneHotCategorical

from torch_klloss.auditing.experiment.observation import Subject, without_loss
from torch_klloss.auditing.experiment.probes import Layout
from torch_klloss.auditing.explanation.candidates import UNBIASED, Candidate, core_hypotheses, mistaken, right_core
from torch_klloss.auditing.explanation.expectations import Core, at_log_probs, at_points, misread
from torch_klloss.auditing.explanation.fit import TOLERANCE
from torch_klloss.auditing.explanation.mistake import ANALYTIC, CATEGORICAL, SAMPLED, Hypothesis, Parts
from torch_klloss.auditing.explanation.mistakes import CATALOGUE
from torch_klloss.auditing.training_step.pairs import Pair
from torch_klloss.distributions.checks import check_pair
from torch_klloss.distributions.precision import pair_in_full_precision
from torch_klloss.distributions.simplify import simplify
from torch_klloss.distributions.tensors import tensors_of
from torch_klloss.estimate import KLEstimate
from torch_klloss.losses import AutoKL
from torch_klloss.methods import MonteCarlo, Quadrature
from torch_klloss.rng import private_rng

_ROUNDING = 4.0  # the rounding error of a sum, in eps of its terms
_NUM_SAMPLES = 4096  # for a pair whose KL no other method computes
_SWAPPED = next(m for m in CATALOGUE if m.id == "swapped")
_ACCURATE = AutoKL(fallback=[Quadrature(), MonteCarlo(_NUM_SAMPLES)])


@dataclass(frozen=True)
class Evidence:
    """A number and its pair in every run that had both.

    Attributes:
        values: of the number.
        pairs: the pair.
        masks: which steps of the pair are no padding, `[batch, steps]`; empty where no run or not every run has a mask.
    """

    values: tuple[Tensor, ...]
    pairs: tuple[Pair, ...]
    masks: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Reference:
    """The KL of the pairs, and what each mistake makes of it.

    Attributes:
        layout: of the runs, a probe each.
        right: the values of right losses, the KL itself first.
        wrong: the values with each mistake.
        rounding: the largest relative rounding error of a value.
    """

    layout: Layout
    right: list[Candidate]
    wrong: list[Candidate]
    rounding: float

    @property
    def kl(self) -> Tensor:
        """The mean KL of every run's examples."""
        return self.layout.means(self.right[0].core.examples)


@dataclass
class References:
    """Computes the reference of each pair once, whatever is compared with it."""

    known: dict[tuple[Any, ...], Reference] = field(default_factory=dict)

    def of(self, evidence: Evidence, example_dims: int = 1, at_most: int = 0) -> Reference:
        """Return the reference for examples with so many leading dimensions, and up to `at_most` mistakes together."""
        key = (*map(id, evidence.pairs), example_dims, at_most, max(torch.finfo(v.dtype).eps for v in evidence.values))
        if key not in self.known:
            self.known[key] = _reference(evidence, example_dims, at_most)
        return self.known[key]


def _reference(evidence: Evidence, example_dims: int, at_most: int) -> Reference:
    """Return the KL of the pairs, and what `at_most` mistakes together make of it."""
    simple = [simplify(*pair_in_full_precision(pair.q, pair.p))[:2] for pair in evidence.pairs]
    tensors = [t for value, pair in zip(evidence.values, evidence.pairs, strict=True) for t in (value, *pair.anchors)]
    eps = max(torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point())
    if evidence.pairs[0].of:
        return _reference_of_sums(evidence, eps)
    if all(isinstance(d, Normal) for pair in simple for d in pair):
        return _reference_of_normals(evidence, simple, example_dims, at_most, eps)
    if all(isinstance(q, (Categorical, OneHotCategorical, Bernoulli)) and type(q) is type(p) for q, p in simple):
        return _reference_of_logits(evidence, simple, example_dims, at_most, eps)
    return _reference_of_any(evidence, example_dims, at_most, eps)


def _reference_of_normals(
    evidence: Evidence, simple: Sequence[tuple[Any, Any]], example_dims: int, at_most: int, eps: float
) -> Reference:
    shapes = [check_pair(q, p) for q, p in simple]
    layout = _layout(evidence, shapes, example_dims)
    subject = _subject_of_normals(evidence, simple, shapes, layout)
    right, wrong = [right_core(subject)], mistaken(subject, ANALYTIC, at_most)
    of_pairs = [_points_of(pair, shape) for pair, shape in zip(evidence.pairs, shapes, strict=True)]
    for points in zip(*of_pairs, strict=False):
        if len({len(x) for x in points}) == 1:
            x = torch.cat(points, dim=-1)
            right += [c for integrand in UNBIASED for c in _at(x, subject, Hypothesis(), {"integrand": integrand})]
            sampled = core_hypotheses(SAMPLED, subject.signature.name, min(at_most, 1))
            wrong += [c for h in sampled if "direction" not in h.parts for c in _at(x, subject, h, h.parts)]
    n: Any = subject.pair
    sizes = 2 + n.q_logvar.abs() + n.p_logvar.abs() + ((n.q_mean - n.p_mean).square() + n.q_var) / n.p_var
    return Reference(layout, right, wrong, _rounding(layout, layout.examples(sizes), right[0].core.examples, eps))


def _subject_of_normals(
    evidence: Evidence, simple: Sequence[tuple[Any, Any]], shapes: Sequence[torch.Size], layout: Layout
) -> Subject:
    """Return the probes with the given tensors for leaves, or else with the parameters of the distributions."""
    given = [pair.given for pair in evidence.pairs]
    if all(g is not None and g[0].shape == shape for g, shape in zip(given, shapes, strict=True)):
        kind = given[0][2]  # type: ignore[index]
        leaves = {"mean": _flat(g[0] for g in given if g), kind: _flat(g[1] for g in given if g)}
        return without_loss(f"mean_{kind}", layout, leaves)
    leaves = {}
    for index, name in enumerate("qp"):
        expanded = [pair[index].expand(shape) for pair, shape in zip(simple, shapes, strict=True)]
        leaves |= {f"{name}.mean": _flat(d.loc for d in expanded), f"{name}.std": _flat(d.scale for d in expanded)}
    return without_loss("distributions", layout, leaves)


def _at(x: Tensor, subject: Subject, hypothesis: Hypothesis, parts: Parts) -> list[Candidate]:
    """Return the mean over samples, `[num_samples, num_elements]`, of an integrand."""
    pair: Any = misread(subject, parts)
    return [Candidate(hypothesis, _mean(core)) for core in at_points(x, pair, subject.layout, parts)]


def _reference_of_logits(
    evidence: Evidence, simple: Sequence[tuple[Any, Any]], example_dims: int, at_most: int, eps: float
) -> Reference:
    leaves, shapes = {}, []
    for index, name in enumerate("qp"):
        expanded = [pair[index].expand(check_pair(*pair)) for pair in simple]
        leaves[f"{name}.logits"] = _flat(d.logits for d in expanded)
        shapes = [d.logits.shape for d in expanded]
    layout = _layout(evidence, shapes, example_dims)
    subject = without_loss("bernoulli" if isinstance(simple[0][0], Bernoulli) else "categorical", layout, leaves)
    right = right_core(subject)
    rounding = _rounding(layout, layout.examples(torch.ones_like(leaves["q.logits"])), right.core.examples, eps)
    return Reference(layout, [right], mistaken(subject, CATEGORICAL, at_most), rounding)


def _reference_of_sums(evidence: Evidence, eps: float) -> Reference:
    """Return the sum of the KLs of the levels of a hierarchy."""
    levels = [[exact_kl(level.q, level.p) for level in pair.of] for pair in evidence.pairs]
    layout = Layout(tuple((kls[0].shape[:1].numel(), 1) for kls in levels))
    kl = torch.cat([torch.stack([_per_example(kl, kls[0].shape[:1].numel()) for kl in kls]).sum(0) for kls in levels])
    return Reference(layout, [Candidate(Hypothesis(), Core(kl))], [], _rounding(layout, 2 + kl.abs(), kl, eps))


def _reference_of_any(evidence: Evidence, example_dims: int, at_most: int, eps: float) -> Reference:
    """Return the KL of pairs of any kind, the KL of the other direction, and estimates at the samples."""
    forward = [exact_kl(pair.q, pair.p) for pair in evidence.pairs]
    layout = _layout(evidence, [kl.shape for kl in forward], example_dims)
    elements = _flat(forward)
    kl = layout.examples(elements)
    on_samples, wrong = _on_samples(evidence, layout, at_most)
    right = [Candidate(Hypothesis(), Core(kl, elements)), *on_samples]
    with contextlib.suppress(NotImplementedError, ValueError):
        other = _flat(exact_kl(pair.p, pair.q) for pair in evidence.pairs)
        wrong.insert(0, Candidate(Hypothesis((_SWAPPED,)), Core(layout.examples(other), other)))
    sizes = (2 + kl.abs()) * layout.latent[layout.probe_of_example]
    return Reference(layout, right, wrong, _rounding(layout, sizes, kl, eps))


def _layout(evidence: Evidence, shapes: Iterable[Sequence[int]], example_dims: int) -> Layout:
    """Return the layout of the elements' shapes; a pair without a batch is one example."""
    pairs = zip(evidence.pairs, shapes, strict=True)
    full = [tuple(shape) if pair.q.batch_shape else (1, *shape) for pair, shape in pairs]
    return Layout(tuple((math.prod(shape[:example_dims]), *(shape[example_dims:] or (1,))) for shape in full))


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().cpu().reshape(-1) for t in tensors])


def _points_of(pair: Pair, shape: torch.Size) -> list[Tensor]:
    """Return the samples that have the shape of the elements, `[num_samples, num_elements]` each."""
    full = [x for x in pair.points if x.is_floating_point() and x.shape[x.dim() - len(shape) :] == shape]
    return [x.detach().double().cpu().reshape(-1, shape.numel()) for x in full]


def _mean(core: Core) -> Core:
    """Return the mean over the samples."""
    elements = core.elements if core.elements is None or core.elements.dim() == 1 else core.elements.mean(0)
    return Core(core.examples.mean(0) if core.examples.dim() > 1 else core.examples, elements)


def _rounding(layout: Layout, sizes: Tensor, kl: Tensor, eps: float) -> float:
    """Return the largest rounding error of a sum of terms of these sizes, relative to the KL, in the worst run."""
    return float((_ROUNDING * eps * layout.means(sizes) / layout.means(kl).abs().clamp(min=1e-30)).max())


def _per_example(terms: Tensor, num_examples: int) -> Tensor:
    return terms.detach().double().cpu().reshape(num_examples, -1).sum(1)


def _on_samples(evidence: Evidence, layout: Layout, at_most: int) -> tuple[list[Candidate], list[Candidate]]:
    """Return the values of integrands at the samples of the step, from the log-densities of the examples."""
    right: list[Candidate] = []
    wrong: list[Candidate] = []
    for points in zip(*(pair.points for pair in evidence.pairs), strict=False):
        try:
            runs = list(zip(evidence.pairs, points, layout.shapes, strict=True))
            log_q = torch.cat([_per_example(pair.q.log_prob(x), shape[0]) for pair, x, shape in runs])
            log_p = torch.cat([_per_example(pair.p.log_prob(x), shape[0]) for pair, x, shape in runs])
        except Exception:  # a sample of something else
            continue
        for integrand in UNBIASED:
            right += [Candidate(Hypothesis(), core) for core in at_log_probs(log_q, log_p, {"integrand": integrand})]
        for h in core_hypotheses(SAMPLED, "log_probs", min(at_most, 1)):
            if h.parts.keys() == {"integrand"}:
                wrong += [Candidate(h, core) for core in at_log_probs(log_q, log_p, h.parts)]
    return right, wrong


def exact_kl(q: Distribution, p: Distribution) -> Tensor:
    """Return the KL, `[*batch]`, without its gradient.

    Raises:
        ValueError: if it is known from samples alone, and not accurately enough.
    """
    estimate = kl_estimate(q, p)
    if estimate.std_error is not None and bool((estimate.std_error > TOLERANCE * estimate.value.abs()).any()):
        raise ValueError("its KL can only be sampled, which is not accurate enough for a comparison")
    return estimate.value


def kl_estimate(q: Distribution, p: Distribution) -> KLEstimate:
    """Return the KL, `[*batch]`, without its gradient, with a standard error where no exact method computes it."""
    with torch.no_grad(), private_rng(0, tensors_of(q)[0].device if tensors_of(q) else torch.device("cpu")):
        return _ACCURATE.estimate(q, p)
