"""What every test runs under: one thread, a fixed seed, and a check that it left the global state alone."""

import gc
import os
import sys
from collections import defaultdict

import pytest
import torch
from hypothesis import settings
from torch.distributions import Distribution
from torch.distributions.kl import _KL_REGISTRY

from tests.references import recorded

torch.set_num_threads(1)  # small tensors are several times slower on two

settings.register_profile("dev", max_examples=25, deadline=None)
settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("all", max_examples=200, deadline=None, derandomize=True)  # `make test-all`
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") == "true" else "dev"))


@pytest.fixture(autouse=True)
def _seed():
    torch.default_generator.manual_seed(0)  # torch.manual_seed notes the stack for accelerators that come later


@pytest.fixture
def unvalidated():
    """Build distributions without torch's checks of their parameters."""
    Distribution.set_default_validate_args(False)
    yield
    Distribution.set_default_validate_args(True)


@pytest.fixture(params=[True, False], ids=["with float64", "without float64"])
def accelerator(request, monkeypatch):
    """Have no value looked at, and on one without float64 nothing computed in it that was given in float32."""
    replaced = {"can_be_read": lambda *_: False}
    if not request.param:
        replaced["has_digits_to_spare"] = lambda _: False
    for name, module in list(sys.modules.items()):
        if name.startswith("torch_klloss"):
            for function in replaced.keys() & vars(module).keys():
                monkeypatch.setattr(module, function, replaced[function])


@pytest.fixture(autouse=True)
def _global_state():
    """Fail a test that changes torch's default dtype, its validation flag or its table of KL rules."""

    def state():
        return torch.get_default_dtype(), Distribution._validate_args, dict(_KL_REGISTRY)

    Distribution.set_default_validate_args(True)  # Dynamo turns it off for good, also in a doctest that compiles
    before = state()
    yield
    after = state()
    torch.set_default_dtype(before[0])
    Distribution.set_default_validate_args(before[1])
    _KL_REGISTRY.clear()
    _KL_REGISTRY.update(before[2])
    assert after == before


def pytest_addoption(parser):
    parser.addoption("--cases", type=int, metavar="N", help="of a test with many cases run N, spread over all of them")


def pytest_collection():
    gc.disable()  # all that is made now stays


def pytest_collection_finish():
    gc.freeze()  # so that no collection passes over it
    gc.enable()


def pytest_collection_modifyitems(config, items):
    """Leave out cases as `--cases` asks, and start what takes long first, so that no worker ends alone with it."""
    if (most := config.getoption("cases")) is not None:
        kept = {item for cases in _by_function(items).values() for item in spread(cases, most)}
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
    items.sort(key=lambda item: not any(map(item.get_closest_marker, ("scripts", "long"))))


def _by_function(items):
    cases = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    return cases


def spread(cases, most):
    """Return at most so many of the cases, at equal distances."""
    step = max(1, len(cases) / most)
    return [cases[int(i * step)] for i in range(min(most, len(cases)))]


def pytest_sessionfinish(exitstatus):
    if recorded.MODE == "record" and exitstatus == 0:
        recorded.save()
