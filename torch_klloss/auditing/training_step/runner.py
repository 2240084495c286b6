"""`audit_module`: the report on the KLs of a training step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, MultivariateNormal, Normal

from torch_klloss.auditing.auditor import audit
from torch_klloss.auditing.experiment.calling import described, quiet, seeded
from torch_klloss.auditing.experiment.parameters import SignatureError, bindings_to_try
from torch_klloss.auditing.experiment.signatures import SignatureName
from torch_klloss.auditing.report import AuditReport
from torch_klloss.auditing.training_step.judge import (
    PAIRS_HINT,
    UNREACHED,
    Judge,
    JudgedNumber,
    as_sum,
    groups_of,
    in_the_loss,
    is_on_the_way,
)
from torch_klloss.auditing.training_step.record import FunctionRecord, LossCall, Number, location, owner_name
from torch_klloss.auditing.training_step.references import exact_kl
from torch_klloss.auditing.training_step.report import ModuleFinding, ModuleReport, ModuleVerdict
from torch_klloss.auditing.training_step.runs import Pairs, Runs, parts_of, private_copy
from torch_klloss.rng import private_rng

_SIGNATURE_OF: dict[type, SignatureName] = {
    Normal: "distributions",
    Independent: "independent",
    MultivariateNormal: "multivariate",
    Categorical: "categorical",
    Bernoulli: "bernoulli",
}


@dataclass
class FunctionAudits:
    """Audits each function of a step once.

    Attributes:
        records: the functions of the step.
        seed: of the probes and the random streams.
    """

    records: Sequence[FunctionRecord]
    seed: int
    _reports: dict[CodeType, AuditReport | None] = field(default_factory=dict)

    def of(self, group: Iterable[Number]) -> AuditReport | None:
        """Return the report of the function that returned one of these numbers, if it can be audited."""
        for number in group:
            for record in self.records:
                if number.live is not None and record.returned is number.live:
                    if record.code not in self._reports:
                        self._reports[record.code] = self._report(record)
                    if (report := self._reports[record.code]) is not None:
                        return report
        return None

    def _report(self, record: FunctionRecord) -> AuditReport | None:
        function = _function_of(record)
        if function is None or record.code.co_name == "training_step":
            return None
        try:
            binding = bindings_to_try(function, "auto")[0]
        except SignatureError:
            return None
        if binding.signature.name != "distributions":
            return audit(function, seed=self.seed)
        given = next((v for v in record.frame.f_locals.values() if isinstance(v, Distribution)), None)
        name = _SIGNATURE_OF.get(type(given))
        if name is None or (name != "distributions" and binding.order != (0, 1)):
            return None
        return audit(function, signature="auto" if name == "distributions" else name, seed=self.seed)


def _function_of(record: FunctionRecord) -> Callable[..., Any] | None:
    """Return the function that ran, bound to its object where it is a method."""
    code, variables = record.code, record.frame.f_locals
    owner = variables.get(owner_name(code))
    if isinstance(owner, nn.Module) and code.co_name == "forward":
        return owner
    places: list[Any] = [] if owner is None else [owner]
    if record.parent is not None:
        places += [record.parent.f_locals.get("self"), record.parent.f_locals]
    for place in [*places, record.frame.f_globals]:
        found = place.get(code.co_name) if isinstance(place, dict) else getattr(place, code.co_name, None)
        if callable(found) and getattr(getattr(found, "__func__", found), "__code__", None) is code:
            return found
    return None


_SUREST: tuple[ModuleVerdict, ...] = ("wrong", "right", "cannot tell")


def audit_module(
    module: nn.Module, batch: Any, *, batch_idx: int = 0, pairs: Pairs | None = None, seed: int = 0
) -> ModuleReport:
    """Compare every KL in the training step of a module with the KL of its own q and p.

    `module.training_step(batch, batch_idx)` runs on a copy, on the whole batch and on parts of it, so that a factor of
    the batch size can be told from others. In each of the user's functions that run, the variables named like a KL
    (kl, kld, kl_loss, …), the values logged under such a name, and the values that functions of such a name return are
    compared with the KL of the distributions there: two `Distribution`s, or mean and spread (mu, logvar, std, …), with
    the standard Normal for a missing prior. A function without distributions is compared with those of its callers, or
    of the functions that it calls. One whose parameters determine a signature, as kl_loss(mu, logvar), is given to
    `audit`, too. The value of a `KLLoss` of this library is right by construction. The mean or the sum over the batch,
    a value for each example or for each element are conventions, and a named weight (beta, kl_weight) is no mistake.

    The module, its buffers and gradients, and the global random streams stay as they were. `log` and `log_dict` are
    recorded, and no Trainer is needed.

    Args:
        module: a LightningModule, or any `nn.Module` with a `training_step`.
        batch: the first argument of the step.
        batch_idx: its second argument.
        pairs: for a step whose names do not suffice: takes (module, batch) and returns {name: (q, p)}. Each is compared
            with the variable or logged value of that name, or else with whatever is named like a KL.
        seed: of the random streams at the start of the step.

    Returns:
        The findings. An error in the step is reported, with the findings before it, and never raised.

    Raises:
        TypeError: if `module` is no `nn.Module` with a `training_step`.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch_klloss.auditing.training_step import audit_module
        >>> class VAE(nn.Module):
        ...     def training_step(self, batch, batch_idx):
        ...         mu, logvar = batch.chunk(2, dim=1)
        ...         kl = -0.5 * torch.mean(1 + logvar - mu**2 - logvar.exp())
        ...         return kl
        >>> report = audit_module(VAE(), torch.randn(16, 6))
        >>> report.ok, report.findings[0].mistakes
        (False, ('mean-over-latent',))
    """
    if not isinstance(module, nn.Module) or not callable(getattr(module, "training_step", None)):
        raise TypeError(
            f"audit_module takes an nn.Module with a training_step(batch, batch_idx), got {type(module).__name__}; "
            "audit takes a loss alone."
        )
    name = type(module).__name__
    try:
        with quiet(), seeded(seed), private_rng(seed, _device_of(module)), private_copy(module) as own:
            return _report(name, Runs(own, batch_idx, pairs, seed), batch)
    except Exception as error:
        return ModuleReport(name, reason=f"it could not be judged: {described(error)}")


def _device_of(module: nn.Module) -> torch.device:
    return next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def _report(name: str, runs: Runs, batch: Any) -> ModuleReport:
    """Run the step on the batch and on parts of it, and judge its numbers."""
    reason = runs.run(batch)
    if not runs.watched:
        return ModuleReport(name, reason=reason)
    for part in parts_of(batch):
        with contextlib.suppress(Exception):
            runs.run(part)
    findings = [_finding_of_loss(runs.module, loss_calls) for loss_calls in runs.whole.loss_calls] + _findings(runs)
    if not findings and not reason:
        reason = f"nothing in it is named like a KL that could be compared: {PAIRS_HINT}"
    return ModuleReport(name, tuple(findings), reason)


def _finding_of_loss(module: nn.Module, loss_calls: LossCall) -> ModuleFinding:
    """Return the finding about a call of one of this library's losses."""
    try:
        kl = float(exact_kl(loss_calls.q, loss_calls.p).sum()) / loss_calls.q.batch_shape[:1].numel()
    except Exception:
        kl = math.nan
    loss = type(module.get_submodule(loss_calls.path)).__name__
    return ModuleFinding(
        where=loss_calls.where,
        name=f"self.{loss_calls.path}",
        pair=f"{type(loss_calls.q).__name__} and {type(loss_calls.p).__name__}",
        got=loss_calls.per_example,
        expected=kl,
        ratio=loss_calls.per_example / kl if kl else math.nan,
        verdict="right",
        explanation=f"{loss} of torch_klloss is right by construction",
    )


