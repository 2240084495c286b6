"""The claims of the package about versions, extras, commands and public names are true."""

import importlib
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import torch_klloss
from tests.processes import ROOT, output, run
from torch_klloss.__main__ import run as run_command
from torch_klloss.numerics.torch_version import OLDEST, check_torch

if sys.version_info >= (3, 11):
    import tomllib

    PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
else:
    PROJECT = None

PUBLIC = [
    *(f"torch_klloss.{name}" for name in (*torch_klloss._PACKAGES, *torch_klloss._PACKAGES_LATER)),
    "torch_klloss.callbacks",
    "torch_klloss.estimate",
    "torch_klloss.log_probs",
    "torch_klloss.losses",
]
needs_tomllib = pytest.mark.skipif(PROJECT is None, reason="Python 3.10 cannot read pyproject.toml")


def pins(file):
    """Return the requirements of a file of constraints by name."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    return {requirement.name: requirement for requirement in map(Requirement, filter(None, lines))}


def floors(lines):
    """Return the lowest version that each requirement allows, by name."""
    return {r.name: s.version for r in map(Requirement, lines) for s in r.specifier if s.operator == ">="}


# --- versions ---------------------------------------------------------------------------------------------------------


@needs_tomllib
def test_the_oldest_torch_is_the_same_everywhere():
    assert floors(PROJECT["dependencies"])["torch"] == ".".join(map(str, OLDEST))
    assert pins("constraints-oldest.txt")["torch"].specifier == SpecifierSet(f"=={OLDEST[0]}.{OLDEST[1]}.0")


@needs_tomllib
def test_the_oldest_lane_pins_the_floors_of_the_extras():
    extras = PROJECT["optional-dependencies"]
    stated = floors([*extras["lightning"], *extras["plot"], *extras["cli"]])
    pinned = pins("constraints-oldest.txt")
    for name, floor in stated.items():
        (pin,) = pinned[name].specifier
        assert pin.operator == "=="
        assert f"{pin.version}.".startswith(f"{floor}."), name


@needs_tomllib
def test_every_python_of_the_classifiers_is_allowed():
    stated = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert stated == ["3.10", "3.11", "3.12", "3.13"]
    assert all(version in SpecifierSet(PROJECT["requires-python"]) for version in stated)


@needs_tomllib
def test_the_extra_all_is_every_extra_of_the_package():
    extras = dict(PROJECT["optional-dependencies"])
    del extras["examples"]  # which are not in the wheel
    (everything,) = map(Requirement, extras.pop("all"))
    assert everything.name == "torch_klloss"
    assert everything.extras == set(extras)


@pytest.mark.parametrize("version", ["2.7.1+cu126", "2.4.0", "1.13.1", "2.7.0a0+git1234"])
def test_an_older_torch_is_refused(version):
    with pytest.raises(ImportError, match=rf"needs torch 2\.8 or newer, and torch {re.escape(version)} is installed"):
        check_torch(version)


@pytest.mark.parametrize("version", ["2.8.0", "2.8.0a0+git1234", "2.14.1+cpu", "2.15.0.dev20261101", "3.0.0"])
def test_a_newer_torch_is_taken(version):
    check_torch(version)


def test_the_import_says_in_one_line_what_is_needed_and_how_to_get_it():
    message = run("""
import json, torch
torch.__version__ = "2.7.1+cu126"
try:
    import torch_klloss
except ImportError as error:
    print(json.dumps(str(error)))
""")
    assert message == (
        "torch_klloss needs torch 2.8 or newer, and torch 2.7.1+cu126 is installed: pip install --upgrade 'torch>=2.8'"
    )


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    return {"PYTHONPATH": str(tmp_path)}


def test_the_version_is_told_without_torch(without_torch):
    assert output("-m", "torch_klloss", "--version", env=without_torch) == f"torch_klloss {torch_klloss.__version__}\n"


def test_anything_else_imports_torch(without_torch):
    with pytest.raises(AssertionError, match="torch was imported"):
        output("-m", "torch_klloss", "--help", env=without_torch)


def test_the_console_script_runs_the_module(tmp_path, without_torch):
    """As pip writes it, for the entry point of pyproject.toml."""
    (line,) = re.findall(r'^torch-klloss = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    module, function = line.split(":")
    script = tmp_path / "bin" / "torch-klloss"
    script.parent.mkdir()
    script.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    paths = {"PYTHONPATH": f"{without_torch['PYTHONPATH']}:{ROOT}"}
    assert output(script, "--version", env=paths) == f"torch_klloss {torch_klloss.__version__}\n"


@pytest.mark.parametrize("program", ["torch-klloss", "torch-klloss.exe", "__main__.py"])
def test_the_help_names_the_command_as_it_was_called(monkeypatch, capsys, program):
    monkeypatch.setattr(sys, "argv", [f"/bin/{program}"])
    assert run_command() == 0
    name = "python -m torch_klloss" if program == "__main__.py" else "torch-klloss"
    assert capsys.readouterr().out.startswith(f"usage: {name} ")


# --- public names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_module_says_what_is_public(name):
    module = importlib.import_module(name)
    assert dir(module) == sorted(module.__all__)
    assert all(hasattr(module, public) for public in module.__all__)


def test_dir_shows_the_public_names_and_packages_and_nothing_else():
    names = dir(torch_klloss)
    assert set(torch_klloss.__all__) < set(names)
    assert all(hasattr(torch_klloss, name) for name in names)
    assert not {"torch", "sys", "import_module", "Path"} & set(names)
    packages = {path.parent.name for path in Path(torch_klloss.__file__).parent.glob("*/__init__.py")}
    assert packages - set(names) == {"callbacks", "cli", "numerics"}  # which need Lightning, and are no API


def test_the_audit_is_imported_when_it_is_asked_for():
    found = run("""
import json, sys, torch_klloss
def loaded():
    return [name in sys.modules for name in ("torch_klloss.auditing", "torch_klloss.language", "torch_klloss.plots")]
before = loaded()
audit, language = torch_klloss.audit, torch_klloss.language
print(json.dumps([before, loaded(), audit.__name__, "audit" in vars(torch_klloss)]))
""")
    assert found == [[False, False, False], [True, True, True], "audit", True]


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'torch_klloss' has no attribute 'AutoKl'"):
        _ = torch_klloss.AutoKl
