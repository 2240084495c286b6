"""Every same-family pair that torch lacks against mpmath: values, gradients, signs, in three regimes and two dtypes."""

import pytest

from tests.references.beyond_torch import REFERENCES
from tests.references.harness import EVERY, combinations, measure
from tests.references.targets import GRADIENT, target

CASES = [
    pytest.param(*case, id=f"{case[0].name}-{case[1]}-{str(case[2]).removeprefix('torch.')}")
    for case in combinations(REFERENCES)
]


@pytest.mark.parametrize(("reference", "regime", "dtype"), CASES)
def test_values_and_gradients_have_the_digits_that_were_promised(reference, regime, dtype):
    accuracy = measure(reference, regime, dtype, num_draws=200, every=EVERY)
    allowed = target(reference, dtype)
    assert getattr(accuracy, f"worst_{allowed.unit}") <= allowed.number, accuracy.worst_value_at
    assert accuracy.worst_gradient <= GRADIENT[dtype], accuracy.worst_gradient_at
    assert (accuracy.negatives, accuracy.not_finite, accuracy.not_zero) == (0, 0, 0)