def _findings(runs: Runs) -> list[ModuleFinding]:
    """Return the findings about the numbers that are named like a KL, one for each line and name."""
    judge, audits = Judge(runs), FunctionAudits(runs.whole.records, runs.seed)
    judged = [_judged(group, judge) for group in groups_of(runs.whole)]
    judged = [as_sum(one, judged) for one in judged]
    judged = [one for one in judged if not is_on_the_way(one, judged)]
    judged = [in_the_loss(one, judged, runs.whole) for one in judged]
    found: dict[tuple[str, str], ModuleFinding] = {}
    for one in judged:
        finding = _finding(one, audits.of(one.group))
        key = (finding.where, finding.name)
        if key not in found or _SUREST.index(finding.verdict) < _SUREST.index(found[key].verdict):
            found[key] = finding
    return list(found.values())


def _judged(group: list[Number], judge: Judge) -> JudgedNumber:
    """Judge a number by the surest of its names: a wrong one, else a right one, first where it was made."""
    judged = [
        JudgedNumber(group, number, judge.judge(number)) for number in sorted(group, key=lambda number: not number.own)
    ]
    return min(judged, key=lambda one: _SUREST.index(one.comparison.verdict))


def _finding(one: JudgedNumber, report: AuditReport | None) -> ModuleFinding:
    """Return the finding about a number, with the report of the function that returned it."""
    comparison = one.comparison
    verdict, words, mistakes = _with_audit(one, report)
    at = comparison.where and f", {comparison.where}"
    return ModuleFinding(
        where=location(one.number.record.frame, one.number.line),
        name=one.number.label,
        pair="without a pair" if comparison.pair is None else f"q and p: {comparison.pair.label}{at}",
        got=comparison.got,
        expected=comparison.expected,
        ratio=comparison.got / comparison.expected if comparison.expected else math.nan,
        verdict=verdict,
        explanation=words.rstrip("."),
        mistakes=mistakes,
        audit=report,
    )


def _with_audit(one: JudgedNumber, report: AuditReport | None) -> tuple[ModuleVerdict, str, tuple[str, ...]]:
    """Return verdict, explanation and mistakes; the probes of an audit count more than one batch."""
    comparison = one.comparison
    compared = comparison.verdict, comparison.explanation, comparison.mistakes
    if report is None or report.verdict == "not judged":
        return compared
    if not report.ok:
        if comparison.verdict == "right" and all(finding.id == "constant-factor" for finding in report.mistakes):
            return compared  # a weight with a name
        words = " and ".join(finding.explanation for finding in report.mistakes)
        return "wrong", words, (" + ".join(finding.id for finding in report.mistakes),)
    if comparison.verdict == "wrong" and not any(UNREACHED in mistake for mistake in comparison.mistakes):
        after = f"{report.name} alone is right: look at its arguments, and at what is done with its value"
        return "wrong", f"{comparison.explanation}; {after}", comparison.mistakes
    if comparison.verdict == "cannot tell":
        return "right", f"{report.name} is right on all probes", comparison.mistakes
    return compared
