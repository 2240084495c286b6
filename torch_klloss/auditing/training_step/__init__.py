"""`audit_module`: run a training step, and hold every KL in it against that of its own (q, p).

`runner` starts at the module and ends at the report. In between, `watching` sees what the functions of a step have
(`seen`), `pairs` finds the q and p among it by their `names`, `truth` computes their KLs, and `judging` holds the
numbers that are named like a KL against these.
"""

from torch_klloss.auditing.training_step.report import ModuleFinding, ModuleReport
from torch_klloss.auditing.training_step.runner import audit_module

__all__ = ["ModuleFinding", "ModuleReport", "audit_module"]
