"""Schedules: exact at both ends, compared by value, and refused if their settings are wrong."""

import copy
import dataclasses
import itertools
import math
import pickle

import pytest

from torch_klloss.plots import schedule_figure
from torch_klloss.schedules import Constant, Cosine, Cyclical, Linear, Schedule, Sigmoid

RISES = [Linear, Sigmoid, Cosine, Cyclical]
every_rise = pytest.mark.parametrize("rise", RISES, ids=lambda cls: cls.__name__)
SCHEDULES = [Constant(0.3), *(cls(0.1, 4.0, steps=100, delay=20) for cls in RISES)]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


@every_rise
def test_a_rise_begins_at_start_and_is_at_stop_exactly_from_its_last_step_on(rise):
    schedule = rise(0.1, 0.7, steps=7, delay=3)
    assert [schedule(step) for step in (0, 1, 3)] == [0.1] * 3
    assert schedule.total_steps == 10
    assert [schedule(step) for step in (10, 11, 1e9)] == [0.7] * 3
    assert schedule(9) != 0.7 or rise is Cyclical


@every_schedule
def test_weights_stay_between_start_and_stop(schedule):
    low, high = sorted((getattr(schedule, "start", 0.3), getattr(schedule, "stop", 0.3)))
    assert all(low <= schedule(step / 7) <= high for step in range(1000))


@pytest.mark.parametrize("rise", [Linear, Sigmoid, Cosine])
def test_a_rise_is_monotone_and_symmetric_about_its_middle(rise):
    weights = [rise(steps=64)(step) for step in range(65)]
    assert all(a < b for a, b in itertools.pairwise(weights))
    assert all(abs(a + b - 1) < 4e-16 for a, b in zip(weights, reversed(weights), strict=True))
    assert rise(1.0, 0.0, steps=64)(16) == pytest.approx(1 - weights[16], abs=4e-16)


def test_the_shapes_are_those_of_their_formulas():
    steps, k = 50, 10.0

    def logistic(x):
        return 1 / (1 + math.exp(-x))

    for step in range(steps + 1):
        f = step / steps
        assert Linear(steps=steps)(step) == pytest.approx(f)
        assert Cosine(steps=steps)(step) == pytest.approx((1 - math.cos(math.pi * f)) / 2)
        raw = logistic(k * (f - 0.5))
        ends = logistic(-k / 2), logistic(k / 2)
        assert Sigmoid(steps=steps, sharpness=k)(step) == pytest.approx(
            (raw - ends[0]) / (ends[1] - ends[0]), abs=1e-15
        )


def test_a_sigmoid_of_little_sharpness_is_a_straight_line():
    for step in range(11):
        assert Sigmoid(steps=10, sharpness=1e-6)(step) == pytest.approx(step / 10, abs=1e-12)


def test_cycles_follow_the_paper():
    """β(t) = τ/R for τ ≤ R, 1 for R < τ < 1, with τ = mod(t, T/M)/(T/M) (Fu et al., 2019)."""
    total, cycles, ramp = 120, 3, 0.25
    schedule = Cyclical(steps=total, cycles=cycles, ramp=ramp)
    for step in range(total):
        tau = (step % (total // cycles)) / (total // cycles)
        assert schedule(step) == pytest.approx(min(1.0, tau / ramp), abs=1e-12)
    assert sum(schedule(step) == 0 for step in range(total)) == cycles
    assert schedule(total) == 1


@every_schedule
def test_schedules_are_frozen_values_that_pickle_and_print_as_they_are_built(schedule):
    for twin in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule), eval(repr(schedule))):
        assert twin == schedule
        assert hash(twin) == hash(schedule)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.stop = 2.0


@every_schedule
def test_a_curve_reaches_beyond_the_warm_up(schedule):
    steps, weights = schedule.curve(12)
    assert len(steps) == len(weights) == 12
    assert steps[0] == 0
    assert steps[-1] > schedule.total_steps
    assert weights == [schedule(step) for step in steps]


@every_schedule
def test_the_figure_shows_every_weight_and_where_the_warm_up_ends(schedule):
    figure = schedule.figure(num_steps=150)
    (axes,) = figure.axes
    line, *dots = axes.get_lines()
    assert line.get_ydata() == pytest.approx([schedule(step) for step in line.get_xdata()], abs=0)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "weight β")
    assert axes.get_xlim() == (0, 150)
    ends = [(dot.get_xdata()[0], dot.get_ydata()[0]) for dot in dots]
    assert ends == ([(120, 4.0)] if schedule.total_steps else [])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [repr(schedule)]


def test_several_schedules_are_drawn_over_the_same_steps_and_labelled():
    many = [Linear(steps=10 * k) for k in range(1, 8)]
    (axes,) = schedule_figure(many).axes
    lines = [line for line in axes.get_lines() if len(line.get_xdata()) > 1]
    assert all(line.get_xdata()[-1] == pytest.approx(1.1 * 70) for line in lines)
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(many)
    named = schedule_figure({"a": Constant(1.0), "b": Constant(2.0)})
    assert [text.get_text() for text in named.legends[0].get_texts()] == ["a", "b"]
    assert named.axes[0].get_xlim() == (0, 1)


def test_a_figure_without_steps_or_schedules_is_an_error():
    with pytest.raises(ValueError, match="at least one schedule, got none"):
        schedule_figure([])
    with pytest.raises(ValueError, match="num_steps must be above 0, got 0"):
        Linear(steps=10).figure(num_steps=0)


def test_a_users_own_schedule_is_a_schedule():
    with pytest.raises(TypeError, match="abstract"):
        Schedule()


@every_rise
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be above 0, got 0"),
        ({"steps": 5, "delay": -1}, ValueError, "delay must be at least 0, got -1"),
        ({"steps": 5, "stop": math.nan}, ValueError, "stop must be finite, got nan"),
        ({"steps": 5, "start": "0"}, TypeError, "start must be a number, got str"),
    ],
)
def test_bad_settings_are_errors(rise, options, error, message):
    with pytest.raises(error, match=message):
        rise(**options)


def test_bad_settings_of_single_schedules_are_errors():
    with pytest.raises(ValueError, match="sharpness must be above 0, got 0"):
        Sigmoid(steps=5, sharpness=0)
    with pytest.raises(ValueError, match=r"cycles must be an integer of at least 1, got 1\.5"):
        Cyclical(steps=5, cycles=1.5)
    with pytest.raises(ValueError, match=r"ramp must lie in \(0, 1\].*got 0"):
        Cyclical(steps=5, ramp=0)


@every_schedule
def test_a_step_before_training_is_an_error(schedule):
    for step in (-1, math.nan):
        with pytest.raises(ValueError, match="step must be at least 0"):
            schedule(step)
