"""Samplers: points of q, together with their weights."""

from torch_klloss.samplers import families as families  # registers the transports
from torch_klloss.samplers.antithetic import Antithetic
from torch_klloss.samplers.iid import IID
from torch_klloss.samplers.points import Points, Sampler
from torch_klloss.samplers.sobol import Sobol
from torch_klloss.samplers.stratified import Stratified

__all__ = ["IID", "Antithetic", "Points", "Sampler", "Sobol", "Stratified"]


def __dir__() -> list[str]:
    return sorted(__all__)
