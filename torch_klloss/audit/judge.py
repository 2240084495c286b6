"""`audit`: call a loss, explain what it returns, say what is wrong."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.audit.experiment import (
    GROUPS,
    Asked,
    CallError,
    Observation,
    WrongShapeError,
    describe,
    isolated,
    observe,
)
from torch_klloss.audit.fit import (
    Fit,
    best_fits,
    constant_factor,
    convention,
    right_cores,
    unbiased_on_samples,
    wrong_cores,
)
from torch_klloss.audit.gradient import GradientFinding, judge_gradient
from torch_klloss.audit.health import remarks
from torch_klloss.audit.report import AuditReport, Finding, ProbePoint, Verdict
from torch_klloss.audit.signatures import Call, SignatureError, SignatureName, adapted, calls_to_try
from torch_klloss.special import student_t_quantile

Adapter = Callable[[Callable[..., Any], Distribution, Distribution], Tensor]

FALSE_ALARM = 5e-7
"""The probability to call a right value wrong; as much again for its gradient."""

_BUDGET = 6000
_FEWEST_FINITE = 4


@dataclass(frozen=True)
class _Judgement:
    """Hold what one way of calling a loss has shown."""

    asked: Asked
    observation: Observation
    fits: list[Fit]
    right: bool
    gradient: GradientFinding | None


def audit(
    fn: Callable[..., Any],
    *,
    signature: SignatureName | Adapter = "auto",
    seed: int = 0,
    budget: int = _BUDGET,
    gradient: bool = True,
) -> AuditReport:
    """Find out whether a hand-written KL is one, and if not, what it is.

    The loss is called with many distributions of several batch and latent sizes, and what it returns is held against
    the KL and against a catalogue of mistakes, alone and together (docs/mistakes.md). Its value and its gradient are
    judged apart. A loss that draws its own samples is called often, and its means are tested; a right loss is
    called wrong with a probability below 1e-6. A convention is not a mistake: the mean or the sum over the
    batch, a value for each example or for each element.

    Args:
        fn: the loss: a function, a bound method, a `functools.partial`, an `nn.Module`. Parameters with a default keep it.
        signature: what it takes; by default its parameters' names tell. "distributions" is fn(q, p) with two `Normal`s
            over [batch, latent] (or two `Categorical`s, where it does not take Normals), "independent" the same wrapped in
            `Independent`; "mean_logvar", "mean_std", "mean_logstd", "mean_var" are fn(mean, spread), against a
            standard Normal; "log_probs" is fn(log_q, log_p) at samples of q, [num_samples]; "samples" is
            fn(z, mean, logvar); "logits" is fn(logits_q, logits_p); "kl_div" is fn(input, target) in the order of
            `F.kl_div`, KL(target‖input). Or a function adapter(fn, q, p) that calls the loss with two Normals.
        seed: of the probes and of the random streams that the loss finds; the global ones are left alone.
        budget: how many calls a loss that draws samples may take; the error of the means falls with its root.
        gradient: whether the gradient is judged; without it a number that is logged and not trained with is right too.

    Returns:
        What was found; printed, it reads as a paragraph. A loss that cannot be called, or returns no number,
        is reported so, and never raises from here.

    Raises:
        ValueError: if there is no such signature.
        TypeError: if `fn` cannot be called at all.

    Example:
        >>> import torch
        >>> from torch_klloss import audit
        >>> def my_kl(mu, logvar):
        ...     return -0.5 * torch.mean(1 + logvar - mu**2 - logvar.exp())
        >>> audit(my_kl).mistakes[0].id
        'mean-over-latent'
        >>> assert audit(lambda mu, logvar: -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(-1).mean()).ok
    """
    if not callable(fn):
        raise TypeError(f"audit takes a loss that can be called, got {type(fn).__name__}.")
    name = name_of(fn)
    fn = isolated(fn)
    if callable(signature):
        fn, signature = adapted(signature, fn), "distributions"
    try:
        calls = calls_to_try(fn, signature)
    except SignatureError as error:
        return AuditReport(name, "auto", "not judged", reason=f"could not run: {error}".rstrip("."))
    return _audit(fn, name, calls, seed=seed, budget=budget, gradient=gradient)


def name_of(fn: Callable[..., Any]) -> str:
    """Return the name of a loss with its parameters, such as "my_kl(mu, logvar)"."""
    inner = fn
    while isinstance(inner, functools.partial):
        inner = inner.func
    name = getattr(inner, "__name__", None) or type(inner).__name__
    try:
        parameters = inspect.signature(fn.forward if isinstance(fn, torch.nn.Module) else fn).parameters.values()
    except (TypeError, ValueError):
        return f"{name}(…)"
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    return f"{name}({', '.join(needed)})"


def _audit(
    fn: Callable[..., Any], name: str, calls: list[Call], *, seed: int, budget: int, gradient: bool
) -> AuditReport:
    failures: list[tuple[Call, CallError]] = []
    judged: list[_Judgement] = []
    for call in calls:
        try:
            judgement = _judge(fn, call, seed, budget, gradient)
        except WrongShapeError as error:
            return _wrong_shape(name, call, error)
        except CallError as error:
            failures.append((call, error))
            continue
        judged.append(judgement)
        if judgement.right:
            break
    if not judged:
        call, error = failures[0]
        return AuditReport(name, call.signature.name, "not judged", reason=f"{error}")
    best = next((judgement for judgement in judged if judgement.right), judged[0])
    return _report(name, best, seed)


def _judge(fn: Callable[..., Any], call: Call, seed: int, budget: int, gradient: bool) -> _Judgement:
    asked = _first_that_runs(fn, call, seed, gradient)
    if _draws_its_own(asked, seed):
        return _judge_means(asked, seed, budget)
    observation = observe(asked, seed)
    if call.signature.given_samples:
        return _judge_on_samples(asked, observation, seed, budget)
    fits = best_fits(right_cores(asked, observation), asked.layout, observation, only_right=True)
    right = bool(fits) and bool(observation.value.isfinite().all())
    if not fits and observation.value.isfinite().sum() >= _FEWEST_FINITE:
        fits = best_fits(wrong_cores(asked, observation, on_samples=False), asked.layout, observation)
    return _with_gradient(asked, observation, fits, right)


def _first_that_runs(fn: Callable[..., Any], call: Call, seed: int, gradient: bool) -> Asked:
    """Return the probes of the number of dimensions and the dtype that the loss takes.

    Raises:
        CallError: if it takes none; the error is that of two dimensions in float64.
    """
    first: CallError | None = None
    for dtype in (torch.float64, torch.float32):
        for rank in call.signature.ranks:
            layout, leaves = call.signature.draw(seed, rank=rank, gentle=False)
            asked = Asked(fn, call, layout, leaves, rank, dtype, gradient)
            try:
                asked.reply(0, seed)
                asked.reply(len(layout.shapes) - 1, seed)
            except CallError as error:
                first = first or error
                continue
            return asked
    raise first or CallError("it could not be called")


def _draws_its_own(asked: Asked, seed: int) -> bool:
    """Return whether the same arguments give another value from another random stream."""
    if asked.call.signature.given_samples:
        asked = _fixed_arguments(asked, seed)
    for probe in (0, 1):
        one, other = asked.reply(probe, seed).value, asked.reply(probe, seed + 1).value
        if one.shape != other.shape or not torch.allclose(one, other, rtol=1e-5, atol=1e-9, equal_nan=True):
            return True
    return False


def _fixed_arguments(asked: Asked, seed: int) -> Asked:
    """Return the same loss, whose samples do not change from call to call."""
    signature = asked.call.signature

    def arguments(leaves: dict[str, Tensor]) -> tuple[Any, ...]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return signature.arguments(leaves)

    call = replace(asked.call, signature=replace(signature, arguments=arguments))
    return Asked(asked.fn, call, asked.layout, asked.leaves, asked.rank, asked.dtype, asked.gradient)


def _gently(asked: Asked, seed: int) -> Asked:
    """Return the loss with probes on which means of log-ratios, and of density ratios, can be tested."""
    layout, leaves = asked.call.signature.draw(seed, rank=asked.rank, gentle=True)
    return Asked(asked.fn, asked.call, layout, leaves, asked.rank, asked.dtype, asked.gradient)


def _calls_for(asked: Asked, budget: int) -> int:
    return max(2 * GROUPS, budget // len(asked.layout.shapes))


def _judge_means(asked: Asked, seed: int, budget: int) -> _Judgement:
    asked = _gently(asked, seed)
    observation = observe(asked, seed, _calls_for(asked, budget))
    limit = _limit(len(observation.value))
    fits = best_fits(right_cores(asked, observation), asked.layout, observation, only_right=True, accept=limit)
    right = bool(fits)
    if not fits:
        fits = best_fits(wrong_cores(asked, observation, on_samples=False), asked.layout, observation)
    return _with_gradient(asked, observation, fits, right)


def _limit(count: int) -> float:
    """Return within how many standard errors all of `count` right means lie but for the false alarms stated."""
    return float(student_t_quantile(1 - FALSE_ALARM / (2 * count), GROUPS - 1.0))


def _judge_on_samples(asked: Asked, observation: Observation, seed: int, budget: int) -> _Judgement:
    """Judge a function of given samples: by the values on the very samples, and else by its mean over many."""
    exact = [*unbiased_on_samples(asked, observation), *right_cores(asked, observation)]
    fits = best_fits(exact, asked.layout, observation, only_right=True)
    right = bool(fits)
    means = _gently(asked, seed)
    many = observe(means, seed, _calls_for(means, budget))
    if not fits:
        unbiased = best_fits(right_cores(means, many), means.layout, many, only_right=True, accept=_limit(len(many.value)))
        if unbiased:
            return _with_gradient(means, many, unbiased, True)
        fits = best_fits(wrong_cores(asked, observation, on_samples=True), asked.layout, observation)
        if not fits:
            return _with_gradient(means, many, best_fits(wrong_cores(means, many, on_samples=False), means.layout, many), False)
    judged = _with_gradient(means, many, fits, right)
    return replace(judged, asked=asked, observation=observation)


def _with_gradient(asked: Asked, observation: Observation, fits: list[Fit], right: bool) -> _Judgement:
    gradient = None
    if asked.gradient and bool(observation.value.isfinite().all()):
        gradient = judge_gradient(asked, observation, fits[0] if fits else None, FALSE_ALARM)
    return _Judgement(asked, observation, fits, right, gradient)


# --- the report -------------------------------------------------------------------------------------------------------


def _report(name: str, judged: _Judgement, seed: int) -> AuditReport:
    asked, observation, fits = judged.asked, judged.observation, judged.fits
    findings = [] if judged.right else _value_findings(judged)
    gradient_findings = [] if judged.gradient is None else [_gradient_finding(m) for m in judged.gradient.mistakes]
    if observation.changed:
        findings.append(_changes_inputs(observation.changed))
    notes = _about_call(judged) + (remarks(asked, fits[0], seed, stochastic=observation.stochastic) if fits else [])
    return AuditReport(
        name=name,
        signature=asked.call.signature.name,
        verdict=_verdict(bool(findings), bool(gradient_findings)),
        mistakes=tuple(findings + gradient_findings),
        convention=convention(fits[0], observation.arrangement) if fits else "",
        gradient="" if judged.gradient is None else judged.gradient.summary,
        remarks=tuple(notes),
        num_probes=len(asked.layout.shapes),
        num_calls=observation.num_calls,
        false_alarm=2 * FALSE_ALARM,
        points=_points(judged),
    )


def _verdict(value: bool, gradient: bool) -> Verdict:
    if value:
        return "wrong value and gradient" if gradient else "wrong value"
    return "wrong gradient" if gradient else "right"


def _per_probe(judged: _Judgement, values: Tensor) -> Tensor:
    """Return the mean of the observed values of every probe: for one example where each has its value."""
    observation = judged.observation
    sums = torch.zeros(len(judged.asked.layout.shapes), dtype=torch.float64)
    sums = sums.index_add(0, observation.probe_of_value, values)
    if observation.arrangement in ("total", "latent"):
        return sums
    return sums / judged.asked.layout.batch


def _true(judged: _Judgement) -> Tensor:
    core = right_cores(judged.asked, judged.observation)[0].core
    return judged.asked.layout.means(core.examples).detach()


def _points(judged: _Judgement) -> tuple[ProbePoint, ...]:
    kl, got = _true(judged), _per_probe(judged, judged.observation.value)
    errors = _per_probe(judged, judged.observation.std_error)
    fitted = None
    if judged.fits:
        fitted = _per_probe(judged, judged.fits[0].predict(judged.asked.layout, judged.observation.arrangement).detach())
    return tuple(
        ProbePoint(shape, float(kl[i]), float(got[i]), None if fitted is None else float(fitted[i]), float(errors[i]))
        for i, shape in enumerate(judged.asked.layout.shapes)
    )


def _value_findings(judged: _Judgement) -> list[Finding]:
    observation = judged.observation
    finite = observation.value.isfinite()
    if not judged.fits:
        return [_unexplained(judged, finite)]
    best, *others = judged.fits
    evidence = _evidence(judged)
    if not bool(finite.all()):
        evidence += f"; {int((~finite).sum())} of {len(finite)} values are not finite"
    found = []
    for index, mistake in enumerate(best.mistakes):
        named = tuple(" and ".join(sorted(fit.ids)) for fit in others) if index == 0 else ()
        found.append(
            Finding(mistake.id, mistake.what, evidence if index == 0 else "", _fix(judged, mistake.fix, index), named)
        )
    if not found:
        found.append(_not_finite(judged, finite))
    return found


def _fix(judged: _Judgement, fix: str, index: int) -> str:
    if index:
        return fix
    return f"{fix} In these arguments: {judged.asked.call.signature.right}"


def _evidence(judged: _Judgement) -> str:
    kl, got = _true(judged), _per_probe(judged, judged.observation.value)
    shape = judged.asked.layout.shapes[0]
    ratio = float(got[0] / kl[0])
    text = f"at {describe(shape)}: got {float(got[0]):.4f}"
    if judged.observation.stochastic:
        text += f" ± {float(_per_probe(judged, judged.observation.std_error)[0]):.4f}"
    text += f", the KL per example is {float(kl[0]):.4f} (ratio {ratio:.4f}{_as_fraction(ratio, shape)}"
    return f"{text}, on {len(kl)} of {len(kl)} probes)"


def _as_fraction(ratio: float, shape: tuple[int, ...]) -> str:
    latent = torch.Size(shape[1:]).numel()
    for number in (latent, shape[0], latent * shape[0]):
        if number > 1 and abs(ratio * number - 1) < 1e-3:
            return f" = 1/{number}"
    return ""


def _unexplained(judged: _Judgement, finite: Tensor) -> Finding:
    if not bool(finite.any()):
        return _not_finite(judged, finite)
    kl, got = _true(judged), _per_probe(judged, judged.observation.value)
    keep = got.isfinite()
    design = torch.stack([kl[keep], torch.ones_like(kl[keep])], dim=1)
    slope, offset = torch.linalg.lstsq(design, got[keep]).solution.tolist()
    residual = (got[keep] - design @ torch.tensor([slope, offset], dtype=torch.float64)).abs().max()
    if len(kl) > 2 and float(residual) < 1e-3 * float(got[keep].abs().max()):
        return Finding(
            "affine",
            f"it is {slope:.4g} times the KL {'plus' if offset >= 0 else 'minus'} {abs(offset):.4g}",
            _evidence(judged),
            _fix(judged, "Leave out the constant and the factor.", 0),
        )
    correlation = float(torch.corrcoef(torch.stack([kl[keep], got[keep]]))[0, 1]) if keep.sum() > 1 else 0.0
    return Finding(
        "unknown",
        "it is not the KL, nor what any mistake of the catalogue, or two of them together, would return",
        f"{_evidence(judged)}; correlation with the KL over the probes {correlation:.3f}",
        _fix(judged, "Compare it with a right loss term by term.", 0),
    )


def _not_finite(judged: _Judgement, finite: Tensor) -> Finding:
    values = judged.observation.value
    word = "NaN" if bool(values.isnan().any()) else "inf"
    return Finding(
        "not-a-number",
        f"it returns {word} for ordinary parameters",
        f"{int((~finite).sum())} of {len(finite)} values are not finite",
        _fix(judged, "Look for the logarithm or root of a negative number, or log-probabilities taken for probabilities.", 0),
    )


def _gradient_finding(mistake: Any) -> Finding:
    return Finding(mistake.id, mistake.what, "", mistake.fix)


def _changes_inputs(changed: tuple[str, ...]) -> Finding:
    return Finding(
        "changes-its-inputs",
        f"it changes its input {' and '.join(changed)} in place",
        "",
        "Work on copies: leave out the trailing underscores, +=, *= and index assignments.",
    )


def _wrong_shape(name: str, call: Call, error: WrongShapeError) -> AuditReport:
    finding = Finding(
        "wrong-shape",
        str(error),
        "",
        "Look for [batch] against [batch, 1], which broadcasts to [batch, batch]; "
        f"in these arguments: {call.signature.right}",
    )
    return AuditReport(name, call.signature.name, "wrong value", (finding,))


def _about_call(judged: _Judgement) -> list[str]:
    asked, observation = judged.asked, judged.observation
    notes = []
    if observation.drew and not observation.stochastic:
        notes.append("it draws from torch's global random stream, and does not use what it drew.")
    if asked.dtype is not torch.float64:
        notes.append("it takes float32 only.")
    if asked.rank != 2:
        notes.append(f"it does not take [batch, latent]; it was asked about {describe(asked.layout.shapes[0][-asked.rank:])}.")
    return notes


__all__ = ["audit", "constant_factor", "name_of"]
