"""Every elementary pair against mpmath: values, gradients, signs, in three regimes and two dtypes."""

import pytest
import torch
from torch.distributions import kl_divergence as torch_kl

from tests.references.elementary import REFERENCES, raw_categorical
from tests.references.harness import EVERY, combinations, draw, errors_at, measure
from tests.references.reference import REGIMES
from tests.references.targets import GRADIENT, target
from tests.references.worst_cases import used_by
from torch_klloss import categorical, kl_divergence

CASES = [
    pytest.param(*case, id=f"{case[0].name}-{case[1]}-{str(case[2]).removeprefix('torch.')}")
    for case in combinations(REFERENCES)
]


@pytest.mark.parametrize(("reference", "regime", "dtype"), CASES)
def test_values_and_gradients_have_the_digits_that_were_promised(reference, regime, dtype):
    accuracy = measure(reference, regime, dtype, num_draws=200, every=EVERY)
    assert accuracy.worst_ulp <= target(reference, dtype).number, accuracy.worst_value_at
    assert accuracy.worst_gradient <= GRADIENT[dtype], accuracy.worst_gradient_at
    assert (accuracy.negatives, accuracy.not_finite, accuracy.not_zero) == (0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reference", REFERENCES, ids=lambda reference: reference.name)
def test_the_targets_reject_a_formula_that_cancels_near_equality(reference, dtype):
    q, p = draw(reference, "near", dtype, 40)
    errors = errors_at(reference, q, p, kl=torch_kl, with_gradient=False)
    assert sum(share > 1 for share in used_by(reference, errors, q, p, "value")) > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("num_classes", "regime"),
    [
        pytest.param(n, regime, marks=[pytest.mark.exhaustive] if n == 2000 and regime != "near" else [])
        for n in (300, 2000)
        for regime in REGIMES
    ],
)
def test_a_categorical_of_many_classes_has_the_digits_that_were_promised(num_classes, regime, dtype):
    reference = raw_categorical(num_classes)
    accuracy = measure(reference, regime, dtype, num_draws=max(2, 1200 // num_classes))
    allowed = 32 if dtype == torch.float32 and num_classes > 1024 else target(reference, dtype).number
    assert accuracy.worst_ulp <= allowed
    assert accuracy.worst_gradient <= GRADIENT[dtype]
    assert (accuracy.negatives, accuracy.not_finite, accuracy.not_zero) == (0, 0, 0)


def test_many_classes_are_computed_alike_in_one_block_and_in_several():
    torch.manual_seed(0)
    a, b = (torch.randn(130, 700, dtype=torch.float64).requires_grad_() for _ in range(2))

    def both(rows):
        value = kl_divergence(categorical(a[rows]), categorical(b[rows]))
        return value.detach(), *torch.autograd.grad(value.sum(), (a, b))

    whole, parts = both(slice(None)), [both(slice(start, start + 13)) for start in range(0, 130, 13)]
    joined = torch.cat([part[0] for part in parts]), *(sum(part[i] for part in parts) for i in (1, 2))
    for one, other in zip(whole, joined, strict=True):
        torch.testing.assert_close(one, other, rtol=16 * torch.finfo(a.dtype).eps, atol=0)
