"""Whether the gradient is the KL's, and if not, what it is the gradient of.

Every parameter's gradient is compared with the KL's, with zero, with that of the other direction, with their
difference, and with a multiple of the KL's; what the parameters of q and of p show together names the mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_klloss.auditing.experiment.calling import weights_like
from torch_klloss.auditing.experiment.observation import GROUPS, Asked, Directions, Observation, observe
from torch_klloss.auditing.explanation.candidates import UNBIASED, Candidate, Integrand, core_of, right_core
from torch_klloss.auditing.explanation.expectations import REVERSE
from torch_klloss.auditing.explanation.fit import Fit
from torch_klloss.auditing.explanation.mistake import ANALYTIC, CATEGORICAL, Hypothesis, Mistake
from torch_klloss.auditing.explanation.mistakes import CATALOGUE
from torch_klloss.numerics.special import student_t_quantile

_TOLERANCE = 2e-3  # relative to a probe's gradient, of a deterministic loss
_NEARLY = 0.1  # how near to -1 the factor of a reversed gradient is, where it is sampled
_BY_KIND = {(group, kind): m for m in CATALOGUE for group, kind in (m.gradient or {}).items()}


@dataclass(frozen=True)
class GradientFinding:
    """Hold what was found about the gradient.

    Attributes:
        summary: in words.
        mistakes: those of the gradient alone; none where it is the KL's, or follows from the wrong value.
        kinds: what each parameter gets.
    """

    summary: str
    mistakes: tuple[Mistake, ...]
    kinds: Mapping[str, str]


def matches_on_samples(asked: Asked, observation: Observation, fit: Fit, seed: int) -> bool:
    """Return whether the gradient is, sample by sample, that of the log-ratio or of k3 on the very samples given."""
    for integrand in UNBIASED:
        reference = replace_fn(asked, _reference(asked, observation, fit, integrand))
        other = observe(reference, seed).gradients
        if all(
            found is not None and other[name] is not None and _close(name, other, asked, observation, 0.0)  # type: ignore[arg-type]
            for name, found in observation.gradients.items()
        ):
            return True
    return False


def _reference(asked: Asked, observation: Observation, fit: Fit, integrand: Integrand) -> Callable[..., Tensor]:
    """Return a loss of given samples that is right, arranged and reduced as the one that is judged."""
    call = asked.call
    densities = call.signature.log_densities
    if densities is None:
        raise ValueError(f"{call.signature.name} has no samples among its arguments.")

    def loss(*arguments: Tensor) -> Tensor:
        by_role = {call.signature.roles[role]: part for role, part in zip(call.order, arguments, strict=True)}
        value = integrand(*densities(by_role))
        if observation.arrangement == "element" or call.signature.name == "log_probs":
            examples = value
        else:
            examples = value.reshape(value.shape[0] if asked.rank > 1 else 1, -1).sum(1)
        if observation.arrangement == "total":
            return examples.sum() if fit.batch else examples.mean()
        return examples.mean(0) if observation.arrangement == "latent" else examples

    return loss


def judge_gradient(asked: Asked, observation: Observation, fit: Fit | None, false_alarm: float) -> GradientFinding:
    """Compare the gradients with the KL's, reduced and scaled as the values are.

    Args:
        asked: the loss and its probes.
        observation: what it returned for them.
        fit: the explanation of its values; None where there is none.
        false_alarm: the probability to call a right gradient wrong.
    """
    scaled = _reduction_only(fit, asked, observation)
    right = _gradients_of(scaled, asked, observation)
    false_alarm /= len(asked.leaves)
    kinds = {name: _kind(name, right, asked, observation, scaled, false_alarm) for name in asked.leaves}
    if fit is not None and fit.scale == 0:
        return GradientFinding("zero, as the value is.", (), kinds)
    if fit is None or fit.candidate.hypothesis.mistakes:
        if fit is not None and _is_a_formula(fit, asked):
            own = _gradients_of(fit, asked, observation)
            kinds = {
                name: "the value's" if _follows(name, kind, own, asked, observation, false_alarm) else kind
                for name, kind in kinds.items()
            }
        return _of_a_wrong_value(kinds)
    return _summarise(kinds, scaled, asked)


def may_be_zero(asked: Asked, observation: Observation, false_alarm: float) -> bool:
    """Return whether q's gradients, where it has any, have so much noise that they may be zero."""
    return any(
        found is not None and _close(name, {name: torch.zeros_like(found)}, asked, observation, false_alarm)
        for name, found in observation.gradients.items()
        if name.startswith("q.")
    )


