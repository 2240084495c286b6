"""Pairs of unlike families, composed from what q's family gives and p's asks for.

A family is one `Family` class in one of the files `line`, `gamma_family`, `half_line`, `interval`: it declares the
moments that it has as q and what its log-density needs as p. `fill_table` does the rest.
"""

from torch_klloss.closed_forms import von_mises  # noqa: F401
from torch_klloss.closed_forms.cross_family import (  # noqa: F401
    gamma_family,
    half_line,
    infinite,
    interval,
    line,
    to_half_line,
    to_interval,
    to_line,
)
from torch_klloss.closed_forms.cross_family.infinite import register_infinite
from torch_klloss.closed_forms.cross_family.nested import register_shared
from torch_klloss.closed_forms.cross_family.registration import COMPOSED, FAMILIES, Family, fill_table

register_infinite()
register_shared()
fill_table()

__all__ = ["COMPOSED", "FAMILIES", "Family", "fill_table"]
