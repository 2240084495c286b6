"""The worst inputs that `benchmarks/accuracy.py --search` ever found, computed again and held against the targets."""

import pytest
import torch
from torch.distributions import kl_divergence as torch_kl

from tests.references.harness import draw, errors_at
from tests.references.targets import references, target
from tests.references.worst_cases import DTYPES, WorstCase, evaluate, load, save, search

PAIRS = {reference.name: reference for reference in references()}
CASES = load()
EXPONENTIAL = PAIRS["Exponential"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.pair}-{case.dtype}-{case.of}")
def test_the_worst_input_found_is_within_the_target(case):
    reference = PAIRS[case.pair]
    again = evaluate(reference, *case.params(reference), case.of)[0]
    assert again.used <= 1, f"{again.ulp:.3g} ULP, gradient {again.gradient}"


def test_every_pair_was_searched():
    searched = {(case.pair, case.dtype, case.of) for case in CASES}
    expected = {(name, dtype, of) for name in PAIRS for dtype in DTYPES for of in ("value", "gradient")}
    assert searched == expected, "run benchmarks/accuracy.py --search SECONDS --pairs NAME"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_targets_reject_the_formula_that_cancels_near_equality(dtype):
    q, p = draw(EXPONENTIAL, "near", dtype, 50)
    errors = errors_at(EXPONENTIAL, q, p, kl=torch_kl, with_gradient=False)
    used = target(EXPONENTIAL, dtype).used(errors, EXPONENTIAL, q, p)
    assert sum(share > 1 for share in used) > 40


def test_a_case_comes_back_from_the_table_bit_by_bit(tmp_path):
    q, p = draw(EXPONENTIAL, "wide", torch.float64, 3)
    cases = evaluate(EXPONENTIAL, q, p, "gradient")
    save(cases, tmp_path / "table.json")
    for case in load(tmp_path / "table.json"):
        assert case in cases
        i = cases.index(case)
        for side, original in zip(case.params(EXPONENTIAL), (q, p), strict=True):
            assert all(torch.equal(side[key][0], original[key][i]) for key in original)


def test_a_search_returns_nothing_better_than_it_was_given():
    known = max(
        evaluate(EXPONENTIAL, *draw(EXPONENTIAL, "wide", torch.float32, 50), "value"), key=lambda case: case.used
    )
    found = search(EXPONENTIAL, torch.float32, "value", seconds=0.05, seed=0, known=known)
    assert isinstance(found, WorstCase)
    assert found.used >= known.used
