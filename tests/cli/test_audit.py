"""`python -m torch_klloss audit`: its exit status, its words, and what a file may do to it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import said
from torch_klloss.auditing import AuditReport, audit
from torch_klloss.cli import audit as command
from torch_klloss.cli import mistakes_page
from torch_klloss.cli.entry_point import main

ROOT = Path(__file__).parents[2]

LOSSES = """
import sys
import torch
from torch import nn

print("printed by the import")

def right(mu, logvar):
    return -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(-1).mean()

def wrong(mu, logvar):
    return -0.5 * torch.mean(1 + logvar - mu**2 - logvar.exp())

def not_finite(mu, logvar):
    return right(mu, logvar) * math_nan

def nothing(mu, logvar):
    pass

def leaves(mu, logvar):
    sys.exit(0)

def too_many(a, b, c, d):
    return a

def blows_up(mu, logvar):
    return right(mu, logvar).expand(7)

def raises(mu, logvar):
    raise RuntimeError("as planned")

math_nan = float("nan")

class KL(nn.Module):
    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor
        self.part = right

    def forward(self, mu, logvar):
        return self.factor * right(mu, logvar)

    def half(self, mu, logvar):
        return self.factor * right(mu, logvar) / 2

    @staticmethod
    def static(mu, logvar):
        return right(mu, logvar)

class Needs(nn.Module):
    def __init__(self, size):
        super().__init__()

    @staticmethod
    def static(mu, logvar):
        return right(mu, logvar)

instance = KL(factor=2.0)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "losses.py"
    path.write_text(LOSSES)
    return path


@pytest.fixture(autouse=True)
def _leaves_no_trace():
    before = list(sys.path)
    yield
    assert sys.path == before
    assert "__audited__" not in sys.modules


