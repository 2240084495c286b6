"""KL divergence losses for PyTorch whose value and gradient are right by construction."""

from torch_klloss.auditing import audit, audit_module
from torch_klloss.closed_forms import has_closed_form, kl_divergence, register_kl
from torch_klloss.distributions.families import categorical, diagonal_normal, standard_normal_like
from torch_klloss.elbo import ELBOLoss, ELBOTerms
from torch_klloss.estimate import KLEstimate
from torch_klloss.log_probs import kl_from_log_probs
from torch_klloss.losses import AnalyticKL, AutoKL, KLLoss, MonteCarloKL, QuadratureKL
from torch_klloss.methods import NotCertifiedError

__version__ = "0.1.0"

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
