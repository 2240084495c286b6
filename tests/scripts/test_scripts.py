"""Every benchmark, example and command in its short form, as a shell runs it: one item each.

A benchmark has a process of its own, in which nothing else is timed or allocated. An example and a command run as
`__main__` in the process of the tests, which has imported Lightning already; `make demo` starts three of them afresh.
"""

import csv
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, script

EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))  # as for a script that is run by its path

pytestmark = [
    pytest.mark.scripts,
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # the example's own filter does not reach here
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # resumed on purpose
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),  # Lightning's own affair
    pytest.mark.filterwarnings("ignore:The warm-up of .* takes 240 steps"),  # of a training that is cut short
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]

# The longest come first, so that no worker is left alone with one of them.
LONGEST = ("audit", "gradient_variance", "callbacks", "estimator_variance", "closed_forms")
BENCHMARKS = sorted(
    (path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "common"),
    key=lambda name: LONGEST.index(name) if name in LONGEST else len(LONGEST),
)
PRIORS = ("laplace", "student-t", "mixture")


@pytest.fixture
def main(monkeypatch):
    """Run an example, or `python -m torch_klloss`, and return its exit status."""

    def run(name, *arguments):
        script = EXAMPLES / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        try:
            if name == "torch_klloss":
                monkeypatch.delitem(sys.modules, "torch_klloss.__main__", raising=False)
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(script), run_name="__main__")
        except SystemExit as left:
            return left.code or 0
        return 0

    return run


def is_figure(path: Path) -> bool:
    return path.read_bytes()[:4] == b"\x89PNG"


def test_make_demo_says_where_its_figures_are(tmp_path):
    environment = Path(sys.prefix)
    command = [
        "make",
        "--no-print-directory",
        "demo",
        f"OUT={tmp_path}",
        "EPOCHS=2",
        f"VENV={environment}",
        "--assume-old",
        environment / ".demo",
    ]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    last = process.stdout.splitlines()[-1]
    assert last.startswith("figures: ")
    figures = [Path(figure) for figure in last.removeprefix("figures: ").split()]
    assert len(figures) == 6
    assert all(map(is_figure, figures))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_confirms_its_numbers(name):
    assert script(f"benchmarks/{name}.py", "--quick")


@pytest.mark.parametrize("prior", [*(pytest.param(p, marks=pytest.mark.exhaustive) for p in PRIORS[:-1]), PRIORS[-1]])
def test_the_digits_vae_trains_with_a_prior_and_goes_on(main, capsys, tmp_path, prior):
    assert main("vae_digits", "--epochs", 2, "--prior", prior, "--out", tmp_path) == 0
    if prior == PRIORS[-1]:
        assert main("vae_digits", "--epochs", 3, "--prior", prior, "--resume", "--out", tmp_path) == 0
    assert f"metrics: {tmp_path / 'metrics.csv'}" in capsys.readouterr().out
    assert is_figure(tmp_path / "images.png")
    assert is_figure(tmp_path / "kl_gap.png")


def test_the_vae_of_getting_started_logs_its_gap(monkeypatch, tmp_path):
    (code,) = re.findall(
        r'```python title="my_vae.py"\n(.*?)```', (ROOT / "docs/getting-started.md").read_text(), re.DOTALL
    )
    (tmp_path / "my_vae.py").write_text(code.replace("max_epochs=20", "max_epochs=2, enable_progress_bar=False"))
    monkeypatch.chdir(tmp_path)
    runpy.run_path("my_vae.py", run_name="__main__")
    with (tmp_path / "runs" / "my_vae" / "metrics.csv").open() as lines:
        gaps = [float(row["kl/loss.kl/gap_z"]) for row in csv.DictReader(lines) if row["kl/loss.kl/gap_z"]]
    assert gaps
    assert all(abs(z) < 6 for z in gaps)
    assert is_figure(tmp_path / "runs" / "my_vae" / "kl_loss.kl_gap.png")


@pytest.mark.parametrize("name", ["circular_latent", "discrete_latent"])
def test_an_example_draws_what_it_learnt(main, tmp_path, name):
    assert main(name, "--epochs", 2, "--out", tmp_path) == 0
    assert [is_figure(path) for path in tmp_path.glob("*.png")] == [True]


@pytest.mark.parametrize(
    ("name", "short"), [("distil_lm", ("--steps", 2)), ("reference_kl", ("--steps", 4, "--batches", 2))]
)
def test_an_example_of_language_models_prints_and_draws(main, capsys, tmp_path, name, short):
    assert main(name, *short, "--out", tmp_path) == 0
    assert "figure: " in capsys.readouterr().out
    assert [is_figure(path) for path in tmp_path.glob("*.png")] == [True]


@pytest.mark.parametrize("name", ["bayesian_regression", "distillation"])
def test_an_example_prints_what_it_learnt(main, capsys, name):
    assert main(name, "--epochs", 2) == 0
    assert capsys.readouterr().out


def test_the_vae_trains_from_yaml(main, tmp_path):
    save_dir = ("--trainer.logger.init_args.save_dir", tmp_path)
    config = ("--config", EXAMPLES / "vae_cli.yaml")
    assert main("vae_cli", "fit", *config, "--trainer.max_epochs", 2, *save_dir) == 0
    assert list(tmp_path.rglob("metrics.csv"))


@pytest.mark.parametrize(
    ("name", "status"),
    [
        pytest.param("plain_mean", 0, marks=pytest.mark.exhaustive),
        pytest.param("weighted_twice", 1, marks=pytest.mark.exhaustive),  # tests/cli/test_audit.py runs both in a shell
        ("missing", 2),
    ],
)
def test_the_audit_of_a_file_leaves_with_its_verdict(main, name, status):
    assert main("torch_klloss", "audit", f"{EXAMPLES / 'audit_my_kl.py'}:{name}") == status


@pytest.mark.parametrize("command", [("compare", "Normal(1, 0.5)", "StudentT(4)"), ("pairs", "--type", "Gumbel")])
def test_a_command_prints_its_table(main, capsys, command):
    assert main("torch_klloss", *command) == 0
    assert "Gumbel" in capsys.readouterr().out or command[0] == "compare"
