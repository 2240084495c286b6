"""The audit of a hand-written KL: `audit(fn)` calls a loss and explains what it returns."""

from torch_klloss.auditing.auditor import audit
from torch_klloss.auditing.explanation.mistake import Mistake
from torch_klloss.auditing.explanation.mistakes import CATALOGUE
from torch_klloss.auditing.report import AuditReport, Finding
from torch_klloss.auditing.training_step import ModuleFinding, ModuleReport, audit_module

__all__ = [
    "CATALOGUE",
    "AuditReport",
    "Finding",
    "Mistake",
    "ModuleFinding",
    "ModuleReport",
    "audit",
    "audit_module",
]


def __dir__() -> list[str]:
    return sorted(__all__)
