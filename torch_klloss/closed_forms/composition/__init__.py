"""Pairs of unlike families, composed from what q's family gives and p's asks for.

A family is one `Family` class in one of the files `line`, `gamma_kind`, `half_line`, `interval`: it declares the
moments that it has as q and what its log-density needs as p. `fill_table` does the rest.
"""

from torch_klloss.closed_forms import cross, cross_half_line, cross_interval, infinite, von_mises  # noqa: F401
from torch_klloss.closed_forms.composition import gamma_kind, half_line, interval, line  # noqa: F401
from torch_klloss.closed_forms.composition.engine import COMPOSED, FAMILIES, Family, fill_table
from torch_klloss.closed_forms.composition.infinite import register_infinite
from torch_klloss.closed_forms.composition.shared import register_shared

register_infinite()
register_shared()
fill_table()

__all__ = ["COMPOSED", "FAMILIES", "Family", "fill_table"]
