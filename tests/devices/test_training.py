"""Trainings on the pretended device: the digits VAE in a plain loop, and each callback in a short fit."""

import pytest

from tests.devices.training import PRIORS
from tests.processes import run
from torch_klloss import callbacks

FLOAT32 = 2.0**-23


@pytest.fixture(scope="module")
def found():
    return run("from tests.devices.training import report; report()")


@pytest.mark.long
@pytest.mark.parametrize("float64", [True, False])
@pytest.mark.parametrize("prior", PRIORS)
def test_ten_steps_of_the_digits_vae_end_where_the_cpu_ends(found, prior, float64):
    gaps = found["digits"][prior][f"float64={float64}"]
    assert found["digits"][prior]["fall"] > 1  # or nothing was learnt
    # Ten steps of a few roundings each, in sums of which no digit cancels.
    assert gaps["losses"] < 64 * FLOAT32
    assert gaps["weights"] < 64 * FLOAT32


@pytest.mark.long
def test_a_step_of_the_digits_vae_waits_for_nothing(found):
    assert found["digits"]["normal"]["float64=True"]["waits"] == 0
    assert found["digits"]["mixture"]["float64=True"]["waits"] == 0


@pytest.mark.long
@pytest.mark.parametrize("name", callbacks.__all__)
def test_a_callback_logs_what_it_does_on_the_cpu_and_waits_only_then(found, name):
    for fit in found["callbacks"][name]:
        assert fit["expected"]
        assert fit["found"] == pytest.approx(fit["expected"], rel=1e-4, abs=1e-5)
        assert fit["waits"] == 0
