"""The command line: the output of its commands, and one line for each of the user's mistakes."""

import json
import math
import re
import subprocess
import sys
from dataclasses import asdict
from typing import get_args

import pytest
import torch

from tests.processes import said
from torch_klloss import __version__
from torch_klloss.cli import compare, entry_point, pairs
from torch_klloss.cli.compare import compare_methods
from torch_klloss.cli.demo import question_curves
from torch_klloss.cli.entry_point import main
from torch_klloss.cli.pairs import RoutedPair, routes
from torch_klloss.methods.monte_carlo.method import Gradient


@pytest.fixture
def _untimed(monkeypatch):
    monkeypatch.setattr(compare, "_microseconds", lambda loss, q, p, seed: 12.0)


def report_of(capsys, *argv):
    assert main(["compare", *argv, "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(printed.out, parse_constant=refuse)


def error_of(capsys, *argv):
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


# --- compare ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_untimed")
def test_compare_has_a_row_for_every_method_and_gradient(capsys):
    rows = report_of(capsys, "Normal(1, 1)", "Normal(0, 1)")["rows"]
    labels = [(row["method"], row["gradient"]) for row in rows]
    sampled = [("monte_carlo", gradient) for gradient in get_args(Gradient)]
    assert labels == [("closed_form", None), ("enumeration", None), ("quadrature", None), *sampled]


@pytest.mark.usefixtures("_untimed")
def test_compare_measures_the_gap_to_the_closed_form_in_standard_errors(capsys):
    report = report_of(capsys, "Normal(2, 1)", "Normal(0, 1)", "--num-samples", "50")
    closed_form, enumeration, quadrature, *sampled = report["rows"]
    assert abs(quadrature["gap"]) <= 2 * torch.finfo(torch.float32).eps * closed_form["value"]
    assert closed_form["value"] == 2**2 / 2
    assert (closed_form["gap"], closed_form["std_error"], closed_form["z"]) == (0, None, None)
    assert enumeration["value"] is None
    assert enumeration["reason"].startswith("Enumeration needs a q with a finite support")
    for row in sampled:
        assert row["gap"] == row["value"] - closed_form["value"] != 0
        assert row["z"] == row["gap"] / row["std_error"]
        assert abs(row["z"]) < 6
        # log q - log p = 2x - 2 has the standard deviation 2; its estimate from 50 draws is known to 1/√98.
        assert abs(row["std_error"] / (2 / 50**0.5) - 1) < 6 / 98**0.5
        assert row["microseconds"] == 12


@pytest.mark.usefixtures("_untimed")
def test_compare_says_why_a_row_does_not_apply(capsys):
    report = report_of(capsys, "Categorical([0.5, 0.5])", "Categorical([0.25, 0.75])")
    rows = {row["gradient"] or row["method"]: row for row in report["rows"]}
    kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    for method in ("closed_form", "enumeration"):
        # Two terms of size ½ log 2, each with the rounding of two logarithms.
        assert abs(rows[method]["value"] - kl) <= 4 * torch.finfo(torch.float32).eps
    for gradient in ("pathwise", "sticking_the_landing"):
        assert "needs q.rsample, which Categorical lacks" in rows[gradient]["reason"]
        assert rows[gradient]["value"] is rows[gradient]["microseconds"] is None
    assert abs(rows["score_function"]["z"]) < 6


@pytest.mark.usefixtures("_untimed")
def test_compare_measures_the_gap_to_the_quadrature_where_nothing_is_exact(capsys):
    report = report_of(capsys, "Normal(0, 1)", "StudentT(4)")
    assert report["auto_route"] == "monte_carlo"
    rows = {row["gradient"] or row["method"]: row for row in report["rows"]}
    assert rows["quadrature"]["gap"] == 0
    assert abs(rows["pathwise"]["z"]) < 6


@pytest.mark.usefixtures("_untimed")
def test_compare_without_a_deterministic_method_has_no_gap(capsys):
    report = report_of(capsys, "Dirichlet([2, 3, 4])", "RelaxedOneHotCategorical(0.7, [0.2, 0.3, 0.5])")
    assert {row["gap"] for row in report["rows"]} == {None}
    assert {row["z"] for row in report["rows"]} == {None}


@pytest.mark.usefixtures("_untimed")
def test_compare_takes_the_mean_over_batch_elements(capsys):
    report = report_of(capsys, "Normal([[0, 2, 0], [2, 2, 0]], 1)", "Normal([0, 0, 0], 1)")
    assert report["batch_shape"] == [2, 3]
    assert report["reduction"] == "mean over batch elements"
    assert report["rows"][0]["value"] == 3 * 2 / 6
    assert all(abs(row["z"]) < 6 for row in report["rows"][3:])
    report = report_of(capsys, "Independent(Normal([0, 2, 2], 1), 1)", "Independent(Normal([0, 0, 0], 1), 1)")
    assert report["batch_shape"] == []
    assert report["rows"][0]["value"] == 2 + 2


@pytest.mark.usefixtures("_untimed")
def test_compare_writes_what_is_not_finite_as_words(capsys):
    rows = report_of(capsys, "Uniform(1, 2)", "Uniform(0, 1)", "--num-samples", "1")["rows"]
    assert rows[0]["value"] == "inf"
    assert rows[0]["gap"] == 0
    assert rows[3]["std_error"] == "nan"


@pytest.mark.usefixtures("_untimed")
def test_compare_of_a_distribution_with_itself_is_zero_without_noise(capsys):
    for row in report_of(capsys, "Laplace(3, 2)", "Laplace(3, 2)")["rows"]:
        if row["reason"] is None:
            assert row["value"] == row["gap"] == 0
            assert row["z"] in (0, None)


@pytest.mark.usefixtures("_untimed")
def test_the_seed_decides_the_samples(capsys):
    first, again, other = (
        report_of(capsys, "Normal(1, 1)", "Normal(0, 1)", "--seed", seed)["rows"][3]["value"] for seed in "778"
    )
    assert first == again != other


@pytest.mark.usefixtures("_untimed")
def test_the_table_and_the_json_agree(capsys):
    assert main(["compare", "Normal([pi, 1], 0.5)", "Normal(0, 1)", "--num-samples", "64", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert max(map(len, printed.splitlines())) < 120
    assert "mean over the batch shape (2,)" in printed
    assert "q = Normal([pi, 1], 0.5)" in printed  # brackets are no markup
    assert "64 samples from seed 3" in printed
    assert "Enumeration needs a q with a finite support of at most 4096 points" in printed
    for row in report_of(capsys, "Normal([pi, 1], 0.5)", "Normal(0, 1)", "--num-samples", "64", "--seed", "3")["rows"]:
        words = [row["method"], row["gradient"] or ""]
        numbers = "-" if row["value"] is None else f"{row['value']:#.6g}"
        assert re.search(rf"^ *{' +'.join(words)} +{re.escape(numbers)} ", printed, re.MULTILINE)


def test_compare_times_its_calls_and_does_not_touch_the_global_stream():
    state = torch.get_rng_state()
    q, p = torch.distributions.Normal(torch.ones(3), 1.0), torch.distributions.Normal(0.0, 1.0)
    rows = compare_methods(q, p, num_samples=10)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(row.microseconds > 0 for row in rows if row.reason is None)


def test_the_module_runs_as_a_program_without_rich_and_matplotlib(tmp_path):
    for package in ("rich", "matplotlib"):
        (tmp_path / f"{package}.py").write_text("raise ImportError('blocked')")
    command = [sys.executable, "-m", "torch_klloss", "compare", "Normal(3, 1)", "Normal(0, 1)", "--json"]
    done = subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["rows"][0]["value"] == 4.5
    assert report["rows"][0]["microseconds"] > 0
    assert said(done.stderr) == ""


BAD_PAIRS = [
    ("Norml(0, 1)", "Normal(0, 1)", "error: q: unknown name 'Norml': did you mean Normal?"),
    ("Normal(0, 1)", "Normal(0, -1)", "error: p: Normal(0, -1): parameter scale must satisfy GreaterThan("),
    ("Normal(0, 1", "Normal(0, 1)", "error: q: cannot read"),
    ("Normal([0, 1], 1)", "Normal([0, 1, 2], 1)", "batch shapes that broadcast, got (2,) and (3,)"),
    ("Normal(0, 1)", "Independent(Normal([0, 1], 1), 1)", "share an event shape, got () and (2,)"),
    ("Poisson(1)", "Normal(0, 1)", "q is discrete and p is continuous"),
    ("Normal([], 1)", "Normal(0, 1)", "at least one batch element, got batch shape (0,)"),
]


@pytest.mark.parametrize(("q", "p", "message"), BAD_PAIRS)
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_bad_pair_gives_one_line_and_status_2(capsys, q, p, message, options):
    assert message in error_of(capsys, "compare", q, p, *options)


# --- demo -------------------------------------------------------------------------------------------------------------


def test_the_demo_writes_the_figure_and_prints_the_numbers(capsys, tmp_path):
    out = tmp_path / "a" / "b"
    assert main(["demo", "--out", str(out), "--seed", "5"]) == 0
    printed = capsys.readouterr().out
    png = (out / "question.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(png) > 20_000  # an empty figure of this size has 10 kB
    assert str(out / "question.png") in printed
    curves = question_curves(seed=5)
    assert f"{curves.factor:.3f} ± {curves.factor_std_error:.3f} times the KL" in " ".join(printed.split())
    assert "\x1b" not in printed
    for k in range(0, 41, 4):
        values = (curves.questioner, curves.sampled.value, curves.sampled.std_error, curves.closed_form, curves.grid)
        row = "{:g} {:.3f} {:.3f} ± {:.3f} {:.3f} {:.3f}".format(curves.mu[k], *(v[k] for v in values))
        assert row in re.sub(" +", " ", printed)


def test_the_demo_counts_the_intervals_that_cover(capsys, tmp_path):
    assert main(["demo", "--out", str(tmp_path), "--num-samples", "400"]) == 0
    low, high = (curves := question_curves(num_samples=400)).sampled.interval(0.95)
    covered = int(((low <= curves.closed_form) & (curves.closed_form <= high)).sum())
    assert f"at {covered} of 41 μ" in " ".join(capsys.readouterr().out.split())


def test_a_place_that_cannot_be_written_gives_one_line_and_status_2(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "error: cannot write" in error_of(capsys, "demo", "--out", str(tmp_path / "file"))


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_pairs_prints_the_routes_of_a_type(capsys):
    assert main(["pairs", "--type", "Gumbel"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    rows = re.sub(" +", " ", printed)
    for row in ("\n Gumbel closed form Normal", "\n quadrature Cauchy, StudentT", "\n Normal closed form Gumbel \n"):
        assert row in rows
    assert "Poisson" not in printed  # undefined: counted, not listed
    num_undefined = sum(pair.route == "undefined" for pair in routes(type_name="Gumbel"))
    assert f" {num_undefined} undefined: one is discrete" in printed


def test_pairs_prints_the_whole_table_by_q_and_route(capsys, monkeypatch):
    few = [RoutedPair("Normal", "Normal", "closed form"), RoutedPair("Normal", "Beta", "infinite")]
    few += [RoutedPair("Normal", "Wishart", "infinite"), RoutedPair("Poisson", "Normal", "undefined")]
    monkeypatch.setattr(pairs, "routes", lambda type_name: few)
    assert main(["pairs"]) == 0
    printed = re.sub(" +", " ", capsys.readouterr().out)
    for row in ("\n Normal closed form Normal ", "\n infinite Beta, Wishart ", "\n Poisson undefined Normal "):
        assert row in printed
    assert " 2 infinite: q has mass where p has none" in printed


def test_pairs_as_json_has_every_row(capsys):
    assert main(["pairs", "--type", "Beta", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == [asdict(pair) for pair in routes(type_name="Beta")]
    assert {row["route"] for row in report["rows"]} <= set(report["routes"])


def test_pairs_writes_the_page(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(pairs, "routes", lambda type_name: [RoutedPair("Normal", "Beta", "infinite")])
    assert main(["pairs", "--json", "--write-docs", str(tmp_path / "pairs.md")]) == 0
    assert "### Normal\n\n- infinite: Beta\n" in (tmp_path / "pairs.md").read_text()
    capsys.readouterr()
    assert "error: cannot write" in error_of(capsys, "pairs", "--write-docs", str(tmp_path / "none" / "pairs.md"))


def test_a_page_of_a_part_of_the_table_is_refused(capsys, tmp_path):
    message = error_of(capsys, "pairs", "--type", "Gamma", "--write-docs", str(tmp_path / "pairs.md"))
    assert "--write-docs writes the whole table: leave out --type" in message


def test_an_unknown_type_gives_one_line_and_status_2(capsys):
    assert error_of(capsys, "pairs", "--type", "Gama").endswith("got 'Gama'.")


# --- the program ------------------------------------------------------------------------------------------------------


def test_without_a_command_the_help_is_printed(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert "usage: python -m torch_klloss" in printed
    for command in ("demo", "compare", "pairs", "audit"):
        assert re.search(rf"^ +{command} ", printed, re.MULTILINE)


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"torch_klloss {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["compare", "Normal(0, 1)", "Normal(0, 1)", "--num-samples", "0"], "at least 1, got '0'"),
        (["compare", "Normal(0, 1)", "Normal(0, 1)", "--num-samples", "1.5"], "at least 1, got '1.5'"),
        (["compare", "Normal(0, 1)", "Normal(0, 1)", "--seed", "-1"], "from 0 to 2**63 - 1, got '-1'"),
        (["compare", "Normal(0, 1)"], "required: p"),
        (["demo"], "required: --out"),
        (["demo", "--out", "x", "--num-samples", "1"], "at least 2, got '1'"),
        (["dmeo"], "invalid choice: 'dmeo'"),
    ],
)
def test_options_that_do_not_parse_exit_with_status_2(capsys, argv, message):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["demo", "--out", "x"], ["compare", "Normal(0, 1)", "Normal(0, 1)"], ["pairs"]])
def test_a_missing_package_is_named_with_its_extra(capsys, monkeypatch, argv):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(argv) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert 'pip install "torch_klloss[cli]"' in line


def test_a_command_is_one_entry_in_the_list(capsys, monkeypatch):
    def add(commands):
        commands.add_parser("more").set_defaults(run=lambda args: print("ran"))

    monkeypatch.setattr(entry_point, "COMMANDS", (*entry_point.COMMANDS, add))
    assert main(["more"]) == 0
    assert capsys.readouterr().out == "ran\n"
