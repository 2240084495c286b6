"""The wheel: what it requires, and that it works with nothing else.

The environment of the tests has more than the wheel requires, so everything else is hidden from the import system: all
that belongs neither to Python, nor to the wheel, nor to what torch and numpy require in turn. With the list of
requirements compared as well, this shows what an environment with torch alone would show, but for pip's own part: that
the requirements can be resolved and installed. `.ci/wheel_alone` shows that (`make test-all`).
"""

import json
import sys
from importlib.metadata import PackageNotFoundError, distributions, packages_distributions, requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.processes import ROOT, output
from tests.test_imports import BLOCK

pytestmark = pytest.mark.scripts

USE = """
import torch, torch_klloss as k
q = k.diagonal_normal(torch.ones(4, 3), torch.zeros(4, 3))
assert k.AutoKL()(q, k.standard_normal_like(q)) == 1.5
print(json.dumps({"version": k.__version__, "file": k.__file__}))
"""

COMMAND = """
import runpy
sys.argv = ["torch_klloss", "compare", "Normal(1, 1)", "Normal(0, 1)", "--json"]
runpy.run_module("torch_klloss", run_name="__main__")
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the wheel, install it alone into a folder, and return that."""
    folder = tmp_path_factory.mktemp("wheel")
    output("-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    output("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder / "site", wheel)
    return folder / "site"


def required_by(names: list[str]) -> set[str]:
    """Return the installed distributions that the named ones require, and so on, and these themselves."""
    found, left = set(), [canonicalize_name(name) for name in names]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += _required(name)
    return found


def _required(name: str) -> list[str]:
    try:
        requirements = map(Requirement, requires(name) or [])
    except PackageNotFoundError:  # of another platform, or Python's own by now
        return []
    wanted = (r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""}))
    return [canonicalize_name(r.name) for r in wanted]


def hidden() -> list[str]:
    """Return the top-level modules here that an environment with torch and numpy alone does not have."""
    kept = required_by(["torch", "numpy"])
    installed = packages_distributions().items()
    strange = [module for module, names in installed if kept.isdisjoint(map(canonicalize_name, names))]
    return sorted({*strange, "tests", "benchmarks", "examples"} - {"torch_klloss"})


def in_the_wheel_alone(site, code: str) -> str:
    return output("-W", "error", "-c", BLOCK % hidden() + code, cwd=site.parent, env={"PYTHONPATH": str(site)})


def test_it_requires_torch_and_numpy(site):
    (wheel,) = distributions(name="torch_klloss", path=[str(site)])
    requirements = map(Requirement, wheel.requires)
    assert {r.name for r in requirements if r.marker is None or "extra" not in str(r.marker)} == {"torch", "numpy"}


def test_it_computes_a_kl_with_torch_alone(site):
    used = json.loads(in_the_wheel_alone(site, USE))
    assert used["file"] == str(site / "torch_klloss" / "__init__.py")
    (wheel,) = distributions(name="torch_klloss", path=[str(site)])
    assert used["version"] == wheel.version


def test_its_command_runs_with_torch_alone(site):
    assert json.loads(in_the_wheel_alone(site, COMMAND))["rows"]


def test_what_is_not_required_is_hidden(site):
    assert {"scipy", "rich", "matplotlib", "pytest", "lightning", "tests"} <= set(hidden())
    assert not {"torch", "numpy", "sympy", *sys.stdlib_module_names} & set(hidden())
    with pytest.raises(AssertionError, match="blocked by the test"):
        in_the_wheel_alone(site, "import scipy")
