"""The catalogue by its own examples: wrong lines are told by their names, right ones are right, the page is current."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch.distributions import kl_divergence

import torch_klloss
from tests.auditing.test_audit import NAMES as NAMES_OF_MISTAKES
from torch_klloss.auditing import CATALOGUE, audit
from torch_klloss.auditing.experiment.signatures import SIGNATURES
from torch_klloss.cli.mistakes_page import markdown, measurement

PAGE = Path(__file__).parents[2] / "docs" / "mistakes.md"
NAMES = {name: getattr(torch_klloss, name) for name in torch_klloss.__all__} | {
    "torch": torch,
    "F": torch.nn.functional,
    "math": math,
    "kl_divergence": kl_divergence,
    "torch_klloss": torch_klloss,
}
IN_CORPUS = set(NAMES_OF_MISTAKES.values())
BY_ID = {mistake.id: mistake for mistake in CATALOGUE}


def loss(signature, line):
    return eval(f"lambda {', '.join(SIGNATURES[signature].roles)}: {line}", dict(NAMES))


def lines():
    """Return the mistakes; in every run those that the corpus of wrong losses does not have."""
    for mistake in CATALOGUE:
        yield pytest.param(mistake, id=mistake.id, marks=pytest.mark.exhaustive if mistake.id in IN_CORPUS else ())


@pytest.mark.parametrize("mistake", list(lines()))
def test_a_wrong_line_is_told_by_its_name(mistake):
    num_dims = mistake.num_dims if mistake.num_dims > 2 else None
    wrong = loss(mistake.signature, mistake.wrong)
    report = audit(wrong, signature=mistake.signature, budget=320, num_dims=num_dims)
    told = {finding.id for finding in report.mistakes}
    told |= {name for finding in report.mistakes for name in finding.alternatives}
    assert mistake.id in told, report
    assert report.verdict.startswith("wrong")


@pytest.mark.parametrize("signature", SIGNATURES.values(), ids=lambda signature: signature.name)
def test_the_right_line_of_a_signature_is_right(signature):
    line, _, statements = signature.right.partition(", or with torch_klloss: ")
    assert audit(loss(signature.name, line), signature=signature.name).ok
    if statements:
        before, last = statements.split("; ")
        name, value = before.split(" = ")
        assert audit(loss(signature.name, f"(lambda {name}: {last})({value})"), signature=signature.name).ok


FACTORS = {"mean-over-latent": 1 / 8, "times-latent": 8, "half-missing": 2, "half-twice": 1 / 2, "sign": -1}
FACTORS |= {"bits": 1 / math.log(2), "always-zero": 0, "batch-divided-twice": 1 / 16}


@pytest.mark.parametrize("name", FACTORS)
def test_the_figures_of_a_factor_are_the_kl_times_it(name):
    found = measurement(BY_ID[name])
    assert found.shape == (16, 8)
    assert found.value == pytest.approx(FACTORS[name] * found.kl, rel=1e-12)
    assert found.errors == (0, 0)


@pytest.mark.parametrize(("name", "sign"), [("normaliser-of-p-alone", 1), ("normaliser-of-q-alone", -1)])
def test_the_figures_of_random_lines_are_means_with_their_error(name, sign):
    found = measurement(BY_ID[name])
    assert found.shape == (40, 2)
    expected = found.kl + sign * 2 * 0.5 * math.log(2 * math.pi)
    assert 0 < abs(found.value - expected) < 5 * found.errors[0]  # a probability below 1e-6, with a fixed seed
    assert found.errors[0] < 0.01


def test_the_figures_of_a_gradient_are_along_the_kls():
    assert measurement(BY_ID["gradient-scaled"]).slope == pytest.approx(0.5, rel=1e-12)
    assert measurement(BY_ID["gradient-reversed"]).slope == pytest.approx(-1, rel=1e-12)
    assert math.isnan(measurement(BY_ID["no-gradient"]).slope)
    found = measurement(BY_ID["detached-samples"])
    assert abs(found.slope) < 5 * found.errors[1] < 0.1
    assert abs(found.value - found.kl) < 5 * found.errors[0]
    # k3 on fixed samples has the other direction's gradient, and the rest of the KL's has k3 with log q detached.
    other, difference = (measurement(BY_ID[f"gradient-of-{name}"]) for name in ("other-direction", "difference"))
    assert abs(other.slope + difference.slope - 1) < 5 * math.hypot(other.errors[1], difference.errors[1])


@pytest.mark.long
def test_the_page_in_docs_is_current():
    state = torch.get_rng_state()
    page = markdown()
    assert torch.equal(torch.get_rng_state(), state)
    assert page == PAGE.read_text(), "run python -m torch_klloss audit --write-docs docs/mistakes.md"


def test_every_mistake_has_its_heading_and_its_row_in_the_order_of_the_catalogue():
    page = PAGE.read_text()
    names = [mistake.id for mistake in CATALOGUE]
    assert names[0] == "weighted-twice"
    assert re.findall(r"^### (.+)$", page, re.MULTILINE) == names
    assert re.findall(r"^\| \[(.+?)\]\(#(.+?)\) \|", page, re.MULTILINE) == [(name, name) for name in names]
    for mistake in CATALOGUE:
        assert f"# wrong, as {mistake.signature}\n{mistake.wrong}\n" in page


def test_every_row_of_a_table_has_its_columns():
    assert {len(row.split(" | ")) for row in PAGE.read_text().splitlines() if row.startswith("| ")} == {2, 3}
