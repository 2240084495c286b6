"""Methods, which turn (q, p) into a `KLEstimate`: one file or folder each."""

from torch_klloss.methods.base import Method, NotCertifiedError
from torch_klloss.methods.closed_form import ClosedForm
from torch_klloss.methods.enumeration import Enumeration
from torch_klloss.methods.first_of import FirstOf
from torch_klloss.methods.mixture_bound import MixtureBound
from torch_klloss.methods.monte_carlo import MixedGradient, MonteCarlo, RoundedDrawsWarning
from torch_klloss.methods.quadrature import Quadrature

__all__ = [
    "ClosedForm",
    "Enumeration",
    "FirstOf",
    "Method",
    "MixedGradient",
    "MixtureBound",
    "MonteCarlo",
    "NotCertifiedError",
    "Quadrature",
    "RoundedDrawsWarning",
]


def __dir__() -> list[str]:
    return sorted(__all__)
