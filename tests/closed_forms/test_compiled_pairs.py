"""Registered pairs under torch.compile: one graph, with the value and the gradients of eager mode."""

from cProfile import Profile
from functools import cache
from pathlib import Path
from types import CodeType

import pytest
import torch

import torch_klloss
from tests.closed_forms.test_registered_pairs import PAIRS, Pair, finite_sum
from tests.processes import chunks, run
from tests.references import elementary, gamma_family

PACKAGE = Path(torch_klloss.__file__).parent
TRACED = {name: pair for name, pair in PAIRS.items() if pair.traced}


def value_and_gradients(pair: Pair, kl):
    parameters, leaves = pair.leaves((3,))
    value = kl(*parameters)
    return value.detach(), *torch.autograd.grad(finite_sum(value), leaves, materialize_grads=True)


def is_building_block(code: CodeType) -> bool:
    """Return whether code is a named function of the library that closed forms share."""
    path = Path(code.co_filename)
    return PACKAGE in path.parents and PACKAGE / "closed_forms" not in path.parents and code.co_name[0] not in "_<"


def calls(pair: Pair) -> dict[CodeType, int]:
    """Return how often each function is called for the value and the gradients of a pair."""
    value_and_gradients(pair, pair.kl)  # what is computed once and kept is no part of it
    with Profile(builtins=False) as profile:
        value_and_gradients(pair, pair.kl)
    return {entry.code: entry.callcount for entry in profile.getstats()}


@cache
def in_every_run() -> list[str]:
    """Return a few pairs that call every building block, by few calls: those with the rarest come first."""
    made = {name: calls(pair) for name, pair in TRACED.items()}
    blocks = {name: set(filter(is_building_block, made[name])) for name in made}
    missing = set().union(*blocks.values())
    kept = []
    while missing:
        having = {block: [name for name in blocks if block in blocks[name]] for block in missing}
        fewest = min(map(len, having.values()))
        rare = {name for names in having.values() if len(names) == fewest for name in names}
        kept.append(max(sorted(rare), key=lambda name: len(blocks[name] & missing) / sum(made[name].values())))
        missing -= blocks[kept[-1]]
    return kept


COMPILE = """
import gc, json, torch
from tests.closed_forms.test_compiled_pairs import PAIRS, value_and_gradients

gc.freeze()  # a collection need not pass over what was imported
wrong = {}
for name in %r:
    pair = PAIRS[name]
    torch.compiler.reset()
    try:
        found = value_and_gradients(pair, torch.compile(pair.kl, fullgraph=True, backend="eager"))
        torch.testing.assert_close(found, value_and_gradients(pair, pair.kl), rtol=1e-10, atol=1e-12)
    except Exception as error:
        wrong[name] = f"{type(error).__name__}: {error}"[:300]
print(json.dumps(wrong))
"""


@pytest.mark.long
def test_pairs_with_every_building_block_compile_to_one_graph_in_a_fresh_process():
    names = in_every_run()
    assert len(names) < len(TRACED) / 8
    assert run(COMPILE % names) == {}


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(6))
def test_every_other_pair_compiles_as_well(part):
    names = [name for name in TRACED if name not in in_every_run()]
    assert run(COMPILE % chunks(names, 6)[part]) == {}


NEAR_EQUALITY = """
import json, torch
from tests.closed_forms.test_compiled_pairs import WITH_DIGITS
from tests.references.harness import draw
from torch_klloss import kl_divergence

errors = {}
for reference, regime in WITH_DIGITS[%d::%d]:
    drawn = (draw(reference, each, torch.float64, 20) for each in (regime, "near"))
    sides = [
        {k: torch.cat((one[k], other[k])).detach().requires_grad_(k not in reference.constants) for k in one}
        for one, other in zip(*drawn)
    ]
    leaves = [t for side in sides for t in side.values() if t.requires_grad]
    torch.compiler.reset()
    found = []
    for kl in (kl_divergence, torch.compile(kl_divergence, fullgraph=True, backend="eager")):
        value = kl(*reference.build(*sides))
        found.append((value.detach(), torch.autograd.grad(value.sum(), leaves)))
    (value, grads), (again, again_grads) = found
    largest = sum(g.abs().reshape(40, -1).amax(-1) for g in grads)
    off = sum((g - a).abs().reshape(40, -1).amax(-1) for g, a in zip(grads, again_grads))
    errors[reference.name] = [float(((again - value) / value).abs().max()), float((off / largest).max())]
print(json.dumps(errors))
"""

WITH_DIGITS = [*((r, "moderate") for r in elementary.REFERENCES), *((r, "wide") for r in gamma_family.REFERENCES)]


@pytest.mark.long
@pytest.mark.parametrize("part", [3, *(pytest.param(part, marks=pytest.mark.exhaustive) for part in (0, 1, 2, 4, 5))])
def test_a_graph_of_distributions_has_the_digits_of_eager_mode_near_equality_too(part):
    errors = run(NEAR_EQUALITY % (part, 6))
    assert len(errors) == len(WITH_DIGITS[part::6])
    assert all(value <= 1e-14 and gradient <= 1e-9 for value, gradient in errors.values()), errors
