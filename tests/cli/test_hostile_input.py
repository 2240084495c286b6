"""Expressions and paths that nobody means: an error line and status 2, and never a traceback or an endless draw."""

import pytest

from torch_klloss.cli.entry_point import main

REFUSED = [
    "Independent(Normal([0], [1]), -1)",
    "Independent(Normal([0], [1]), 1.5)",
    "Independent(Independent(Normal([0], [1]), 1), -1)",
    "TransformedDistribution(Normal(0, 1), [AffineTransform(0, 0)])",
    "TransformedDistribution(Normal(0, 1), [PowerTransform(0)])",
    "Normal(0, -1, False)",
    "Categorical([0, 0], None, False)",
    "TransformedDistribution(Normal(0, 1), [CatTransform([ExpTransform()])])",
    "TransformedDistribution(Normal(0, 1), [StackTransform([ExpTransform()])])",
    "\0",
    "Normal(0, 1)\0",
]


@pytest.mark.parametrize("q", REFUSED)
def test_an_expression_that_makes_no_distribution_is_one_line_and_status_2(q, capsys):
    p = "Categorical([1, 1])" if q.startswith("Cat") else "Normal(0, 1)"
    assert main(["compare", "--num-samples", "8", q, p]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("q", ["VonMises(0, 1e30)", "VonMises([0, 1], [1e20, 1])", "Geometric(1e-30)"])
def test_a_draw_that_would_never_end_is_refused_and_the_other_methods_answer(q, capsys):
    assert main(["compare", "--num-samples", "8", q, "Poisson(3)" if "Geo" in q else "VonMises(0, 1)"]) == 0
    assert "closed_form" in capsys.readouterr().out


def test_a_poisson_against_a_binomial_of_many_trials_is_infinite_by_every_method(capsys):
    assert main(["compare", "--json", "--num-samples", "8", "Poisson(3)", "Binomial(1000000000000, 0.5)"]) == 0
    out = capsys.readouterr().out
    assert out.count('"value": "inf"') >= 2
    assert "e+11" not in out
    assert "69314" not in out


@pytest.mark.parametrize("target", ["\0.py:f", "a\0b:f", ".py:f", "/:f", "x" * 5000 + ".py:f", ":"])
def test_a_target_that_is_no_file_is_one_line_and_status_2(target, capsys):
    assert main(["audit", target]) == 2
    assert "error: " in capsys.readouterr().err