def _follows(
    name: str, kind: str, own: dict[str, Tensor], asked: Asked, observation: Observation, false_alarm: float
) -> bool:
    """Return whether a gradient is that of the value, which may not depend on the parameter at all."""
    if kind == "none":
        return not own[name].any()
    return _close(name, own, asked, observation, false_alarm)


def _is_a_formula(fit: Fit, asked: Asked) -> bool:
    form = CATEGORICAL if asked.call.signature.categorical else ANALYTIC
    return all(mistake.parts(form) is not None for mistake in fit.candidate.hypothesis.mistakes)


def _of_a_wrong_value(kinds: dict[str, str]) -> GradientFinding:
    """Return what a loss of something else has for a gradient: a mistake of its own only where it has none."""
    every = set(kinds.values())
    if every == {"none"}:
        return GradientFinding("none: no gradient flows to any argument.", (_BY_KIND["q", "none"],), kinds)
    if every <= {"the value's", "none"}:
        return GradientFinding("that of what it returns, not the KL's.", (), kinds)
    if every <= {"right", "none"}:
        return GradientFinding("the KL's, although the value is not.", (), kinds)
    return GradientFinding("not the KL's.", (), kinds)


def _reduction_only(fit: Fit | None, asked: Asked, observation: Observation) -> Fit:
    """Return the fit with the KL itself for its core: what its gradient would be if only the factor were wrong."""
    core = right_core(asked)
    if fit is None:
        return Fit(core, (), 0, 0, 1.0, False, 0.0, 0.0)
    return replace(fit, candidate=core)


def _gradients_of(fit: Fit, asked: Asked, observation: Observation, *, other: bool = False) -> dict[str, Tensor]:
    """Return the gradients by leaf that a loss with this fit would have, weighted as the observed ones are."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in asked.leaves.items()}
    live = replace_leaves(asked, leaves)
    parts = {"direction": REVERSE} if other else fit.candidate.hypothesis.parts
    candidate = Candidate(Hypothesis(), core_of(live, parts))
    predicted = replace(fit, candidate=candidate).predict(live.layout, observation.arrangement)
    weights = torch.cat([weights_like(part.detach()) for part in predicted.split(_counts(observation))])
    total = (predicted * weights).sum() + sum(0 * leaf.sum() for leaf in leaves.values())  # which it may not depend on
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {
        name: observation.along(name, torch.zeros_like(leaf) if grad is None else grad, live.layout)
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }


def directions_of(asked: Asked) -> Directions:
    """Return along what a sampled gradient is compared: the KL's gradient, the elements' sum, and an uneven sum."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in asked.leaves.items()}
    kl = asked.layout.means(right_core(replace_leaves(asked, leaves)).core.examples)
    gradients = torch.autograd.grad(kl.sum(), list(leaves.values()))
    return {
        name: [_directions(part.reshape(-1)) for part in asked.layout.split(gradient)]
        for name, gradient in zip(leaves, gradients, strict=True)
    }


def _directions(gradient: Tensor) -> Tensor:
    ones = torch.ones_like(gradient)
    uneven = torch.sin(1.3 * torch.arange(len(gradient), dtype=gradient.dtype) + 0.4)
    return torch.stack([row / row.norm() for row in (gradient, ones, uneven)])


def _counts(observation: Observation) -> list[int]:
    return torch.bincount(observation.probe_of_value).tolist()


def replace_leaves(asked: Asked, leaves: dict[str, Tensor]) -> Asked:
    """Return what is asked with other leaves."""
    return Asked(asked.fn, asked.call, asked.layout, leaves, asked.rank, asked.dtype, asked.gradient)


def replace_fn(asked: Asked, fn: Callable[..., Tensor]) -> Asked:
    """Return what is asked, of another loss."""
    return Asked(fn, asked.call, asked.layout, asked.leaves, asked.rank, asked.dtype, asked.gradient)


