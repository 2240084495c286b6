"""Every family, loss, method and option on a pretended accelerator, with the CPU's answer and without a wait.

Each test is a process of its own, and names the cases that fail.
"""

import inspect

import pytest

from tests.devices.cases import ALIKE, HALF, OTHERS, UNLIKE
from tests.devices.documentation import text, written
from tests.devices.vae_cases import ELBO_OPTIONS
from tests.processes import run
from torch_klloss import ELBOLoss


def problems(*runs):
    """Return what is wrong with named cases, in runs (names, dtype, float64)."""
    return run(f"from tests.devices.comparison import report\nreport(*{runs!r})")


@pytest.mark.long
def test_everything_runs_on_a_device_without_float64_and_gives_the_answer_of_the_cpu():
    some = list(UNLIKE)[::12]
    in_half = [name for name in (*ALIKE, *OTHERS) if name in HALF or name in OTHERS][::24]
    assert problems(([*ALIKE, *some, *OTHERS], "float32", False), (in_half, "bfloat16", False)) == [{}, {}]


@pytest.mark.long
def test_everything_runs_on_a_device_with_float64_and_waits_for_nothing_that_torch_does_not():
    assert problems(([*ALIKE, *OTHERS], "float32", True)) == [{}]


@pytest.mark.exhaustive
@pytest.mark.parametrize("float64", [False, True])
def test_every_pair_of_unlike_families_does_as_well(float64):
    assert problems(([*UNLIKE], "float32", float64)) == [{}]


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("float64", [False, True])
def test_half_precision_does_as_well(dtype, float64):
    pairs = [name for name in (*ALIKE, *UNLIKE) if name in HALF]
    assert problems(([*pairs, *OTHERS], dtype, float64)) == [{}]


def test_every_option_of_the_vae_loss_is_in_a_case():
    options = {key for options in ELBO_OPTIONS.values() for key in options}
    assert set(inspect.signature(ELBOLoss.__init__).parameters) - {"self", "balance"} <= options


def test_the_page_lists_what_needs_float64():
    assert written() == text(), "python benchmarks/devices.py --write-docs"
