"""Figures: their contents, read back from the axes, and their errors."""

import io
import math
import struct
import sys

import pytest
import torch

from tests.processes import run
from torch_klloss.cli.demo import question_curves, question_figure
from torch_klloss.plots import annealing_figure, collapse_figure, gap_figure, reconstruction_figure

STEPS, VALUE, REFERENCE, STD_ERROR = [10, 20, 30], [2.0, 3.0, 4.0], [2.5, 2.75, 4.0], [0.1, 0.2, 0.3]


def png_size(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    png = buffer.getvalue()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


def lines(axes):
    return {line.get_label(): line.get_ydata() for line in axes.get_lines()}


def band(axes):
    """Return the lower and the upper edge of the one band of the axes, in the order of x."""
    (collection,) = axes.collections
    vertices = collection.get_paths()[0].vertices
    xs = sorted(set(vertices[:, 0]))
    edges = [vertices[vertices[:, 0] == x, 1] for x in xs]
    return [min(e) for e in edges], [max(e) for e in edges]


def test_the_question_is_drawn_with_all_four_curves_and_their_gaps():
    curves = question_curves()
    figure = question_figure(curves)
    left, right = figure.axes
    assert left.get_xlabel() == right.get_xlabel() == "μ, the mean of q"
    assert left.get_ylabel() == "KL(q‖p) in nats"
    assert right.get_ylabel() == "gap to the closed form in nats"
    drawn, gaps = lines(left), lines(right)
    expected = {
        "closed form": curves.closed_form,
        "mean of (log q − log p)": curves.sampled.value,
        "mean of q·(log q − log p)": curves.questioner,
        "∫ q (log q − log p) dx, grid": curves.grid,
    }
    for label, curve in expected.items():
        assert drawn[label] == pytest.approx(curve.numpy(), abs=0)
        assert gaps[label] == pytest.approx((curve - curves.closed_form).numpy(), abs=0)
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {*expected, "its 95 % interval", "0.2821 · closed form"}


def test_the_band_of_the_question_is_the_interval_of_the_estimate():
    curves = question_curves()
    left, right = question_figure(curves).axes
    low, high = curves.sampled.interval(0.95)
    assert band(left) == (low.tolist(), high.tolist())
    gap = curves.closed_form
    assert band(right) == ((low - gap).tolist(), (high - gap).tolist())


def test_the_question_names_the_measured_factor():
    curves = question_curves()
    text = question_figure(curves).axes[1].texts[0].get_text()
    assert f"{curves.factor:.3f} ± {curves.factor_std_error:.3f}" in text


def test_the_question_is_twice_as_sharp_as_a_readme_is_wide():
    assert png_size(question_figure(question_curves()))[0] == 1800


@pytest.mark.parametrize("sampled", ["reference", "value"])
def test_the_gap_is_drawn_below_with_its_band_over_zero(sampled):
    figure = gap_figure(STEPS, VALUE, REFERENCE, STD_ERROR, value_label="a", reference_label="b", sampled=sampled)
    top, bottom = figure.axes
    assert lines(top) == {"in training: a": pytest.approx(VALUE), "estimated again: b": pytest.approx(REFERENCE)}
    gap = [v - r for v, r in zip(VALUE, REFERENCE, strict=True)]
    assert lines(bottom)["gap: in training − estimated again"] == pytest.approx(gap)
    centres = REFERENCE if sampled == "reference" else VALUE
    for axes, around in ((top, centres), (bottom, gap)):
        assert band(axes)[0] == pytest.approx([c - 1.96 * s for c, s in zip(around, STD_ERROR, strict=True)])
        assert band(axes)[1] == pytest.approx([c + 1.96 * s for c, s in zip(around, STD_ERROR, strict=True)])
    assert (top.get_ylabel(), bottom.get_ylabel()) == ("KL(q‖p) in nats", "gap in nats")
    assert bottom.get_xlabel() == "training step"
    png_size(figure)


def test_the_gap_without_a_standard_error_is_drawn_without_a_band():
    figure = gap_figure(STEPS, VALUE, REFERENCE, [math.nan] * 3)
    assert not figure.axes[1].collections[0].get_paths()
    png_size(figure)


def test_a_single_step_is_drawn_as_a_point():
    (line, _) = gap_figure([1], [2.0], [2.5], [0.1]).axes[0].get_lines()
    assert line.get_marker() == "o"


def test_the_gap_refuses_series_of_different_lengths():
    with pytest.raises(ValueError, match=r"same length, at least 1, got \[3, 3, 2, 3\]"):
        gap_figure(STEPS, VALUE, REFERENCE[:2], STD_ERROR)
    with pytest.raises(ValueError, match=r"same length, at least 1, got \[0, 0, 0, 0\]"):
        gap_figure([], [], [], [])
    with pytest.raises(ValueError, match="sampled must be 'value' or 'reference', got 'both'"):
        gap_figure(STEPS, VALUE, REFERENCE, STD_ERROR, sampled="both")


def test_the_units_are_a_heat_map_with_the_largest_on_top():
    kl = [[0.3, 0.1, 0.2], [0.5, 0.0, 2.0], [0.5, 0.0, 1.5]]
    figure = collapse_figure([0, 10, 30], kl, [3, 2, 2])
    top, bottom, scale = figure.axes
    (mesh,) = top.collections
    assert mesh.get_array().tolist() == [[0.2, 2.0, 1.5], [0.3, 0.5, 0.5], [0.1, 0.0, 0.0]]
    assert [label.get_text() for label in top.get_yticklabels()] == ["2", "0", "1"]
    assert top.yaxis_inverted()
    assert mesh.get_clim() == (0, 2.0)
    assert mesh.get_coordinates()[0, :, 0].tolist() == [-5, 5, 20, 40]  # every step has its own width
    (line,) = bottom.get_lines()
    assert line.get_ydata().tolist() == [3, 2, 2]
    assert (bottom.get_xlabel(), scale.get_ylabel()) == ("training step", "KL in nats")
    png_size(figure)


def test_a_collapsed_latent_stays_dark():
    (mesh,) = collapse_figure([0, 1], [[0.001], [0.002]]).axes[0].collections
    assert mesh.get_clim() == (0, 0.1)


def test_a_single_step_without_counts_and_many_units_are_drawn():
    top, _ = collapse_figure([7], [[float(j) for j in range(100)]]).axes
    assert len(top.get_yticks()) == 16
    png_size(top.figure)


def test_units_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"same length, at least 1, .* got \[2, 1\] and \[1\] units"):
        collapse_figure([0, 1], [[1.0]])
    with pytest.raises(ValueError, match=r"got \[2, 2\] and \[1, 2\] units"):
        collapse_figure([0, 1], [[1.0], [1.0, 2.0]])
    with pytest.raises(ValueError, match=r"got \[0, 0\]"):
        collapse_figure([], [])


