"""Exact KL divergences: one registry, one file a family, and `cross_family` for pairs of unlike families.

Importing the package imports every file in it, and each registers its rules.
"""

from importlib import import_module
from pkgutil import iter_modules

from torch_klloss.closed_forms.registry import has_closed_form, kl_divergence, register_kl

for _module in iter_modules(__path__, prefix=f"{__name__}."):
    import_module(_module.name)

__all__ = ["has_closed_form", "kl_divergence", "register_kl"]


def __dir__() -> list[str]:
    return sorted(__all__)
