"""The figure of an audit: what it shows, read back from the axes."""

import io
import math
import sys

import numpy as np
import pytest

from torch_klloss.auditing import AuditReport, Finding
from torch_klloss.auditing.figure import ProbePoint, audit_figure

KL = [2.0, 1.0, 4.0]


def report(got, fitted=None, error=0.0, verdict="wrong value", ids=("named",)):
    rows = zip(KL, got, fitted or [None] * len(KL), strict=True)
    points = tuple(ProbePoint((4, 3), kl, value, found, error) for kl, value, found in rows)
    findings = tuple(Finding(name, "", "", "") for name in ids)
    return AuditReport("my_kl(q, p)", "distributions", verdict, findings, points=points)


def drawn(figure):
    """Return x and y of every labelled line, and check that the figure can be saved."""
    figure.savefig(io.BytesIO(), format="png")
    lines = {line.get_label(): line.get_xydata() for line in figure.axes[0].get_lines()}
    for container in figure.axes[0].containers:
        lines[container.get_label()] = container[0].get_xydata()
    return {label: xy for label, xy in lines.items() if not label.startswith("_")}


def test_a_right_loss_is_points_on_the_line():
    figure = report(KL, KL, verdict="right", ids=()).figure()
    lines = drawn(figure)
    assert lines.keys() == {"the KL: y = x", "returned by the loss"}
    assert lines["returned by the loss"].tolist() == [[1, 1], [2, 2], [4, 4]]
    assert (lines["the KL: y = x"][:, 0] == lines["the KL: y = x"][:, 1]).all()
    assert figure.get_suptitle() == "my_kl(q, p): right"
    assert {text.get_text() for text in figure.legends[0].get_texts()} == lines.keys()


def test_a_constant_factor_is_a_straight_line():
    halves = [kl / 2 for kl in KL]
    line = drawn(report(halves, halves).figure())["named: 0.5 times the KL"]
    assert line[:, 1] == pytest.approx(line[:, 0] / 2)
    assert (line[0, 0], line[-1, 0]) == pytest.approx((1, 4))


def test_anything_else_is_a_marker_a_probe():
    lines = drawn(report([3.0, 1.0, 2.0], [3.0, 1.0, 2.0], ids=("one", "other")).figure())
    assert lines["one, other"].tolist() == [[1, 1], [2, 3], [4, 2]]


def test_nothing_is_drawn_where_nothing_was_found():
    assert drawn(report([3.0, 1.0, 2.0]).figure()).keys() == {"the KL: y = x", "returned by the loss"}


def test_means_have_their_interval():
    figure = report(KL, KL, error=0.1).figure()
    assert "returned by the loss, 95 % interval" in drawn(figure)
    (bars,) = figure.axes[0].containers[0][2]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [
        pytest.approx([kl - 0.196, kl + 0.196]) for kl in sorted(KL)
    ]


def test_what_is_not_finite_is_counted():
    lines = drawn(report([math.nan, 1.0, math.inf], [math.nan, 1.0, 2.0]).figure())
    points = lines["returned by the loss (2 of 3 values are not finite)"]
    assert points[0].tolist() == [1, 1]
    assert np.isnan(points[1:, 1]).all()
    drawn(report([math.nan] * 3, [math.nan] * 3).figure())


@pytest.mark.parametrize(
    ("got", "scales"),
    [
        ([2.0, 1.0, 4.0], ("linear", "linear")),
        ([2.0, 1.0, 400.0], ("log", "log")),
        ([-2.0, -1.0, -4.0], ("linear", "linear")),
        ([0.0, 0.0, 0.0], ("linear", "linear")),
        ([-2.0, 1e-6, 4.0], ("log", "symlog")),
    ],
)
def test_the_axes_are_logarithmic_where_the_values_span_decades(got, scales):
    figure = report(got, got).figure()
    drawn(figure)
    assert (figure.axes[0].get_xscale(), figure.axes[0].get_yscale()) == scales


def test_a_long_name_is_shortened():
    long = report(KL)
    object.__setattr__(long, "name", "my_kl(" + ", ".join(f"argument_{n}" for n in range(20)) + ")")
    assert len(long.figure().get_suptitle()) < 90


def test_without_points_or_matplotlib_it_says_so(monkeypatch):
    with pytest.raises(ValueError, match="needs at least one point"):
        audit_figure([], title="f()")
    with pytest.raises(ValueError, match="there is nothing to draw"):
        AuditReport("f()", "auto", "not judged").figure()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "torch_klloss\[plot\]"'):
        report(KL).figure()
