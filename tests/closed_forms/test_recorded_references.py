"""The recorded references: the source that they are of, the digits that they keep, the draws that they cover."""

import importlib
import json

import mpmath
import pytest
import torch

from tests.references import beyond_torch, cross, elementary, gamma_family, recorded
from tests.references.harness import draw
from tests.references.recorded import Truth, agree, kept, records, save, source_hash, table, truths

MODULES = (beyond_torch, cross, elementary, gamma_family)
REFERENCES = {reference.name: reference for module in MODULES for reference in module.REFERENCES if reference.recorded}
DTYPES = (torch.float32, torch.float64)
BETA = REFERENCES["Beta"]
SOURCE = '''"""A pair."""


def kl(q, p):
    """Return the KL."""
    return q - p  # in nats
'''


def test_the_table_is_of_the_source_that_is_here():
    source = json.loads(recorded.TABLE.read_text())["source"]
    assert source == source_hash(), f"what tests/references computes has changed: run {recorded.COMMAND}"


@pytest.mark.parametrize(
    ("old", "new", "is_same"),
    [
        ("Return the KL", "Return KL(q‖p)", True),
        ("A pair", "Another", True),
        ("  # in nats", "", True),
        ("q - p", "q + p", False),
        ("kl(q, p)", "kl(p, q)", False),
    ],
)
def test_the_hash_is_that_of_the_code_and_not_of_its_words(old, new, is_same):
    assert (source_hash({"pair.py": SOURCE.replace(old, new)}) == source_hash({"pair.py": SOURCE})) is is_same


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_gradient", [True, False])
def test_a_truth_comes_back_from_the_table_with_its_digits(tmp_path, dtype, with_gradient):
    q, p = draw(BETA, "wide", dtype, 4, seed=1)
    assert kept(BETA, q, p, with_gradient) == [None] * 4  # so it is computed
    computed = truths(BETA, q, p, with_gradient)
    group = BETA.name, str(dtype).removeprefix("torch."), with_gradient
    save({group: dict(enumerate_keys(computed))}, tmp_path / "table.json")
    again = records(group, tmp_path / "table.json")
    with mpmath.workdps(BETA.digits):
        assert all(agree(again[key], truth, dtype) for key, truth in enumerate_keys(computed))
        exact = [BETA.kl(*({k: mpmath.mpf(t[i].item()) for k, t in side.items()} for side in (q, p))) for i in range(4)]
    assert [truth.kl for truth in computed] == exact


def enumerate_keys(computed):
    return ((i.to_bytes(recorded.KEY_BYTES, "little"), truth) for i, truth in enumerate(computed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_truth_that_lacks_digits_does_not_agree(dtype):
    bits, bits_of_gradient = (100, 50) if dtype == torch.float64 else (50, 22)
    with mpmath.workdps(60):
        truth = Truth(mpmath.mpf(2) / 3, [mpmath.mpf(1) / 3, mpmath.mpf(-4)])
        little, less = mpmath.ldexp(1, 2 - bits), mpmath.ldexp(4, 2 - bits_of_gradient)
        assert agree(recorded.rounded(truth, dtype), truth, dtype)
        assert not agree(truth._replace(kl=truth.kl * (1 + little)), truth, dtype)
        assert not agree(truth._replace(gradient=[truth.gradient[0] + less, truth.gradient[1]]), truth, dtype)
        assert not agree(Truth(mpmath.inf, []), truth, dtype)


def test_what_is_left_out_of_the_hash_keeps_nothing():
    left_out = [importlib.import_module(f"tests.references.{name.removesuffix('.py')}") for name in recorded.NOT_KEPT]
    assert not any(reference.recorded for module in left_out for reference in getattr(module, "REFERENCES", []))


def test_a_table_of_another_source_is_not_read(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(recorded.TABLE.read_text().replace(source_hash(), "0" * 64))
    assert table(path) == {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reference", REFERENCES.values(), ids=REFERENCES)
def test_the_draws_of_the_tests_are_found(reference, dtype):
    num_draws = 40 if reference in cross.REFERENCES else 200
    found = kept(reference, *draw(reference, "moderate", dtype, num_draws), with_gradient=True)
    # The others are computed: those beyond the range of a double, and those that another processor rounds otherwise.
    assert sum(truth is not None for truth in found) >= 0.9 * num_draws
