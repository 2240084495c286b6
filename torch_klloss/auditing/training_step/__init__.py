"""The audit of a training step: every KL in it is compared with the KL of its own (q, p).

`runner` goes from the module to the report. In between, `watcher` makes a `record` of each function of the step,
`pairs` finds q and p among its variables by their `names`, `references` computes their KLs, and `judge` compares the
numbers that are named like a KL with these.
"""

from torch_klloss.auditing.training_step.report import ModuleFinding, ModuleReport
from torch_klloss.auditing.training_step.runner import audit_module

__all__ = ["ModuleFinding", "ModuleReport", "audit_module"]
