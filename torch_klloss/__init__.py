"""KL divergence losses for PyTorch whose value and gradient are right by construction."""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

__all__ = [
    "AnalyticKL",
    "AutoKL",
    "ELBOLoss",
    "ELBOTerms",
    "KLEstimate",
    "KLLoss",
    "MonteCarloKL",
    "NotCertifiedError",
    "QuadratureKL",
    "audit",
    "audit_module",
    "categorical",
    "diagonal_normal",
    "has_closed_form",
    "kl_divergence",
    "kl_from_log_probs",
    "register_kl",
    "standard_normal_like",
]

# What is imported when it is asked for: training needs none of it.
_LATER = {"audit": "torch_klloss.auditing", "audit_module": "torch_klloss.auditing"}
_PACKAGES_LATER = ("auditing", "language", "plots", "testing")
_PACKAGES = ("closed_forms", "distributions", "elbo", "losses", "methods", "samplers", "schedules")


def _asks_for_the_version_alone() -> bool:
    """Return whether this process is `python -m torch_klloss --version` or `torch-klloss --version`."""
    *program, last = sys.orig_argv
    is_ours = program[-2:] == ["-m", "torch_klloss"] or [Path(name).stem for name in program[-1:]] == ["torch-klloss"]
    return is_ours and last == "--version"


if TYPE_CHECKING:
    from torch_klloss.auditing import audit, audit_module

if TYPE_CHECKING or not _asks_for_the_version_alone():  # which needs none of the seconds that torch takes
    import torch

    from torch_klloss.numerics.torch_version import check_torch

    check_torch(torch.__version__)

    from torch_klloss import schedules as schedules
    from torch_klloss.closed_forms import has_closed_form, kl_divergence, register_kl
    from torch_klloss.distributions.families import categorical, diagonal_normal, standard_normal_like
    from torch_klloss.elbo import ELBOLoss, ELBOTerms
    from torch_klloss.estimate import KLEstimate
    from torch_klloss.log_probs import kl_from_log_probs
    from torch_klloss.losses import AnalyticKL, AutoKL, KLLoss, MonteCarloKL, QuadratureKL
    from torch_klloss.methods import NotCertifiedError


def __getattr__(name: str) -> Any:
    if name in _LATER:
        value = getattr(import_module(_LATER[name]), name)
    elif name in _PACKAGES_LATER:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted((*__all__, *_PACKAGES, *_PACKAGES_LATER, "__version__"))
