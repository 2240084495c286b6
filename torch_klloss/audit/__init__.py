"""What is wrong with my KL? `audit(fn)` calls a loss and explains what it returns."""

from torch_klloss.audit.auditor import audit
from torch_klloss.audit.mistake import Mistake
from torch_klloss.audit.mistakes import CATALOGUE
from torch_klloss.audit.modules import ModuleFinding, ModuleReport, audit_module
from torch_klloss.audit.report import AuditReport, Finding

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
