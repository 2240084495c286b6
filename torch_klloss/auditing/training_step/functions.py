"""torch_klloss/auditing/training_step/functions.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from torch import nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, MultivariateNormal, Normal

from torch_klloss.auditing.auditor import audit
from torch_klloss.auditing.experiment.parameters import SignatureError, calls_to_try
from torch_klloss.auditing.experiment.signatures import SignatureName
from torch_klloss.auditing.report import AuditReport
from torch_klloss.auditing.training_step.record import Number, Seen, owner_name

_SIGNATURE_OF: dict[type, SignatureName] = {
    Normal: "distributions",
    Independent: "independent",
    MultivariateNormal: "multivariate",
    Categorical: "categorical",
    Bernoulli: "bernoulli",
}


@dataclass
class FunctionAudits:
    """Audit each function once, whatever came out of it.

    Attributes:
        seen: the functions of the step.
        seed: of the probes and the random streams.
    """

    seen: Sequence[Seen]
    seed: int
    _reports: dict[CodeType, AuditReport | None] = field(default_factory=dict)

    def of(self, group: Iterable[Number]) -> AuditReport | None:
        """Return the report of the function that returned one of these numbers, if it can be audited."""
        for number in group:
            for seen in self.seen:
                if number.live is not None and seen.returned is number.live:
                    if seen.code not in self._reports:
                        self._reports[seen.code] = self._report(seen)
                    if (report := self._reports[seen.code]) is not None:
                        return report
        return None

    def _report(self, seen: Seen) -> AuditReport | None:
        function = _function_of(seen)
        if function is None or seen.code.co_name == "training_step":
            return None
        try:
            call = calls_to_try(function, "auto")[0]
        except SignatureError:
            return None
        if call.signature.name != "distributions":
            return audit(function, seed=self.seed)
        given = next((v for v in seen.frame.f_locals.values() if isinstance(v, Distribution)), None)
        name = _SIGNATURE_OF.get(type(given))
        if name is None or (name != "distributions" and call.order != (0, 1)):
            return None
        return audit(function, signature="auto" if name == "distributions" else name, seed=self.seed)


def _function_of(seen: Seen) -> Callable[..., Any] | None:
    """Return the function that ran, bound to its object where it is a method."""
    code, variables = seen.code, seen.frame.f_locals
    owner = variables.get(owner_name(code))
    if isinstance(owner, nn.Module) and code.co_name == "forward":
        return owner
    places: list[Any] = [] if owner is None else [owner]
    if seen.parent is not None:
        places += [seen.parent.f_locals.get("self"), seen.parent.f_locals]
    for place in [*places, seen.frame.f_globals]:
        found = place.get(code.co_name) if isinstance(place, dict) else getattr(place, code.co_name, None)
        if callable(found) and getattr(getattr(found, "__func__", found), "__code__", None) is code:
            return found
    return None
