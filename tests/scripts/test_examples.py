"""The examples, run short on their real data."""

import copy
import csv
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch.distributions import Bernoulli

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import bayesian_regression
import circular_latent
import ddp_digits
import discrete_latent
import distil_lm
import distillation
import reference_kl
import vae_cli
import vae_collapse
import vae_digits

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # the example's own filter does not reach here
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # resumed on purpose
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),  # Lightning's own affair
    pytest.mark.filterwarnings("ignore:.*the posterior collapses"),  # in one of the examples, on purpose
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]


def run(out, *options):
    vae_digits.main(["--epochs", "1", "--out", str(out), *options])
    with (out / "metrics.csv").open() as lines:
        return list(csv.DictReader(lines))


@pytest.mark.parametrize(
    ("options", "route"),
    [
        (("--prior", "normal"), "closed_form"),
        (("--prior", "laplace", "--likelihood", "gaussian"), "closed_form"),
        (("--prior", "student-t"), "monte_carlo"),
        (("--prior", "mixture", "--num-samples", "3"), "monte_carlo"),
        (("--kl", "monte-carlo"), "monte_carlo"),
        (("--kl", "analytic"), "closed_form"),
    ],
)
def test_every_prior_trains_and_logs_its_gap(tmp_path, capsys, options, route):
    rows = run(tmp_path, *options)
    gaps = [float(row["kl/loss.kl/gap_z"]) for row in rows if row["kl/loss.kl/gap_z"]]
    assert len(gaps) == 2  # steps 0 and 10 of 12
    assert all(abs(z) < 6 for z in gaps)
    assert f"the KL takes the route {route!r}" in capsys.readouterr().out
    for figure in ("images.png", "kl_gap.png"):
        assert (tmp_path / figure).read_bytes()[:4] == b"\x89PNG"
    assert list((tmp_path / "tensorboard").rglob("events.*"))


def test_training_improves_the_bound(tmp_path):
    vae_digits.main(["--epochs", "6", "--out", str(tmp_path)])
    rows = vae_digits.read_metrics(tmp_path / "csv")
    bounds = [row["val/elbo"] for row in rows if "val/elbo" in row]
    assert bounds[-1] > bounds[0] + 1


def test_resume_goes_on_where_it_stopped(tmp_path):
    run(tmp_path)
    rows = run(tmp_path, "--resume", "--epochs", "2")
    assert [int(float(row["epoch"])) for row in rows if row["val/elbo"]] == [0, 1]


def test_resume_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(SystemExit, match=r"last\.ckpt, which does not exist"):
        run(tmp_path, "--resume")


def test_a_prior_without_a_closed_form_refuses_the_analytic_loss(tmp_path):
    with pytest.raises(SystemExit, match="--kl auto"):
        run(tmp_path, "--prior", "student-t", "--kl", "analytic")


def test_the_seed_decides_the_run(tmp_path):
    first, again, other = (
        [row["val/kl"] for row in run(tmp_path / str(i), "--seed", seed)] for i, seed in enumerate("001")
    )
    assert first == again != other


def test_annealing_and_free_nats_keep_the_units_that_a_plain_vae_loses(tmp_path, capsys):
    vae_collapse.main(["--epochs", "6", "--out", str(tmp_path)])
    active = re.findall(r"(\d) of 8", capsys.readouterr().out)
    assert int(active[0]) <= 2
    assert active[1] == "8"
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_the_command_line_trains_from_yaml(tmp_path, monkeypatch):
    config = Path(vae_cli.__file__).with_suffix(".yaml").resolve()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["vae_cli.py"])
    short = ["--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"]
    with pytest.warns(UserWarning, match="The warm-up of .* takes 240 steps, but the Trainer plans 12"):
        cli = vae_cli.main(["fit", "--config", str(config), *short])
    assert cli.model.loss.beta == pytest.approx(4 * 11 / 240)
    folder = tmp_path / "runs" / "vae_cli"
    header = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"kl/beta", "kl/loss.kl/gap_z", "kl/loss.kl/exact", "collapse/loss.kl/active_units"} <= set(header)
    assert len(list(folder.glob("*.png"))) == 2


def test_the_student_learns_from_its_teacher_alone():
    results = distillation.main(["--epochs", "8"])
    assert results["student"] > results["twin"]
    assert results["teacher"] > 0.9


@pytest.mark.exhaustive  # tests/scripts/test_scripts.py runs it in its short form
def test_a_student_comes_nearer_to_its_teacher_from_all_its_logits_than_from_the_likeliest_bytes(tmp_path):
    found = distil_lm.main(["--steps", "60", "--out", str(tmp_path)])
    assert found["full"] < found["top 6"]
    assert found["6 draws"] < found["top 6"]


@pytest.mark.exhaustive  # tests/scripts/test_scripts.py runs it in its short form
def test_the_estimators_of_the_policys_kl_are_unbiased_but_for_k3_backpropagated(tmp_path):
    found = reference_kl.main(["--steps", "80", "--batches", "60", "--out", str(tmp_path)])
    for name, numbers in found.items():
        is_off = numbers["gradient bias"] > 2 * numbers["chance"]  # a root mean square over 256 numbers
        assert is_off == (name == "k3 backpropagated"), name


def test_the_bound_of_the_regression_lacks_the_kl_to_the_exact_posterior():
    results = bayesian_regression.main(["--epochs", "20"])
    missing = results["evidence"] - results["bound"]
    # the bound is sampled; the evidence sums 442 float32 terms, each of which rounds once or twice
    rounding = 2 * 442 * torch.finfo(torch.float32).eps * abs(results["evidence"])
    tolerance = 6 * results["bound_std_error"] + rounding
    assert missing == pytest.approx(results["distance"], abs=tolerance)
    assert results["distance"] > tolerance  # a bound that forgets the KL, or takes it twice, is further off than that
    assert results["distance"] > 0


@pytest.mark.parametrize("example", [circular_latent, discrete_latent])
def test_a_latent_without_reparametrisation_tells_more_than_none(tmp_path, example):
    results = example.main(["--epochs", "25", "--out", str(tmp_path)])
    pixels = (torch.as_tensor(load_digits().data) > 8).double().mean(0).clamp(1e-9, 1 - 1e-9)
    without_latent = Bernoulli(pixels).entropy().sum().item()
    assert results["reconstruction"] + results["kl"] < without_latent - 1
    assert len(list(tmp_path.glob("*.png"))) == 1


@pytest.mark.scripts
def test_one_process_and_two_log_the_same_and_a_difference_is_seen(tmp_path):
    command = [sys.executable, ddp_digits.__file__, "--epochs", "1", "--out", str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "one process and two are the same" in process.stdout
    alone, both = (ddp_digits.read_log(tmp_path / "csv" / f"processes_{n}" / "metrics.csv") for n in (1, 2))
    assert ddp_digits.report(ddp_digits.compare(alone, both), len(both))
    last = max(both)
    for name, wrong in {
        "kl/beta": both[last]["kl/beta"] * (1 + 1e-15),
        "kl/loss.kl/value": both[last]["kl/loss.kl/value"] + 1e-6,
        "collapse/loss.kl/kl/7": math.nan,
        ddp_digits.GAP: both[last][ddp_digits.GAP] + 10 * both[last][ddp_digits.GAP_ERROR],
    }.items():
        other = copy.deepcopy(both)
        other[last][name] = wrong
        assert not ddp_digits.report(ddp_digits.compare(alone, other), len(both)), name
    with pytest.raises(SystemExit, match="have not logged the same names"):
        ddp_digits.compare(alone, {step: row for step, row in both.items() if step != last})
