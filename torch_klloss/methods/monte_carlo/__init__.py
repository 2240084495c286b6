"""Sampled KLs: a mean over draws of q, with the gradient that is asked for."""

from torch_klloss.methods.monte_carlo.method import MonteCarlo
from torch_klloss.methods.monte_carlo.mixed import MixedGradient
from torch_klloss.methods.monte_carlo.rounded_draws import RoundedDrawsWarning

__all__ = ["MixedGradient", "MonteCarlo", "RoundedDrawsWarning"]
