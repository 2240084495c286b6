"""What a callback shows a person: its settings, its history as a table and a figure, and the progress bar."""

import copy
import pickle

import pytest

from tests.callbacks.training import LIGHTNING_SAYS, fit, make_module
from torch_klloss import AutoKL
from torch_klloss.callbacks import EstimatorGap, KLAnnealing, KLRoute, PosteriorCollapse
from torch_klloss.callbacks.history import History
from torch_klloss.schedules import Linear

pytestmark = LIGHTNING_SAYS


@pytest.mark.parametrize(
    "text",
    [
        "EstimatorGap()",
        "EstimatorGap(every_n_steps=100, num_samples=8, side_by_side=('exact',), figure=False, prog_bar=True)",
        "KLAnnealing(schedule=Linear(start=0.0, stop=1.0, steps=5, delay=0), interval='epoch')",
        "PosteriorCollapse(stage='validation', patience=5)",
        "KLRoute(prefix='route')",
    ],
)
def test_a_callback_prints_as_it_is_built(text):
    names = {cls.__name__: cls for cls in (EstimatorGap, KLAnnealing, KLRoute, PosteriorCollapse, Linear)}
    assert repr(eval(text, names)) == text


@pytest.mark.parametrize(("callback", "name"), [(EstimatorGap(2), "gap_mean"), (PosteriorCollapse(2), "kl")], ids=repr)
def test_the_history_is_a_table_and_a_figure(callback, name):
    fit(make_module(), [callback], steps=4)
    table = callback.history.to_dict()
    assert table["path"] == ["kl", "kl"]
    assert table["step"] == [0, 2]
    assert {len(column) for column in table.values()} == {2}
    assert table["kl" if "kl" in table else "value"] == [
        row.get("kl", row.get("value")) for row in callback.history["kl"]
    ]
    assert callback.history.figure().axes
    assert callback.history.figure("kl").axes


def test_a_history_survives_copies():
    callback = EstimatorGap(every_n_steps=2)
    fit(make_module(), [callback], steps=2)
    for copied in (pickle.loads(pickle.dumps(callback.history)), copy.deepcopy(callback.history)):
        assert copied == callback.history
        assert copied.figure().axes


def test_rows_of_several_losses_share_a_table():
    history = History(lambda path, rows: path, {"a": [{"step": 0, "exact": 1.0}], "b": [{"step": 0}]})
    table = history.to_dict()
    assert (table["path"], table["step"], table["exact"][0]) == (["a", "b"], [0, 0], 1.0)
    assert table["exact"][1] != table["exact"][1]  # NaN
    assert history.figure("b") == "b"
    with pytest.raises(ValueError, match=r"figure\(path\) draws one loss, and logged were: 'a', 'b'"):
        history.figure()
    with pytest.raises(ValueError, match=r"one of those that were logged, 'a', 'b'; got 'c'"):
        history.figure("c")
    with pytest.raises(ValueError, match="logged were: nothing yet"):
        History(lambda path, rows: path).figure()


@pytest.mark.parametrize("prog_bar", [False, True])
def test_the_gap_is_in_the_progress_bar_if_that_is_asked_for(prog_bar):
    callback = EstimatorGap(every_n_steps=2, prog_bar=prog_bar)
    trainer = fit(make_module(loss=AutoKL()), [callback], steps=4)
    shown = {name: value for name, value in trainer.progress_bar_metrics.items() if name.startswith("kl/")}
    last = callback.history["kl"][-1]
    expected = {"kl/kl/value": last["value"], "kl/kl/gap_mean": last["gap_mean"]} if prog_bar else {}
    assert shown == pytest.approx(expected)
