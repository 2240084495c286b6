"""The pretended device itself: it refuses what a real one refuses, counts what a real one does, and sees mistakes."""

import pytest

from tests.processes import run

CODE = """
import json, torch
from torch.distributions import Normal
from tests.devices.comparison import on_device, problem
from tests.devices.pairs import BUILDS, Case, by_hand
from tests.devices.pretended import NAME, pretended

def raises(function):
    try:
        function()
    except (AssertionError, RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"

found = {}
with pretended() as counts:
    t = torch.ones(3, device=NAME)
    found["device"] = str(t.device)
    found["mixed"] = raises(lambda: t + torch.ones(3))
    found["number"] = (t + torch.tensor(2.0)).tolist()
    found["generator"] = raises(lambda: torch.rand(3, device=NAME, generator=torch.Generator()))
    found["mine"] = raises(lambda: Normal(t, 1.0).expand((2, 3)).log_prob(torch.zeros(2, 3)))
    for name, wait in {
        "item": lambda: t.sum().item(),
        "branch": lambda: bool((t > 0).all()),
        "mask": lambda: t[t > 0],
        "nonzero": lambda: t.nonzero(),
        "to": lambda: torch.ones(3).to(NAME),
        "tensor": lambda: torch.tensor(2.0, device=NAME),
        "new_tensor": lambda: t.new_tensor([1.0, 2.0]),
        "nothing": lambda: t.new_full((3,), 2.0) * t.abs() + 1,
        "assignment": lambda: t.clone().masked_fill_(t > 0, 0.0),
    }.items():
        counts.clear()
        wait()
        found[name] = counts.num_waits
    counts.clear()
    (t.view(3, 1) * 2).exp()
    found["kernels"] = counts.num_kernels
    counts.clear()
    before = counts.bytes
    u = torch.ones(1000, device=NAME)
    u = u * 2
    found["bytes"] = [counts.peak - before, counts.bytes - before]
with pretended(float64=False):
    found["float64"] = raises(lambda: torch.ones(3, device=NAME).double())
    found["made in float64"] = raises(lambda: torch.zeros(3, dtype=torch.float64, device=NAME))

from torch_klloss import AutoKL, kl_divergence

for float64 in (True, False):
    with pretended(float64=float64):
        q = Normal(torch.zeros(3, device=NAME), torch.ones(3, device=NAME), validate_args=False)
        found[f"two devices, float64={float64}"] = [
            raises(lambda: kl(q, Normal(torch.zeros(3), torch.ones(3)))) for kl in (kl_divergence, AutoKL())
        ]
        found[f"numbers, float64={float64}"] = str(AutoKL()(q, Normal(0.0, 1.0)).device)

tensors = BUILDS["vae"][1]
mistakes = {
    "host": lambda a, b: (a + torch.ones(6, 3)).mean(),
    "wait": lambda a, b: a.mean() if a.sum() > 0 else b.mean(),
    "wide": lambda a, b: a.double().mean().float(),
    "answer": lambda a, b: (a if a.is_cpu else 2 * a).mean(),
    "stray": lambda a, b: a.mean().cpu(),
    "none": lambda a, b: a.mean(),
}
for name, step in mistakes.items():
    it = Case(name, tensors, step, lambda a, b: a.mean())
    for float64 in (True, False):
        found[f"{name} {float64}"] = raises(lambda: problem(it, torch.float32, float64)) or problem(
            it, torch.float32, float64
        )
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    return run(CODE)


@pytest.mark.long
def test_it_has_the_rules_of_a_device(found):
    assert found["device"] == "pretend:0"
    assert "Expected all tensors to be on the same device" in found["mixed"]
    assert "Expected all tensors to be on the same device" in found["mine"]
    assert found["number"] == [3.0, 3.0, 3.0]
    assert "device type for generator" in found["generator"]
    assert "has no float64" in found["float64"]
    assert "has no float64" in found["made in float64"]


@pytest.mark.long
def test_it_counts_waits_kernels_and_bytes(found):
    waits = {name: found[name] for name in ("item", "branch", "mask", "nonzero", "to", "tensor", "new_tensor")}
    assert set(waits.values()) == {1}, waits
    assert found["nothing"] == found["assignment"] == 0
    assert found["kernels"] == 2
    assert found["bytes"] == [8000, 4000]


@pytest.mark.long
@pytest.mark.parametrize("float64", [True, False])
def test_parameters_on_two_devices_raise_the_error_of_torch_and_numbers_fit_every_device(found, float64):
    for error in found[f"two devices, float64={float64}"]:
        assert error.startswith("RuntimeError: Expected all tensors to be on the same device")
    assert found[f"numbers, float64={float64}"] == "pretend:0"


@pytest.mark.long
def test_the_comparison_sees_every_mistake(found):
    assert "same device" in found["host True"]
    assert found["wait True"].startswith("1 waits, torch's counterpart 0")
    assert "has no float64" in found["wide False"]
    assert "not close" in found["answer True"]
    assert "a result is on cpu" in found["stray True"]
    assert found["none True"] == found["none False"] == ""
