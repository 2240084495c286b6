"""Loss modules: a method and a reduction."""

from torch_klloss.losses.base import Call, KLLoss, Observer
from torch_klloss.losses.modules import AnalyticKL, AutoKL, MonteCarloKL, OnFallback, QuadratureKL

__all__ = [
    "AnalyticKL",
    "AutoKL",
    "Call",
    "KLLoss",
    "MonteCarloKL",
    "Observer",
    "OnFallback",
    "QuadratureKL",
]


def __dir__() -> list[str]:
    return sorted(__all__)
