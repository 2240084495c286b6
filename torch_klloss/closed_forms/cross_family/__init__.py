"""Pairs of unlike families.

Every family is declared once, by a subclass of `Family` in `line`, `gamma_family`, `half_line`, `interval` or `counts`:
its parameters, the moments that it provides as q, and those that its log-density needs as p. A formula under
`@cross_family(Q, P)` is written for one pair, in `to_line`, `to_half_line`, `to_interval`, `nested` or `counts`. For
all other pairs where q provides what p needs, `fill_table` composes the formula from the moments. `infinite` lists the
pairs whose KL is infinite for all parameters.
"""

from importlib import import_module
from pkgutil import iter_modules

from torch_klloss.closed_forms.cross_family.registration import FAMILIES, FORMULAS, Family, cross_family, fill_table

for _module in iter_modules(__path__, prefix=f"{__name__}."):
    import_module(_module.name)
fill_table()

__all__ = ["FAMILIES", "FORMULAS", "Family", "cross_family"]
