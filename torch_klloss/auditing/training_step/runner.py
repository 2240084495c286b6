"""`audit_module`: from a module and a batch to the report."""

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
from torch_klloss.auditing.experiment.calling import quiet, seeded
from torch_klloss.auditing.experiment.parameters import SignatureError, calls_to_try
from torch_klloss.auditing.experiment.signatures import SignatureName
from torch_klloss.auditing.report import AuditReport
from torch_klloss.auditing.training_step.judge import (
    UNREACHED,
    WAY_OUT,
    Judge,
    Judged,
    as_sum,
    groups_of,
    in_the_loss,
    is_on_the_way,
)
from torch_klloss.auditing.training_step.record import Checked, Number, Seen, location, owner_name
from torch_klloss.auditing.training_step.report import ModuleFinding, ModuleReport, ModuleVerdict, described
from torch_klloss.auditing.training_step.runs import Pairs, Runs, parts_of, private_copy
from torch_klloss.auditing.training_step.truth import exact_kl
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
    """Audit each function once, whatever came out of it.

    Attributes:
        seen: the functions of the step.
        seed: of the probes and the random streams.
    """

    seen: Sequence[Seen]
    seed: int
    _reports: dict[CodeType, AuditReport | None] = field(default_factory=dict)

    def of(self, group: Iterable[Number]) -> AuditReport | None:
        """Return the report of the function that returned one of these numbers, if it can be audited."""
        for number in group:
            for seen in self.seen:
                if number.live is not None and seen.returned is number.live:
                    if seen.code not in self._reports:
                        self._reports[seen.code] = self._report(seen)
                    if (report := self._reports[seen.code]) is not None:
                        return report
        return None

    def _report(self, seen: Seen) -> AuditReport | None:
        function = _function_of(seen)
        if function is None or seen.code.co_name == "training_step":
            return None
        try:
            call = calls_to_try(function, "auto")[0]
        except SignatureError:
            return None
        if call.signature.name != "distributions":
            return audit(function, seed=self.seed)
        given = next((v for v in seen.frame.f_locals.values() if isinstance(v, Distribution)), None)
        name = _SIGNATURE_OF.get(type(given))
        if name is None or (name != "distributions" and call.order != (0, 1)):
            return None
        return audit(function, signature="auto" if name == "distributions" else name, seed=self.seed)


def _function_of(seen: Seen) -> Callable[..., Any] | None:
    """Return the function that ran, bound to its object where it is a method."""
    code, variables = seen.code, seen.frame.f_locals
    owner = variables.get(owner_name(code))
    if isinstance(owner, nn.Module) and code.co_name == "forward":
        return owner
    places: list[Any] = [] if owner is None else [owner]
    if seen.parent is not None:
        places += [seen.parent.f_locals.get("self"), seen.parent.f_locals]
    for place in [*places, seen.frame.f_globals]:
        found = place.get(code.co_name) if isinstance(place, dict) else getattr(place, code.co_name, None)
        if callable(found) and getattr(getattr(found, "__func__", found), "__code__", None) is code:
            return found
    return None


_SUREST: tuple[ModuleVerdict, ...] = ("wrong", "right", "cannot tell")


