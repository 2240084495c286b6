"""The gradient of a loss, compared with the KL's.

Every parameter's gradient is compared with the KL's, with zero, with the gradient of the other direction, with their
difference, and with a multiple of the KL's. The results for the parameters of q and of p together name the mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_klloss.auditing.experiment.calling import weights_like
from torch_klloss.auditing.experiment.observation import Directions, Observation, Subject, largest_deviation, observe
from torch_klloss.auditing.explanation.candidates import UNBIASED, Candidate, core_of, right_core, right_core_like
from torch_klloss.auditing.explanation.expectations import REVERSE
from torch_klloss.auditing.explanation.fit import Fit
from torch_klloss.auditing.explanation.mistake import ANALYTIC, CATEGORICAL, Hypothesis, Mistake
from torch_klloss.auditing.explanation.mistakes import CATALOGUE

_TOLERANCE = 2e-3  # of a deterministic loss, relative to a probe's gradient
_NUM_DIRECTIONS = 3  # of a sampled gradient, for each probe: see `directions_of`
_NEARLY = 0.1  # the distance from -1 at which a sampled factor counts as a reversed sign
_BY_KIND = {(group, kind): m for m in CATALOGUE for group, kind in (m.gradient or {}).items()}


@dataclass(frozen=True)
class GradientFinding:
    """The result of the comparison of a gradient.

    Attributes:
        summary: in words.
        mistakes: of the gradient alone; empty where it is the KL's, or follows from a wrong value.
    """

    summary: str
    mistakes: tuple[Mistake, ...] = ()


@dataclass(frozen=True)
class _Test:
    """The test of observed gradients, where `false_alarm` is the probability to reject a right one of one leaf."""

    subject: Subject
    observation: Observation
    false_alarm: float = 0.0

    def accepts(self, name: str, expected: Tensor | None) -> bool:
        """Return whether a leaf's gradient is the expected one."""
        found = self.observation.gradients[name]
        if found is None or expected is None or not bool(found.isfinite().all()):
            return False
        if not self.observation.stochastic:
            split = self.subject.layout.split
            pairs = zip(split(found), split(expected), strict=True)
            return all(float((a - b).norm()) <= _TOLERANCE * float(b.norm() + 1e-3 * expected.norm()) for a, b in pairs)
        limit = largest_deviation(len(found) + 1, self.false_alarm)
        errors = self.observation.gradient_errors[name]
        near = (found - expected).abs() <= limit * errors + _TOLERANCE * expected.abs() + 1e-12
        if not bool(near.all()):
            return False
        # Along the KL's own gradient, the first of the directions, all probes together tell more than each.
        off, size, error = (part.reshape(-1, _NUM_DIRECTIONS)[:, 0] for part in (found - expected, expected, errors))
        limit = largest_deviation(2, self.false_alarm, len(off) // 2)
        return float(off.sum().abs()) <= limit * float(error.norm()) + _TOLERANCE * float(size.abs().sum()) + 1e-12

    def accepts_zero(self, name: str) -> bool:
        """Return whether a leaf's gradient, if it has one, may be zero."""
        found = self.observation.gradients[name]
        return found is not None and self.accepts(name, torch.zeros_like(found))

    def kind(self, name: str, right: Tensor, fit: Fit) -> str:
        """Return the kind of a leaf's gradient, where `right` is the KL's and `fit` the reduction."""
        found, error = self.observation.gradients[name], self.observation.gradient_errors.get(name)
        if found is None or error is None or not (found.any() or error.any()):
            return "none"
        if self.accepts(name, right):
            return "right"
        if self.observation.stochastic and self.accepts_zero(name):
            return "zero"
        other = _gradients_of(fit, self.subject, self.observation, other=True)[name]
        if self.accepts(name, other):
            return "other direction"
        if self.accepts(name, right - other):
            return "difference"
        weight = 1 / error.square().clamp(min=1e-12)
        scale = float((weight * found * right).sum() / (weight * right**2).sum())
        return f"{scale:.4g} times" if self.accepts(name, scale * right) else "other"


def matches_on_samples(subject: Subject, observation: Observation, fit: Fit, seed: int) -> bool:
    """Return whether the gradient equals, sample by sample, the gradient of the log-ratio or of k3."""
    test = _Test(subject, observation)
    for integrand in UNBIASED:
        reference = replace(subject, fn=_reference(subject, observation, fit, integrand))
        expected = observe(reference, seed).gradients
        if all(test.accepts(name, expected[name]) for name in observation.gradients):
            return True
    return False


def _reference(
    subject: Subject, observation: Observation, fit: Fit, integrand: Callable[[Tensor, Tensor], Tensor]
) -> Callable[..., Tensor]:
    """Return a right loss of given samples, arranged and reduced as the judged one."""
    binding = subject.binding
    densities = binding.signature.log_densities
    if densities is None:
        raise ValueError(f"{binding.signature.name} has no samples among its arguments.")

    def loss(*arguments: Tensor) -> Tensor:
        value = integrand(*densities(binding.by_role(arguments)))
        if observation.arrangement == "element" or binding.signature.name == "log_probs":
            examples = value
        else:
            examples = value.reshape(value.shape[0] if subject.rank > 1 else 1, -1).sum(1)
        if observation.arrangement == "total":
            return examples.sum() if fit.batch else examples.mean()
        return examples.mean(0) if observation.arrangement == "latent" else examples

    return loss


def judge_gradient(subject: Subject, observation: Observation, fit: Fit | None, false_alarm: float) -> GradientFinding:
    """Compare the gradients with the KL's, reduced and scaled as the values are.

    Args:
        subject: the loss and its probes.
        observation: what the loss returned.
        fit: the explanation of its values; None where nothing explains them.
        false_alarm: the probability to call a right gradient wrong.
    """
    core = right_core_like(
        subject, None if fit is None else fit.candidate
    )  # the fit with the KL for its core, as if the factor alone were wrong
    scaled = Fit(core, (), 0, 0, 1.0, False, 0.0, 0.0) if fit is None else replace(fit, candidate=core)
    right = _gradients_of(scaled, subject, observation)
    test = _Test(subject, observation, false_alarm / len(subject.leaves))
    kinds = {name: test.kind(name, right[name], scaled) for name in subject.leaves}
    if fit is not None and fit.scale == 0:
        return GradientFinding("zero, as the value is.")
    is_wrong_value = fit is None or bool(fit.candidate.hypothesis.mistakes)
    if is_wrong_value and fit is not None and _is_a_formula(fit, subject):
        own = _gradients_of(fit, subject, observation)
        for name, kind in kinds.items():  # none is the value's own where it does not depend on the parameter
            if (not own[name].any()) if kind == "none" else test.accepts(name, own[name]):
                kinds[name] = "the value's"
    if set(kinds.values()) == {"none"}:
        return GradientFinding("none: no gradient flows to any argument.", (_BY_KIND["q", "none"],))
    return _of_a_wrong_value(set(kinds.values())) if is_wrong_value else _summarise(kinds, scaled, subject)


def may_be_zero(subject: Subject, observation: Observation, false_alarm: float) -> bool:
    """Return whether one of q's gradients cannot be told from zero."""
    test = _Test(subject, observation, false_alarm)
    return any(test.accepts_zero(name) for name in observation.gradients if name.startswith("q."))


def _is_a_formula(fit: Fit, subject: Subject) -> bool:
    form = CATEGORICAL if subject.signature.categorical else ANALYTIC
    return all(mistake.parts(form) is not None for mistake in fit.candidate.hypothesis.mistakes)


def _of_a_wrong_value(kinds: set[str]) -> GradientFinding:
    """Return the finding about a loss with a wrong value, whose gradient is no mistake of its own."""
    if kinds <= {"the value's", "none"}:
        return GradientFinding("the gradient of what it returns, not the KL's.")
    if kinds <= {"right", "none"}:
        return GradientFinding("the KL's, although the value is not.")
    return GradientFinding("not the KL's.")


def _gradients_of(fit: Fit, subject: Subject, observation: Observation, *, other: bool = False) -> dict[str, Tensor]:
    """Return the gradients, by leaf, of a loss with this fit, weighted as the observed ones are."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in subject.leaves.items()}
    live = replace(subject, leaves=leaves)
    own = fit.candidate.hypothesis.parts
    parts = {"direction": REVERSE} | {name: own[name] for name in ("tokens",) if name in own} if other else own
    candidate = Candidate(Hypothesis(), core_of(live, parts))
    predicted = replace(fit, candidate=candidate).predict(live.layout, observation.arrangement)
    counts = torch.bincount(observation.probe_of_value).tolist()
    weights = torch.cat([weights_like(part.detach()) for part in predicted.split(counts)])
    unused = sum(0 * leaf.sum() for leaf in leaves.values())  # the value may not depend on any leaf
    found = torch.autograd.grad((predicted * weights).sum() + unused, list(leaves.values()))
    return {name: observation.along(name, grad, live.layout) for name, grad in zip(leaves, found, strict=True)}


def directions_of(subject: Subject) -> Directions:
    """Return the directions of comparison of sampled gradients: the KL's gradient, an even and an uneven sum."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in subject.leaves.items()}
    kl = subject.layout.means(right_core(replace(subject, leaves=leaves)).core.examples)
    gradients = torch.autograd.grad(kl.sum(), list(leaves.values()))
    return {
        name: [_directions(part.reshape(-1)) for part in subject.layout.split(gradient)]
        for name, gradient in zip(leaves, gradients, strict=True)
    }


def _directions(gradient: Tensor) -> Tensor:
    ones = torch.ones_like(gradient)
    uneven = torch.sin(1.3 * torch.arange(len(gradient), dtype=gradient.dtype) + 0.4)
    return torch.stack([row / row.norm() for row in (gradient, ones, uneven)])


def _summarise(kinds: dict[str, str], scaled: Fit, subject: Subject) -> GradientFinding:
    groups: dict[str, set[str]] = {}
    for name, kind in kinds.items():
        groups.setdefault(name.split(".")[0] if "." in name else "q", set()).add(kind)
    times = _times(scaled, subject)
    every = set(kinds.values())
    if every == {"right"}:
        return GradientFinding(f"the KL's{times}.")
    if every <= {"right", "none"} and all(len(found) == 1 for found in groups.values()):
        alive = next(group for group, found in groups.items() if found == {"right"})
        fixed = next(group for group, found in groups.items() if found == {"none"})
        return GradientFinding(f"the KL's{times} to {alive}; {fixed} is fixed and gets none.")
    mistakes: list[Mistake] = []
    words = []
    for group, found in groups.items():
        kind = _group_kind(found)
        if kind == "right":
            continue
        mistake = _BY_KIND.get(("q", kind))
        explained = kind == "other" and bool(scaled.mistakes)  # as expected of a wrong value
        if mistake is not None and mistake not in mistakes and not explained:
            mistakes.append(mistake)
        words.append(f"{group} gets {_WORDS.get(kind, kind)}")
    return GradientFinding("; ".join(words) + ".", tuple(mistakes))


_WORDS = {
    "none": "none",
    "zero": "one that is zero on average",
    "other direction": "the gradient of KL(p‖q)",
    "difference": "the gradient of KL(q‖p) - KL(p‖q)",
    "partly none": "none to one of its parameters",
    "scaled": "a multiple of the KL's",
    "reversed": "the KL's with the wrong sign",
    "other": "one that is not the KL's",
}


def _group_kind(found: set[str]) -> str:
    if len(found) == 1:
        (kind,) = found
        return _scaled(kind) if kind.endswith(" times") else kind
    if found == {"right", "none"}:
        return "partly none"
    if found <= {"zero", "none"}:
        return "zero"
    if all(kind.endswith(" times") for kind in found):
        return "reversed" if {_scaled(kind) for kind in found} == {"reversed"} else "scaled"
    return "other"


def _scaled(kind: str) -> str:
    return "reversed" if abs(float(kind.removesuffix(" times")) + 1) < _NEARLY else "scaled"


def _times(fit: Fit, subject: Subject) -> str:
    """Return the factor of a wrong reduction in words; empty if there is none."""
    shape = subject.layout.shapes[0]
    latent = torch.Size(shape[subject.layout.example_dims :]).numel()
    sizes = [(fit.latent, latent)]
    if any("batch" in (mistake.analytic or {}) for mistake in fit.mistakes):
        sizes.append((-1 if fit.batch < 0 else 1, shape[0]))
    words = [f"{fit.scale:.4g}"] if fit.scale != 1 else []
    words += [f"{'1/' if power < 0 else ''}{size}" for power, size in sizes if power]
    return f", times {' times '.join(words)}" if words else ""
