"""The declarations of families: none is forgotten, in any of the files that a family stands in.

CONTRIBUTING.md, "Adding a family", lists the files.
"""

import inspect

import torch.distributions as dist
from torch.distributions import Distribution

from tests.families import FAMILIES
from tests.references.composed import FAMILIES as MOMENTS
from tests.references.targets import references
from torch_klloss.closed_forms.cross_family import FAMILIES as COMPOSED
from torch_klloss.closed_forms.registry import _RULES

DECLARED = {f.type for f in FAMILIES}


def names(classes):
    return sorted(cls.__name__ for cls in classes)


def test_every_concrete_class_of_torch_is_declared():
    classes = {cls for cls in vars(dist).values() if inspect.isclass(cls) and issubclass(cls, Distribution)}
    missing = classes - DECLARED - {dist.Distribution, dist.ExponentialFamily}
    assert names(missing) == [], "add an entry to FAMILIES in tests/families.py"


def test_every_family_of_the_library_is_declared():
    of_rules = {cls for types in _RULES for cls in types if cls.__module__.startswith(("torch.", "torch_klloss."))}
    missing = (of_rules | set(COMPOSED)) - DECLARED - {dist.Distribution, dist.ExponentialFamily}
    assert names(missing) == [], "add an entry to FAMILIES in tests/families.py"


def test_every_family_with_moments_has_them_in_mpmath():
    on_the_line = {cls for cls, f in COMPOSED.items() if f.provides("entropy") or f.needs is not None}
    assert names(on_the_line - set(MOMENTS)) == [], "add an entry to MOMENTS in tests/references/beyond_torch.py"


def test_every_rule_of_one_family_has_a_reference_in_mpmath():
    referenced = {cls for reference in references() for cls in (reference.type_q, reference.type_p)}
    missing = {q for q, p in _RULES if q is p} - referenced - {dist.TransformedDistribution}  # of any base
    assert names(missing) == [], "add an entry to REFERENCES in tests/references/beyond_torch.py"


def test_the_names_of_the_entries_are_unique():
    assert len({f.name for f in FAMILIES}) == len(FAMILIES)
