"""Exact KL divergences: one registry, one file a family of distributions."""

from torch_klloss.closed_forms import normal, standard_normal  # noqa: F401  (each registers its rules)
from torch_klloss.closed_forms.registry import has_closed_form, kl_divergence, register_kl

__all__ = ["has_closed_form", "kl_divergence", "register_kl"]
