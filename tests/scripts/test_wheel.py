"""The wheel: what it requires, and that it works with nothing else. It is built from the sdist, as on a package index.

It is installed without its requirements, and runs with a path of two folders: its own, and one with links to torch,
numpy and what these require in turn, out of the environment of the tests. With the list of requirements compared as
well, this shows what an empty environment would show, except that pip can resolve and install the requirements, which
`.ci/wheel_alone` shows (`make test-all`).
"""

import json
import os
import re
import sysconfig
import tarfile
from importlib.metadata import Distribution, distributions
from itertools import accumulate

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.processes import ROOT, output

pytestmark = pytest.mark.scripts

PROJECT_URL = "https://example.org/owner/torch_klloss"
USE = """
import json, torch, torch_klloss as k
q = k.diagonal_normal(torch.ones(4, 3), torch.zeros(4, 3))
assert k.AutoKL()(q, k.standard_normal_like(q)) == 1.5
print(json.dumps({"version": k.__version__, "file": k.__file__}))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build the sdist, and the wheel from that, and return their folder."""
    folder = tmp_path_factory.mktemp("built")
    output("-m", "build", "--no-isolation", "--outdir", folder, ROOT, env={"PROJECT_URL": PROJECT_URL})
    return folder


@pytest.fixture(scope="module")
def site(built):
    """Install the wheel alone into a folder, and return that."""
    (wheel,) = built.glob("*.whl")
    output("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", built / "site", wheel)
    return built / "site"


def installed(name: str) -> list[Distribution]:
    """Return the distribution of a name, in a list; none for one of another platform."""
    return list(distributions(name=name, path=[sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]))[:1]


def required_by(names: set[str]) -> set[str]:
    """Return the named distributions and those that they require, and so on."""
    requirements = [Requirement(line) for name in names for d in installed(name) for line in d.requires or ()]
    wanted = {canonicalize_name(r.name) for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})}
    return names if wanted <= names else required_by(names | wanted)


@pytest.fixture(scope="module")
def alone(site, tmp_path_factory):
    """Return a function that runs Python with the wheel, torch and numpy, and says what is printed."""
    links = tmp_path_factory.mktemp("links")
    for name in required_by({"torch", "numpy"}):
        for distribution in installed(name):
            for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
                if not (links / top).exists():  # several share a namespace
                    (links / top).symlink_to(distribution.locate_file(top))

    def run(*arguments):
        path = os.pathsep.join(map(str, (site, links)))
        return output("-S", "-W", "error", *arguments, cwd=links.parent, env={"PYTHONPATH": path})

    return run


def test_it_requires_torch_and_numpy(site):
    (wheel,) = distributions(name="torch_klloss", path=[str(site)])
    requirements = map(Requirement, wheel.requires)
    assert {r.name for r in requirements if r.marker is None or "extra" not in str(r.marker)} == {"torch", "numpy"}


def test_it_computes_a_kl_with_torch_alone(site, alone):
    (wheel,) = distributions(name="torch_klloss", path=[str(site)])
    file = str(site / "torch_klloss" / "__init__.py")
    assert json.loads(alone("-c", USE)) == {"version": wheel.version, "file": file}


def test_its_command_runs_with_torch_alone(alone):
    assert json.loads(alone("-m", "torch_klloss", "compare", "Normal(1, 1)", "Normal(0, 1)", "--json"))["rows"]


def test_its_console_script_runs(site, alone):
    assert alone(site / "bin" / "torch-klloss", "--version").startswith("torch_klloss ")


def test_the_links_of_its_readme_lead_to_files_of_the_repository(site):
    (wheel,) = distributions(name="torch_klloss", path=[str(site)])
    readme = wheel.metadata.get_payload()
    links = re.findall(r"\]\(([^)]+)\)", readme)
    start = re.compile(rf"{PROJECT_URL}/(?:raw|blob)/v{re.escape(wheel.version)}/")
    assert len(links) > 20
    assert [link for link in links if not (start.match(link) and (ROOT / start.sub("", link)).is_file())] == []
    assert len(re.findall(rf"!\[.+?\]\({PROJECT_URL}/raw/", readme)) == 2


def test_the_sdist_has_what_its_readme_and_makefile_name(built):
    with tarfile.open(*built.glob("*.tar.gz")) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    folders = {f"{folder}/" for file in files for folder in accumulate(file.split("/")[:-1], "{}/{}".format)}
    readme = (ROOT / "README.md").read_text()
    named = {*re.findall(r"\b(?:docs|examples|benchmarks)/[\w./-]*\w", readme), *re.findall(r"\]\(([^)#:]+)", readme)}
    named |= set(re.findall(r"(?:constraints[\w-]*\.txt|\.ci/\w+)", (ROOT / "Makefile").read_text()))
    assert {name for name in named if name not in files and f"{name}/" not in folders} == set()
    assert {"Makefile", "LICENSE", "CITATION.cff", "constraints-oldest.txt", "tests/conftest.py"} <= files


@pytest.mark.parametrize("name", ["scipy", "rich", "matplotlib", "pytest", "lightning", "tests"])
def test_what_it_does_not_require_is_not_there(alone, name):
    with pytest.raises(AssertionError, match=f"No module named '{name}'"):
        alone("-c", f"import {name}")
