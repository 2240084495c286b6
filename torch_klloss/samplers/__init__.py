"""Where points come from, together with the weights that they carry."""

from torch_klloss.samplers.iid import IID
from torch_klloss.samplers.points import Points, Sampler

__all__ = ["IID", "Points", "Sampler"]