def test_the_weight_is_drawn_above_the_kl_and_the_reconstruction():
    figure = annealing_figure(STEPS, [0.0, 0.5, 1.0], [3.0, 2.0, 1.0], [30.0, 31.0, 32.0])
    top, bottom = figure.axes
    assert [line.get_ydata().tolist() for line in top.get_lines()] == [[0.0, 0.5, 1.0]]
    assert lines(bottom).keys() == {"KL(q‖p)", "reconstruction, −log p(x|z)"}
    assert lines(bottom)["KL(q‖p)"].tolist() == [3.0, 2.0, 1.0]
    assert (bottom.get_xlabel(), bottom.get_ylabel()) == ("training step", "nats per example")
    png_size(annealing_figure([1], [0.0], [1.0], [2.0]))
    with pytest.raises(ValueError, match=r"same length, at least 1, got \[3, 2, 3, 3\]"):
        annealing_figure(STEPS, [0.0, 1.0], [1.0] * 3, [1.0] * 3)


def test_images_stand_side_by_side_in_labelled_rows():
    rows = [torch.full((5, 8, 6), grey, requires_grad=True) for grey in (0.25, 0.5, 0.75)]
    figure = reconstruction_figure(*rows)
    assert [axes.get_ylabel() for axes in figure.axes] == ["originals", "reconstructions", "samples from the prior"]
    for axes, grey in zip(figure.axes, (0.25, 0.5, 0.75), strict=True):
        (image,) = axes.get_images()
        assert image.get_clim() == (0, 1)  # one scale for all rows
        picture = image.get_array()
        assert picture.shape == (8, 5 * 6 + 4)
        assert picture.mask[:, 6::7].all()  # the gaps between the images
        assert picture.count() == 5 * 8 * 6
        assert (picture.compressed() == grey).all()
    png_size(figure)


def test_images_of_another_shape_are_refused():
    images = torch.zeros(5, 8, 8)
    with pytest.raises(ValueError, match=r"samples from the prior must be images .*, got \(5, 64\)"):
        reconstruction_figure(images, images, images.flatten(1))
    with pytest.raises(ValueError, match=r"originals must be images .*, got \(0, 8, 8\)"):
        reconstruction_figure(images[:0], images, images)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "torch_klloss\[plot\]"'):
        question_figure(question_curves())


def test_matplotlib_is_imported_late_and_pyplot_never():
    assert run(
        "import json, sys; from torch_klloss.plots import gap_figure; assert 'matplotlib' not in sys.modules; "
        "gap_figure([1], [1.0], [1.0], [1.0]); assert 'matplotlib' in sys.modules; "
        "print(json.dumps('matplotlib.pyplot' not in sys.modules))"
    )
