"""The report of an audit, as data and as text."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch_klloss.auditing.figure import ProbePoint, audit_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Verdict = Literal["right", "wrong value", "wrong gradient", "wrong value and gradient", "not judged"]


@dataclass(frozen=True)
class Finding:
    """One mistake of a loss.

    Attributes:
        id: its name in the catalogue (docs/mistakes.md), or "constant-factor", "affine", "unknown", "not-a-number",
            "wrong-shape" or "changes-its-inputs", which are measured.
        explanation: what the loss does.
        evidence: the numbers that show it.
        fix: what to do.
        alternatives: other mistakes that explain the values as well.
    """

    id: str
    explanation: str
    evidence: str
    fix: str
    alternatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class AuditReport:
    """The findings of `audit`; `print` it, or `assert report.ok`.

    Attributes:
        name: the loss with its parameters.
        signature: the name of the signature that it was called with.
        verdict: "right", "wrong value", "wrong gradient", "wrong value and gradient", or "not judged" where it could
            not be called or returned no number.
        mistakes: the mistakes of the value, then of the gradient.
        convention: its reduction in words, which is no mistake.
        gradient: its gradient in words.
        remarks: notes for the user: digits lost near equality, overflow, shapes that it does not take.
        reason: why it was not judged.
        num_probes: the number of batches it was called with.
        num_calls: the number of calls for each, more than one where it draws its own samples.
        false_alarm: the probability to call a right loss wrong.
        points: of the figure, one for each probe.
    """

    name: str
    signature: str
    verdict: Verdict
    mistakes: tuple[Finding, ...] = ()
    convention: str = ""
    gradient: str = ""
    remarks: tuple[str, ...] = ()
    reason: str = ""
    num_probes: int = 0
    num_calls: int = 0
    false_alarm: float = 0.0
    points: tuple[ProbePoint, ...] = field(default=(), repr=False)

    @property
    def ok(self) -> bool:
        """Whether value and gradient are the KL's."""
        return self.verdict == "right"

    def __str__(self) -> str:
        """Return the report as text, a paragraph."""
        lines = [f"{self.name}: {self.verdict.upper()}. {self._headline()}"]
        for finding in self.mistakes:
            lines += [f"  {line}" for line in (finding.evidence, f"fix: {finding.fix}") if line]
        if self.gradient:
            lines.append(f"  gradient: {self.gradient}")
        lines += [f"  note: {remark}" for remark in self.remarks]
        return "\n".join(lines)

    def _headline(self) -> str:
        if self.verdict == "not judged":
            return sentence(self.reason)
        if self.ok:
            return f"It is the KL(q‖p) in nats, {self.convention}."
        return " ".join(sentence(finding.explanation) for finding in self.mistakes)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, strings, lists and dictionaries, for JSON."""
        found: dict[str, Any] = plain(self)
        return found

    def figure(self) -> Figure:
        """Draw what the loss returned against the KL, one point a probe, and its explanation as a line.

        Raises:
            ImportError: if matplotlib is missing.
            ValueError: if the loss was not judged, so that there are no points.
        """
        if not self.points:
            raise ValueError(f"there is nothing to draw: {self.reason or 'no value was compared with the KL'}.")
        title = f"{textwrap.shorten(self.name, 70, placeholder=' …')}: {self.verdict}"
        found = ", ".join(finding.id for finding in self.mistakes) or self.convention
        return audit_figure(self.points, title=title, found=found)


def sentence(words: str) -> str:
    """Return words as a sentence, with a capital and a full stop; the letters q and p stay as they are."""
    return f"{words if words[:2] in ('q ', 'p ') else words[:1].upper() + words[1:]}."


def plain(value: Any) -> Any:
    """Return a report, or a part of one, as plain numbers, strings, lists and dictionaries."""
    if is_dataclass(value):
        entries = {part.name: plain(getattr(value, part.name)) for part in fields(value)}
        return {**entries, "ok": value.ok} if isinstance(value, AuditReport) else entries
    return [plain(part) for part in value] if isinstance(value, tuple) else value
