"""Every pair of the gamma family against mpmath: values, gradients, signs, in three regimes and two dtypes."""

import pytest
import torch
from torch.distributions import kl_divergence as torch_kl

from tests.references.gamma_family import REFERENCES
from tests.references.harness import EVERY, combinations, draw, errors_at, measure
from tests.references.targets import GRADIENT, target
from tests.references.worst_cases import used_by

CASES = [
    pytest.param(*case, id=f"{case[0].name}-{case[1]}-{str(case[2]).removeprefix('torch.')}")
    for case in combinations(REFERENCES)
]
BY_TORCH = [reference for reference in REFERENCES if reference.name != "VonMises"]


@pytest.mark.parametrize(("reference", "regime", "dtype"), CASES)
def test_values_and_gradients_have_the_digits_that_were_promised(reference, regime, dtype):
    accuracy = measure(reference, regime, dtype, num_draws=200, every=EVERY)
    allowed = target(reference, dtype)
    assert getattr(accuracy, f"worst_{allowed.unit}") <= allowed.number, accuracy.worst_value_at
    assert accuracy.worst_gradient <= GRADIENT[dtype], accuracy.worst_gradient_at
    assert (accuracy.negatives, accuracy.not_finite, accuracy.not_zero) == (0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reference", BY_TORCH, ids=lambda reference: reference.name)
def test_the_targets_reject_a_formula_that_cancels_near_equality(reference, dtype):
    q, p = draw(reference, "near", dtype, 40)
    errors = errors_at(reference, q, p, kl=torch_kl, with_gradient=False)
    used = used_by(reference, errors, q, p, "value")
    assert sum(share > 1 for share in used) > 20
