"""The report on a judgement: its findings, their evidence and their fixes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from torch_klloss.auditing.edge_cases import remarks
from torch_klloss.auditing.experiment.observation import Observation, WrongShapeError, describe
from torch_klloss.auditing.experiment.parameters import Binding
from torch_klloss.auditing.experiment.probes import Layout
from torch_klloss.auditing.explanation.candidates import right_core
from torch_klloss.auditing.explanation.fit import convention
from torch_klloss.auditing.explanation.mistake import Mistake
from torch_klloss.auditing.figure import ProbePoint
from torch_klloss.auditing.judge import FALSE_ALARM, Judgement, pooled_ratio
from torch_klloss.auditing.report import AuditReport, Finding, Verdict
from torch_klloss.auditing.right_lines import right_line

_SHOWN = 0.02  # the relative error at which a probe shows a fault


def report_of(name: str, judgement: Judgement, seed: int) -> AuditReport:
    """Return the report on a judgement, with the remarks of a few more calls at edge cases."""
    subject, observation, fits = judgement.subject, judgement.observation, judgement.fits
    findings = [] if judgement.right else _value_findings(judgement)
    gradient = judgement.gradient
    of_gradient = _named(gradient.mistakes) if gradient is not None else []
    if observation.changed:
        what = f"it changes {' and '.join(observation.changed)}"
        fix = "Work on copies: leave out the trailing underscores, +=, *=, index assignments and torch.set_…."
        findings.append(Finding("changes-its-inputs", what, "", fix))
    notes = _about_call(judgement)
    if fits:
        notes += remarks(subject, fits[0], seed, stochastic=observation.stochastic)
    return AuditReport(
        name=name,
        signature=subject.signature.name,
        verdict=_verdict(bool(findings), bool(of_gradient)),
        mistakes=tuple(findings + of_gradient),
        convention=convention(fits[0], observation.arrangement, subject.layout.example_dims) if fits else "",
        gradient="" if gradient is None else gradient.summary,
        remarks=tuple(notes),
        num_probes=len(subject.layout.shapes),
        num_calls=observation.num_calls,
        false_alarm=2 * FALSE_ALARM,
        points=_points(judgement),
    )


def _verdict(value: bool, gradient: bool) -> Verdict:
    if value:
        return "wrong value and gradient" if gradient else "wrong value"
    return "wrong gradient" if gradient else "right"


def _layout(judgement: Judgement) -> Layout:
    """Return the probes with the examples that the report speaks of: steps are some for a right loss alone."""
    layout = judgement.subject.layout
    is_of_steps = judgement.right or judgement.subject.signature.categorical
    return layout if is_of_steps else replace(layout, example_dims=1)


def _per_probe(judgement: Judgement, values: Tensor) -> Tensor:
    """Return every probe's total, divided by the batch size where there is a value for each example or element."""
    observation, layout = judgement.observation, _layout(judgement)
    sums = torch.zeros(len(layout.shapes), dtype=torch.float64)
    sums = sums.index_add(0, observation.probe_of_value, values)
    return sums if observation.arrangement in ("total", "latent") else sums / layout.batch


def _true(judgement: Judgement) -> Tensor:
    layout = _layout(judgement)
    core = right_core(replace(judgement.subject, layout=layout)).core
    if core.totals is not None and judgement.observation.arrangement == "total":
        return core.totals.detach()
    return layout.means(core.examples).detach()


def _points(judgement: Judgement) -> tuple[ProbePoint, ...]:
    subject, observation = judgement.subject, judgement.observation
    fit = judgement.fits[0] if judgement.fits else None
    # The sum over the batch of a right loss is shown per example.
    share = subject.layout.batch**fit.batch if judgement.right and fit is not None else torch.ones(1)
    kl, got = _true(judgement), _per_probe(judgement, observation.value) / share
    errors = _per_probe(judgement, observation.std_error) / share
    fitted = (
        None
        if fit is None
        else _per_probe(judgement, fit.predict(subject.layout, observation.arrangement).detach()) / share
    )
    return tuple(
        ProbePoint(shape, float(kl[i]), float(got[i]), None if fitted is None else float(fitted[i]), float(errors[i]))
        for i, shape in enumerate(subject.layout.shapes)
    )


def _value_findings(judgement: Judgement) -> list[Finding]:
    observation = judgement.observation
    if not judgement.fits:
        return [_unexplained(judgement)]
    best, *others = judgement.fits
    if not best.mistakes:
        return [_not_finite(judgement)]
    evidence = _evidence(judgement)
    if not bool(observation.value.isfinite().all()):
        evidence += f"; {_share_not_finite(observation)}"
    first, *rest = best.mistakes
    alternatives = tuple(" and ".join(sorted(fit.ids)) for fit in others)
    return [Finding(first.id, first.what, evidence, _fix(judgement, first.fix), alternatives), *_named(rest)]


def _named(mistakes: Iterable[Mistake]) -> list[Finding]:
    """Return the findings of mistakes that need no evidence."""
    return [Finding(mistake.id, mistake.what, "", mistake.fix) for mistake in mistakes]


