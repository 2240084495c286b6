"""The examples, run short on their real data."""

import csv
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import vae_digits

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # the example's own filter does not reach here
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # resumed on purpose
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),  # Lightning's own affair
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
    gaps = [float(row["kl/kl/gap_z"]) for row in rows if row["kl/kl/gap_z"]]
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