def _kind(
    name: str,
    right: dict[str, Tensor],
    asked: Asked,
    observation: Observation,
    fit: Fit,
    false_alarm: float,
) -> str:
    found = observation.gradients[name]
    if found is None or (not found.any() and not observation.gradient_errors[name].any()):
        return "none"
    if _close(name, right, asked, observation, false_alarm):
        return "right"
    zero = {name: torch.zeros_like(found)}
    if observation.stochastic and _close(name, zero, asked, observation, false_alarm):
        return "zero"
    other = _gradients_of(fit, asked, observation, other=True)
    if _close(name, other, asked, observation, false_alarm):
        return "other direction"
    difference = {name: right[name] - other[name]}
    if _close(name, difference, asked, observation, false_alarm):
        return "difference"
    weight = 1 / observation.gradient_errors[name].square().clamp(min=1e-12)
    scale = float((weight * found * right[name]).sum() / (weight * right[name] ** 2).sum())
    if _close(name, {name: scale * right[name]}, asked, observation, false_alarm):
        return f"{scale:.4g} times"
    return "other"


def _close(name: str, predicted: dict[str, Tensor], asked: Asked, observation: Observation, false_alarm: float) -> bool:
    found, expected = observation.gradients[name], predicted[name]
    if found is None or not bool(found.isfinite().all()):
        return False
    if not observation.stochastic:
        pairs = zip(asked.layout.split(found), asked.layout.split(expected), strict=True)
        return all(float((a - b).norm()) <= _TOLERANCE * float(b.norm() + 1e-3 * expected.norm()) for a, b in pairs)
    errors = observation.gradient_errors[name]
    limit = float(student_t_quantile(1 - false_alarm / (2 * len(found)), GROUPS - 1.0))
    return bool(((found - expected).abs() <= limit * errors + _TOLERANCE * expected.abs() + 1e-12).all())


def _summarise(kinds: dict[str, str], scaled: Fit, asked: Asked) -> GradientFinding:
    groups: dict[str, set[str]] = {}
    for name, kind in kinds.items():
        groups.setdefault(name.split(".")[0] if "." in name else "q", set()).add(kind)
    times = _times(scaled, asked)
    if all(kind == "right" for kind in kinds.values()):
        return GradientFinding(f"the KL's{times}.", (), kinds)
    every = {kind for found in groups.values() for kind in found}
    if every == {"none"}:
        return GradientFinding("none: no gradient flows to any argument.", (_BY_KIND["q", "none"],), kinds)
    if every <= {"right", "none"} and all(len(found) == 1 for found in groups.values()):
        alive = next(group for group, found in groups.items() if found == {"right"})
        fixed = next(group for group, found in groups.items() if found == {"none"})
        return GradientFinding(f"the KL's{times} to {alive}; {fixed} is fixed and gets none.", (), kinds)
    mistakes: list[Mistake] = []
    words = []
    for group, found in groups.items():
        kind = _group_kind(found)
        if kind == "right":
            continue
        mistake = _BY_KIND.get(("q", kind))
        explained = kind == "other" and bool(scaled.mistakes)  # of a wrong value nothing else is to be expected
        if mistake is not None and mistake not in mistakes and not explained:
            mistakes.append(mistake)
        words.append(f"{group} gets {_WORDS.get(kind, kind)}")
    return GradientFinding("; ".join(words) + ".", tuple(mistakes), kinds)


_WORDS = {
    "none": "none",
    "zero": "one that is zero on average",
    "other direction": "that of KL(p‖q)",
    "difference": "that of KL(q‖p) - KL(p‖q)",
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


def _times(fit: Fit, asked: Asked) -> str:
    """Return the factor of a wrong reduction in words, or nothing."""
    shape = asked.layout.shapes[0]
    latent = torch.Size(shape[1:]).numel()
    sizes = [(fit.latent, latent)]
    if any("batch" in (mistake.analytic or {}) for mistake in fit.mistakes):
        sizes.append((-1 if fit.batch < 0 else 1, shape[0]))
    words = [f"{fit.scale:.4g}"] if fit.scale != 1 else []
    words += [f"{'1/' if power < 0 else ''}{size}" for power, size in sizes if power]
    return f", times {' times '.join(words)}" if words else ""