def failure(capsys, *argv):
    assert main(["audit", *map(str, argv)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


@pytest.mark.parametrize(
    ("name", "status", "verdict"),
    [
        ("right", 0, "right(mu, logvar): RIGHT."),
        ("wrong", 1, "wrong(mu, logvar): WRONG VALUE."),
        ("not_finite", 1, "not_finite(mu, logvar): WRONG VALUE."),
        ("blows_up", 1, "blows_up(mu, logvar): WRONG VALUE."),
        ("KL", 0, "KL(mu, logvar): RIGHT."),
        ("KL.half", 1, "half(mu, logvar): WRONG VALUE."),
        ("KL.static", 0, "static(mu, logvar): RIGHT."),
        ("KL.part", 0, "right(mu, logvar): RIGHT."),
        ("Needs.static", 0, "static(mu, logvar): RIGHT."),
        ("instance", 1, "KL(mu, logvar): WRONG VALUE."),
        ("instance.half", 0, "half(mu, logvar): RIGHT."),
    ],
)
def test_the_status_is_the_verdict(capsys, file, name, status, verdict):
    assert main(["audit", f"{file}:{name}"]) == status
    printed = capsys.readouterr()
    assert printed.out.startswith(verdict)
    assert printed.err == f"imports and runs {file}\nprinted by the import\n"


def test_the_text_is_the_report(capsys, file):
    def wrong(mu, logvar):
        return -0.5 * (1 + logvar - mu**2 - logvar.exp()).mean()

    main(["audit", f"{file}:wrong"])
    assert capsys.readouterr().out == f"{audit(wrong)}\n"


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("{file}:rihgt", "{file} has no 'rihgt'; it has KL, Needs, blows_up, instance, leaves, "),
        ("{file}:KL.thrid", "{file} has no 'KL.thrid'"),
        ("{file}:math_nan", "'math_nan' of {file} is no function: it is of the type float"),
        ("{file}:Needs", "constructing Needs() without arguments raises TypeError: "),
        ("{file}:nothing", "nothing(mu, logvar): NOT JUDGED. It returns None: is a `return` missing?"),
        ("{file}:raises", "raises(mu, logvar): NOT JUDGED. It raises RuntimeError: as planned."),
        (
            "{file}:too_many",
            "too_many(a, b, c, d): NOT JUDGED. Could not run: the parameters (a, b, c, d) determine no signature",
        ),
        ("{file}:leaves", "leaves(mu, logvar): NOT JUDGED. It raises SystemExit: 0."),
        ("{file}", "expected path/to/file.py:function or package.module:function, got '{file}'"),
        ("{file}:", "expected path/to/file.py:function"),
        ("nowhere.py:f", "there is no file nowhere.py"),
        ("nowhere/losses:f", "there is no file nowhere/losses"),
        ("no.such.module:f", "importing no.such.module raises ModuleNotFoundError: No module named 'no'"),
        ("math:pi", "'pi' of math is no function"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--no-gradient"]])
def test_what_cannot_be_judged_is_status_2_with_its_reason(capsys, file, target, reason, options):
    said = failure(capsys, target.format(file=file), *options)
    assert f"error: {reason.format(file=file)}" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_package", "raises ModuleNotFoundError: No module named 'no_such_package'"),
        ("raise ValueError('at the top')", "raises ValueError: at the top"),
        ("import sys; sys.exit(0)", "raises SystemExit: 0"),
        ("def f(:", "raises SyntaxError: "),
    ],
)
def test_a_file_that_cannot_be_imported_is_status_2_with_its_message(capsys, tmp_path, code, reason):
    (tmp_path / "broken.py").write_text(code)
    assert f"error: importing {tmp_path}/broken.py {reason}" in failure(capsys, f"{tmp_path}/broken.py:f")


def test_a_file_imports_its_neighbours_and_may_be_called_like_a_module(capsys, tmp_path):
    (tmp_path / "neighbour_of_json.py").write_text("FACTOR = 1.0")
    (tmp_path / "json.py").write_text(
        "from dataclasses import dataclass\n"
        "from neighbour_of_json import FACTOR\n"
        "@dataclass\n"
        "class KL:\n"
        "    factor: float = FACTOR\n"
        "    def __call__(self, mu, logvar):\n"
        "        return -0.5 * self.factor * (1 + logvar - mu**2 - logvar.exp()).sum()\n"
    )
    assert main(["audit", f"{tmp_path}/json.py:KL"]) == 0
    assert sys.modules["json"] is json
    del sys.modules["neighbour_of_json"]


def test_a_module_is_found_from_the_working_directory(capsys, tmp_path, monkeypatch, file):
    (tmp_path / "package_of_losses").mkdir()
    file.rename(tmp_path / "package_of_losses" / "inner.py")
    monkeypatch.chdir(tmp_path)
    assert main(["audit", "package_of_losses.inner:wrong"]) == 1
    assert "imports and runs package_of_losses.inner" in capsys.readouterr().err


def test_the_options_reach_the_audit(capsys, monkeypatch, file):
    asked = {}

    def remember(fn, *, budget=7, **options):
        asked.update(options, budget=budget)
        return AuditReport(fn.__name__, "mean_std", "right")

    monkeypatch.setattr(command, "audit", remember)
    assert main(["audit", f"{file}:right"]) == 0
    assert asked == {"signature": "auto", "seed": 0, "budget": 7, "gradient": True, "num_dims": None}
    options = ["--signature", "mean_std", "--seed", "3", "--budget", "640", "--no-gradient", "--num-dims", "3"]
    assert main(["audit", f"{file}:right", *options]) == 0
    assert asked == {"signature": "mean_std", "seed": 3, "budget": 640, "gradient": False, "num_dims": 3}


def test_a_fault_of_the_audit_does_not_pass_for_a_verdict(capsys, monkeypatch, file):
    def faulty(fn, *, budget=7, **options):
        raise AssertionError("a fault")

    monkeypatch.setattr(command, "audit", faulty)
    assert "AssertionError: a fault" in failure(capsys, f"{file}:right")


@pytest.mark.parametrize(
    "options", [["--signature", "mean_sdt"], ["--budget", "0"], ["--seed", "-1"], ["--num-dims", "0"]]
)
def test_options_that_do_not_parse_exit_with_status_2(capsys, file, options):
    with pytest.raises(SystemExit) as caught:
        main(["audit", f"{file}:right", *options])
    assert caught.value.code == 2
    assert options[0] in capsys.readouterr().err


@pytest.mark.parametrize("name", ["right", "wrong", "not_finite"])
def test_json_is_the_whole_report_and_strict(capsys, file, name):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    status = main(["audit", f"{file}:{name}", "--json"])
    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found["ok"] is (status == 0)
    assert found["name"] == f"{name}(mu, logvar)"
    assert len(found["points"]) == found["num_probes"] > 10
    if name == "not_finite":
        assert {point["got"] for point in found["points"]} == {"nan"}
    else:
        for point in found["points"]:  # the wrong one is a mean over the latent dimensions
            assert point["got"] * math.prod(point["shape"][1:]) ** status == pytest.approx(point["kl"], rel=1e-9)


def test_json_of_what_is_not_judged_has_its_reason(capsys, file):
    assert main(["audit", f"{file}:nothing", "--json"]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)["reason"].startswith("it returns None")
    assert "error: nothing(mu, logvar): NOT JUDGED" in printed.err


def test_the_figure_is_written(capsys, file, tmp_path):
    assert main(["audit", f"{file}:wrong", "--figure", f"{tmp_path}/points.png"]) == 1
    assert (tmp_path / "points.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_figure_that_cannot_be_written_is_status_2_after_the_report(capsys, file, tmp_path):
    for path, reason in (("none/points.png", "cannot write"), ("points.nonsense", "cannot draw")):
        assert main(["audit", f"{file}:wrong", "--figure", f"{tmp_path}/{path}"]) == 2
        printed = capsys.readouterr()
        assert printed.out.startswith("wrong(mu, logvar): WRONG VALUE")
        assert f"error: {reason} {tmp_path}/{path}: " in printed.err


@pytest.mark.parametrize(("loss", "status"), [("right", 0), ("wrong", 1)])
def test_without_matplotlib_the_status_is_the_verdict_s(capsys, file, tmp_path, monkeypatch, loss, status):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["audit", f"{file}:{loss}", "--figure", f"{tmp_path}/points.png"]) == status
    assert 'pip install "torch_klloss[plot]"' in capsys.readouterr().err


def test_a_verdict_without_points_has_no_figure(capsys, file, tmp_path):
    assert main(["audit", f"{file}:blows_up", "--figure", f"{tmp_path}/points.png"]) == 1
    assert "no figure: no value could be compared with the KL" in capsys.readouterr().err
    assert not (tmp_path / "points.png").exists()


def test_the_help_says_that_the_file_is_run(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["audit", "--help"])
    assert caught.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Imports and runs its file" in said
    assert "audit only files that you trust" in said
    assert "Exit status: 0 the loss is right, 1 it is wrong, 2 it could not be run or judged" in said


def test_it_takes_a_loss_or_a_page_to_write(capsys, file, tmp_path):
    assert "audit takes a loss, FILE.py:FUNCTION, or --write-docs FILE" in failure(capsys)
    assert "not both" in failure(capsys, f"{file}:right", "--write-docs", tmp_path / "page.md")


def test_it_writes_the_page(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(mistakes_page, "markdown", lambda: "# A page\n")
    assert main(["audit", "--write-docs", f"{tmp_path}/page.md"]) == 0
    assert (tmp_path / "page.md").read_text() == "# A page\n"
    assert "cannot write" in failure(capsys, "--write-docs", tmp_path / "none" / "page.md")


@pytest.mark.parametrize(("name", "status"), [("weighted_twice", 1), ("plain_mean", 0)])
@pytest.mark.long
def test_the_example_says_in_a_shell_what_the_readme_shows(name, status):
    target = f"examples/audit_my_kl.py:{name}"
    command = [sys.executable, "-m", "torch_klloss", "audit", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert done.stdout.startswith(f"{name}(q, p): {'WRONG VALUE' if status else 'RIGHT'}. ")
    shown = f'$ python -m torch_klloss audit {target}; echo "exit status $?"\n'
    shown += f"{said(done.stderr)}{done.stdout}exit status {done.returncode}\n"
    assert shown in (ROOT / "README.md").read_text()
