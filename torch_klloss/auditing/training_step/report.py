"""The report of a training step, with a finding for each KL in it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch_klloss.auditing.report import AuditReport, plain

ModuleVerdict = Literal["right", "wrong", "cannot tell"]


@dataclass(frozen=True)
class ModuleFinding:
    """The finding about one KL of a training step.

    Attributes:
        where: "file.py:line in function".
        name: of the variable, or of the logged value.
        pair: the q and p that it was compared with, and where they were found.
        got: its value, in nats for each example where its reduction is known.
        expected: the KL of the pair, in nats for each example, mean over the batch; NaN without a pair.
        ratio: got / expected.
        verdict: "right", "wrong" or "cannot tell".
        explanation: in words.
        mistakes: one entry for each explanation that fits, the names of its mistakes in the catalogue joined by " + ".
        audit: the report of the function that returned it, where the names of its parameters determine a signature.
    """

    where: str
    name: str
    pair: str
    got: float
    expected: float
    ratio: float
    verdict: ModuleVerdict
    explanation: str
    mistakes: tuple[str, ...] = ()
    audit: AuditReport | None = None

    def __str__(self) -> str:
        """Return the finding as text."""
        lines = [f"{self.where}: {self.name} is {self.verdict.upper()}: {self.explanation}."]
        if not math.isnan(self.expected):
            lines.append(
                f"  got {self.got:.4g}, the KL per example is {self.expected:.4g} (ratio {self.ratio:.4g}); {self.pair}"
            )
        if self.audit is not None and not self.audit.ok:
            lines += [f"  {line}" for line in str(self.audit).splitlines()]
        return "\n".join(lines)


@dataclass(frozen=True)
class ModuleReport:
    """The findings of `audit_module`; `print` it, or `assert report.ok`.

    Attributes:
        name: the class of the module.
        findings: one for each KL of the training step.
        reason: why there are none, or the error that ended the step.
    """

    name: str
    findings: tuple[ModuleFinding, ...] = ()
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether there is a KL, and every one is right."""
        return bool(self.findings) and not self.reason and all(f.verdict == "right" for f in self.findings)

    def __str__(self) -> str:
        """Return the report as text."""
        count = len(self.findings)
        head = f"{self.name}: {count} KL{'' if count == 1 else 's'} in training_step."
        return "\n".join([head, *([f"  {self.reason}."] if self.reason else []), *map(str, self.findings)])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, strings, lists and dictionaries, for JSON."""
        return {"name": self.name, "ok": self.ok, "reason": self.reason, "findings": plain(self.findings)}
