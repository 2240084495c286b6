"""Accuracy targets: the error that a value and a gradient may have, for the tests and the benchmark alike."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, LowRankMultivariateNormal, MultivariateNormal

import tests.references
from tests.families import FAMILIES
from tests.references.harness import Errors
from tests.references.reference import Params, Reference

GRADIENT = {torch.float32: 1e-4, torch.float64: 1e-9}
"""The largest error of a gradient entry, divided by the largest entry."""

SPECIAL = tuple(f.type for f in FAMILIES if f.digits == "special")
"""Families whose KL takes a special function or a sum over classes."""
JOINT = tuple(f.type for f in FAMILIES if f.digits == "joint")
"""Families whose KL is a difference of special functions of several parameters."""
MATRIX = (MultivariateNormal, LowRankMultivariateNormal)


@dataclass(frozen=True)
class Target:
    """The error that a value may have.

    Args:
        number: how much of the unit.
        unit: "ulp" of the dtype, or "relative" to the value.
        factor: what the number is multiplied by: "" for nothing, the condition number "cond(L)" of p's factor,
            "cond(Σ)" of the two covariances, or "cond(Σ)/√KL", of covariances that were rounded to factors before a
            formula sees them: that moves both by eps cond(Σ), and a KL by as much as the root of it times that.
    """

    number: float
    unit: Literal["ulp", "relative"]
    factor: Literal["", "cond(L)", "cond(Σ)", "cond(Σ)/√KL"] = ""

    def __str__(self) -> str:
        """Return what a table shows."""
        if self.unit == "relative":
            return f"{self.number:.0e} rel.".replace("e-0", "e-")
        return f"{self.number:g} {self.factor or 'ULP'}"

    def used(self, errors: Errors, reference: Reference, q: Params, p: Params) -> list[float]:
        """Return, for every draw, the error divided by what it may be: above 1 the target is missed."""
        error = torch.tensor(getattr(errors, self.unit), dtype=torch.float64) / self.number
        if not self.factor:
            return error.tolist()
        conditions = [condition_number(d) for d in reference.build(q, p)]
        if self.factor == "cond(L)":
            return (error / conditions[1]).tolist()
        allowed = torch.maximum(*conditions).square()
        if self.factor == "cond(Σ)/√KL":
            kl = torch.tensor([float(kl) for kl in errors.reference], dtype=torch.float64)
            allowed = allowed * (1 + kl.rsqrt())
        return (error / allowed).tolist()


def target(reference: Reference, dtype: torch.dtype) -> Target:
    """Return what is allowed for the values of a pair in a dtype."""
    if not is_same_family(reference):
        return Target(16, "ulp") if dtype == torch.float32 else Target(1e-12, "relative")
    if is_given_by_covariance(reference):
        return Target(16, "ulp", "cond(Σ)/√KL")
    if dtype == torch.float32:
        return Target(8, "ulp")
    if issubclass(reference.type_q, MATRIX):
        is_low_rank = issubclass(LowRankMultivariateNormal, (reference.type_q, reference.type_p))
        return Target(16, "ulp", "cond(Σ)" if is_low_rank else "cond(L)")
    if issubclass(reference.type_q, JOINT):
        return Target(1e-11, "relative")
    return Target(64 if issubclass(reference.type_q, SPECIAL) else 16, "ulp")


def is_given_by_covariance(reference: Reference) -> bool:
    """Return whether torch's constructor takes a Cholesky factor of what the pair is given by."""
    drawn = reference.draw(reference.regimes[0], 1, np.random.default_rng(0), torch.float64)
    return any("covariance_matrix" in side for side in drawn)


def is_same_family(reference: Reference) -> bool:
    """Return whether one of the two types is, or inherits from, the other; MATRIX is one family."""
    types = reference.type_q, reference.type_p
    return issubclass(*types) or issubclass(*reversed(types)) or all(issubclass(t, MATRIX) for t in types)


def condition_number(d: Distribution) -> Tensor:
    """Return the condition number of the factor of d's covariance, in float64, `[*batch]`."""
    with torch.no_grad():
        return torch.linalg.cond(torch.linalg.cholesky(d.covariance_matrix.double()))


def references() -> list[Reference]:
    """Return the pairs of all modules beside this one, same-family pairs first."""
    names = [module.name for module in pkgutil.iter_modules(tests.references.__path__)]
    modules = [importlib.import_module(f"tests.references.{name}") for name in sorted(names)]
    found = [reference for module in modules for reference in getattr(module, "REFERENCES", [])]
    return sorted(found, key=lambda reference: not is_same_family(reference))