def audit_module(
    module: nn.Module, batch: Any, *, batch_idx: int = 0, pairs: Pairs | None = None, seed: int = 0
) -> ModuleReport:
    """Find where the training step of a module has a KL that is not that of its own q and p.

    `module.training_step(batch, batch_idx)` runs on a copy, on the whole batch and on parts of it, so that a factor of
    the batch size is told from others. In every function of the user's that takes part, variables named like a KL
    (kl, kld, kl_loss, …), what is logged under such a name, and what functions of such a name return, are held
    against the KL of the distributions there: two `Distribution`s, or mean and spread (mu, logvar, std, …), against
    the standard Normal where there is no prior. Where there are none, those of the function that called, or was called,
    are taken. A function whose parameters tell how it is called, as kl_loss(mu, logvar), is given to `audit`, too.
    What a `KLLoss` of this library returns is right by construction. The mean or the sum over the batch, a value for
    each example or for each element are conventions, and a weight that has a name (beta, kl_weight) is no mistake.

    The module, its buffers and gradients, and the global random streams stay as they were. `log` and `log_dict` are
    recorded, and no Trainer is needed.

    Args:
        module: a LightningModule, or any `nn.Module` with a `training_step`.
        batch: as the step takes it.
        batch_idx: as the step takes it.
        pairs: for a step in which names do not tell: takes (module, batch) and returns {name: (q, p)}. Each is compared
            with the variable or logged value of that name, or else with whatever is named like a KL.
        seed: of the random streams that the step finds.

    Returns:
        What was found. A step that raises is reported so, with what was seen before; nothing raises from inside.

    Raises:
        TypeError: if `module` is no `nn.Module` with a `training_step`.

    Example:
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
    """Run the step on the batch and on parts of it, and judge what it had."""
    reason = runs.run(batch)
    if not runs.watched:
        return ModuleReport(name, reason=reason)
    for part in parts_of(batch):
        with contextlib.suppress(Exception):
            runs.run(part)
    findings = [_finding_of_loss(runs.module, checked) for checked in runs.whole.checked] + _findings(runs)
    if not findings and not reason:
        reason = f"nothing in it is named like a KL that could be compared: {WAY_OUT}"
    return ModuleReport(name, tuple(findings), reason)


def _finding_of_loss(module: nn.Module, checked: Checked) -> ModuleFinding:
    """Return the finding about a call of one of this library's losses."""
    try:
        kl = float(exact_kl(checked.q, checked.p).sum()) / checked.q.batch_shape[:1].numel()
    except Exception:
        kl = math.nan
    loss = type(module.get_submodule(checked.path)).__name__
    return ModuleFinding(
        where=checked.where,
        name=f"self.{checked.path}",
        pair=f"{type(checked.q).__name__} and {type(checked.p).__name__}",
        got=checked.per_example,
        expected=kl,
        ratio=checked.per_example / kl if kl else math.nan,
        verdict="right",
        explanation=f"{loss} of torch_klloss is right by construction",
    )


def _findings(runs: Runs) -> list[ModuleFinding]:
    """Return the findings about the numbers that are named like a KL, one for each line and name."""
    judge, audits = Judge(runs), FunctionAudits(runs.whole.seen, runs.seed)
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


def _judged(group: list[Number], judge: Judge) -> Judged:
    """Judge a number where it is wrong, or else where it is right, first in the functions that made it."""
    judged = [Judged(group, number, judge.judge(number)) for number in sorted(group, key=lambda number: not number.own)]
    return min(judged, key=lambda one: _SUREST.index(one.held.verdict))


def _finding(one: Judged, report: AuditReport | None) -> ModuleFinding:
    """Return what came of a number, and of the function that it came out of."""
    held = one.held
    verdict, said, mistakes = _with_audit(one, report)
    at = held.where and f", {held.where}"
    return ModuleFinding(
        where=location(one.number.seen.frame, one.number.line),
        name=one.number.label,
        pair="without a pair" if held.pair is None else f"q and p: {held.pair.label}{at}",
        got=held.got,
        expected=held.expected,
        ratio=held.got / held.expected if held.expected else math.nan,
        verdict=verdict,
        explanation=said.rstrip("."),
        mistakes=mistakes,
        audit=report,
    )


def _with_audit(one: Judged, report: AuditReport | None) -> tuple[ModuleVerdict, str, tuple[str, ...]]:
    """Return verdict, explanation and mistakes: what the probes of an audit tell counts more than one batch."""
    held = one.held
    told = held.verdict, held.explanation, held.mistakes
    if report is None or report.verdict == "not judged":
        return told
    if not report.ok:
        if held.verdict == "right" and all(finding.id == "constant-factor" for finding in report.mistakes):
            return told  # a weight with a name
        said = " and ".join(finding.explanation for finding in report.mistakes)
        return "wrong", said, (" + ".join(finding.id for finding in report.mistakes),)
    if held.verdict == "wrong" and not any(UNREACHED in mistake for mistake in held.mistakes):
        after = f"{report.name} alone is right: look at what it is called with, or what is done after it"
        return "wrong", f"{held.explanation}; {after}", held.mistakes
    if held.verdict == "cannot tell":
        return "right", f"{report.name} is right on all probes", held.mistakes
    return told
