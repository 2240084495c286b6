"""The types that a user sees: a program with every public name passes mypy and pyright at their strictest, and runs.

`make lint` has mypy read it with the library, which takes a second; here it is read as a user's.
"""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, script
from tests.test_packaging import PUBLIC

pytestmark = pytest.mark.scripts

PROGRAM = ROOT / "tests" / "typed_program.py"
WRONG = """
import pytorch_lightning as pl
from torch.distributions import Normal
from torch_klloss import AutoKL, diagonal_normal
from torch_klloss.schedules import Linear
loss: int = AutoKL()(Normal(0.0, 1.0), Normal(0.0, 1.0))
mean: str = diagonal_normal("mean", "logvar")
callback: pl.Callback = Linear(steps=5)
"""


def checked(*command, folder, **environment):
    """Run a type checker as a user does, on a file of its own folder, and return what it says."""
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-m", *command], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def programs(tmp_path):
    """The folder of a user, with the program and one that is wrong in its last three lines."""
    (tmp_path / "program.py").write_text(PROGRAM.read_text())
    (tmp_path / "wrong.py").write_text(WRONG)
    return tmp_path


def test_the_program_has_every_public_class_and_function():
    nodes = [node for node in ast.walk(ast.parse(PROGRAM.read_text())) if isinstance(node, ast.ImportFrom)]
    imported = {alias.name for node in nodes for alias in node.names}
    public = {(module, name) for module in PUBLIC for name in importlib.import_module(module).__all__}
    options = {"OnFallback", "Level", "LogProbGradient", "LogProbValue"}  # words
    drawing = {("torch_klloss.plots", name) for module, name in public if module == "torch_klloss.plots"}
    assert {name for module, name in public - drawing} - options - imported == set()


def test_the_program_runs():
    assert script("tests/typed_program.py").startswith("True KLReport(")  # in a process of its own: it registers a rule


@pytest.mark.skipif(shutil.which("node") is None, reason="pyright runs on node")
def test_pyright_takes_the_program_and_finds_what_is_wrong_in_another(programs):
    settings = {"include": ["*.py"], "typeCheckingMode": "strict", "extraPaths": [str(ROOT)]}
    (programs / "pyrightconfig.json").write_text(json.dumps(settings))
    found = json.loads(checked("pyright", "--pythonpath", sys.executable, "--outputjson", folder=programs).stdout)
    assert found["summary"]["filesAnalyzed"] == 2
    errors = [d for d in found["generalDiagnostics"] if d["severity"] == "error"]
    assert {(Path(d["file"]).name, d["range"]["start"]["line"]) for d in errors} == {("wrong.py", n) for n in (5, 6, 7)}


@pytest.mark.exhaustive  # `make lint` reads it with the library
def test_mypy_takes_the_program_and_finds_what_is_wrong_in_another(programs):
    options = ("--strict", "--config-file=", "--follow-imports=silent", f"--cache-dir={programs}/cache")
    process = checked("mypy", *options, "program.py", "wrong.py", folder=programs, MYPYPATH=str(ROOT))
    errors = re.findall(r"^(\S+):(\d+): error: ", process.stdout, re.MULTILINE)
    assert set(errors) == {("wrong.py", line) for line in "678"}, process.stdout
