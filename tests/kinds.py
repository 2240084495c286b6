"""One case of each kind for every run; what repeats it is for `make test-all`."""

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import pytest


def one_of_each(cases: Iterable[Any], traits: Callable[[Any], Iterable[Hashable]]) -> list[Any]:
    """Return the cases as parameters, named as they are: exhaustive where others before have all of its traits."""
    seen: set[Hashable] = set()
    found = []
    for case in cases:
        new = set(traits(case)) - seen
        found.append(pytest.param(case, id=case.name, marks=() if new else pytest.mark.exhaustive))
        seen |= new
    return found