def _fix(judgement: Judgement, fix: str) -> str:
    line = right_line(replace(judgement.subject, layout=_layout(judgement)))
    return f"{fix} In these arguments: {line}" if line else fix


def _share_not_finite(observation: Observation) -> str:
    finite = observation.value.isfinite()
    return f"{int((~finite).sum())} of {len(finite)} values are not finite"


def _evidence(judgement: Judgement) -> str:
    kl, got = _true(judgement), _per_probe(judgement, judgement.observation.value)
    at = _showing(got, kl, explained=bool(judgement.fits))
    shape = judgement.subject.layout.shapes[at]
    ratio = float(got[at] / kl[at])
    text = f"at {describe(shape)}: got {_number(got[at])}"
    if judgement.observation.stochastic:
        text += f" ± {_number(_per_probe(judgement, judgement.observation.std_error)[at])}"
    of = "step" if _layout(judgement).example_dims > 1 else "example"
    text += f", the KL per {of} is {_number(kl[at])} (ratio {_number(ratio)}{_as_fraction(ratio, shape)}"
    finite = int(got.isfinite().sum())
    return f"{text}, {'on' if judgement.fits else 'not the same on'} {finite} of {len(kl)} probes)"


def _showing(got: Tensor, kl: Tensor, *, explained: bool) -> int:
    """Return a probe that shows the fault: the first, unless it is right there, or nothing explains the values."""
    off = ((got - kl).abs() / (kl.abs() + 1e-3 * kl.abs().mean())).nan_to_num(-1.0, posinf=-1.0)
    return 0 if explained and float(off[0]) > _SHOWN else int(off.argmax())


def _number(value: Tensor | float) -> str:
    number = float(value)
    return f"{number:.4f}" if abs(number) >= 1e-3 or number == 0 else f"{number:.3g}"


def _as_fraction(ratio: float, shape: tuple[int, ...]) -> str:
    latent = torch.Size(shape[1:]).numel()
    for number in (latent, shape[0], latent * shape[0]):
        if number > 1 and abs(ratio * number - 1) < 1e-3:
            return f" = 1/{number}"
    return ""


def _unexplained(judgement: Judgement) -> Finding:
    if not bool(judgement.observation.value.isfinite().any()):
        return _not_finite(judgement)
    kl, got = _true(judgement), _per_probe(judgement, judgement.observation.value)
    keep = got.isfinite()
    design = torch.stack([kl[keep], torch.ones_like(kl[keep])], dim=1)
    slope, offset = torch.linalg.lstsq(design, got[keep]).solution.tolist()
    residual = (got[keep] - design @ torch.tensor([slope, offset], dtype=torch.float64)).abs().max()
    if len(kl) > 2 and float(residual) < 1e-3 * float(got[keep].abs().max()):
        return Finding(
            "affine",
            f"it is {slope:.4g} times the KL {'plus' if offset >= 0 else 'minus'} {abs(offset):.4g}",
            _evidence(judgement),
            _fix(judgement, "Leave out the constant and the factor."),
        )
    correlation = float(torch.corrcoef(torch.stack([kl[keep], got[keep]]))[0, 1]) if keep.sum() > 1 else 0.0
    return Finding(
        "unknown",
        "it is not the KL, nor what any mistake of the catalogue, or two of them together, would return",
        f"{_evidence(judgement)}; correlation with the KL over the probes {correlation:.3f}",
        _fix(judgement, "Compare it with a right loss term by term."),
    )


def _not_finite(judgement: Judgement) -> Finding:
    word = "NaN" if bool(judgement.observation.value.isnan().any()) else "inf"
    return Finding(
        "not-a-number",
        f"it returns {word} for ordinary parameters",
        _share_not_finite(judgement.observation),
        _fix(
            judgement,
            "Look for the logarithm or root of a negative number, or log-probabilities taken for probabilities.",
        ),
    )


def report_of_wrong_shape(name: str, binding: Binding, error: WrongShapeError) -> AuditReport:
    """Return the report on a loss whose shape no arrangement has."""
    finding = Finding(
        "wrong-shape",
        str(error),
        "",
        f"Look for [batch] against [batch, 1], which broadcasts to [batch, batch]; in these arguments: {binding.right}",
    )
    return AuditReport(name, binding.signature.name, "wrong value", (finding,))


def _about_call(judgement: Judgement) -> list[str]:
    subject, observation = judgement.subject, judgement.observation
    notes = [subject.binding.note] if subject.binding.note else []
    if observation.stochastic and judgement.right:
        _, error = pooled_ratio(subject, observation, judgement.fits[0])
        notes.append(
            f"it draws its own samples; the mean of {observation.num_calls} calls for each of "
            f"{len(subject.layout.shapes)} batches is the KL's within a standard error of {100 * error:.2g} %."
        )
    if observation.drew and not observation.stochastic:
        notes.append("it draws from torch's global random stream, and does not use what it drew.")
    if subject.dtype is not torch.float64:
        notes.append("it takes float32 only.")
    if subject.rank != 2:
        shape = subject.layout.shapes[0][-subject.rank :]
        refused = "it does not take [batch, latent]; " if judgement.refused else ""
        notes.append(f"{refused}it was called with {describe(shape)}.")
    return notes
