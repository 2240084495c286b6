"""Accuracy of the formulas that stay in float32, as accelerators and compiled graphs compute them."""

from itertools import compress

import pytest
import torch
from torch.distributions import Beta, Dirichlet, Gamma
from torch.distributions import kl_divergence as torch_kl

from tests.references.harness import EVERY, draw, errors_at
from tests.references.targets import references, target
from torch_klloss import kl_divergence
from torch_klloss.closed_forms.registry import find_rule

GRADIENT = 1e-5
"""The largest error of a gradient entry, divided by the largest entry."""
SMALL = 1e-28
"""A KL below it may be made of numbers that float32 has few digits for, and that accelerators take for 0."""


def is_native(reference):
    pair = reference.build(*draw(reference, reference.regimes[0], torch.float32, 1))
    match = find_rule(*pair)
    return match is not None and not match.rule.needs_float64


NATIVE = {reference.name: reference for reference in references() if is_native(reference)}
AT_ONCE = {r.name: r for r in references() if r.type_q is r.type_p and r.type_q in (Gamma, Beta, Dirichlet)}


def test_all_families_of_elementary_formulas_are_native():
    assert {"Normal", "Laplace", "Exponential", "Cauchy", "Pareto", "Uniform", "Poisson", "MultivariateNormal"} <= set(
        NATIVE
    )


def regimes_of(some):
    pairs = [(name, regime) for name, reference in some.items() for regime in reference.regimes]
    return pytest.mark.parametrize(("name", "regime"), pairs)


@pytest.mark.usefixtures("accelerator")
@regimes_of(NATIVE)
def test_values_and_gradients_in_float32_have_the_digits_that_were_promised(name, regime):
    check(NATIVE[name], regime)


@pytest.mark.parametrize("accelerator", [True], indirect=True)
@regimes_of(AT_ONCE)
def test_the_gamma_family_has_them_where_it_is_computed_at_once(accelerator, name, regime):
    check(AT_ONCE[name], regime)


def check(reference, regime):
    q, p = draw(reference, regime, torch.float32, 100 // EVERY)
    errors = errors_at(reference, q, p)
    used = target(reference, torch.float32).used(errors, reference, q, p)
    is_large = [kl == 0 or kl >= SMALL for kl in errors.reference]
    assert max(compress(used, is_large)) <= 1
    assert max(compress(errors.gradient, is_large)) <= GRADIENT
    assert not any(value < 0 for value in errors.value)
    if reference.type_q is reference.type_p:
        assert not kl_divergence(*reference.build(q, q)).any()


@pytest.mark.usefixtures("accelerator")
def test_the_targets_reject_a_formula_that_cancels_near_equality():
    q, p = draw(NATIVE["Normal"], "near", torch.float32, 50)
    errors = errors_at(NATIVE["Normal"], q, p, kl=torch_kl, with_gradient=False)
    assert sum(u > 1 for u in target(NATIVE["Normal"], torch.float32).used(errors, NATIVE["Normal"], q, p)) > 40
