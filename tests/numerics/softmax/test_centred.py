"""KLs from the difference of the logits less its mean, against sums of 60 digits, and which rows are refused."""

import math

import mpmath
import pytest
import torch

from tests.numerics.softmax.test_wide import exact_step, problem_of
from torch_klloss.language import ForwardKL, token_kl
from torch_klloss.numerics.softmax import centred
from torch_klloss.numerics.softmax.centred import by_centring, write_by_centring
from torch_klloss.numerics.softmax.pairs import Rows

KL = ForwardKL()
DTYPES = [torch.float32, torch.float64]


def step(a, b, dtype, temperature=1.0):
    """Return the values, the gradients and which rows are right."""
    problem = problem_of(KL, temperature)
    rows, is_good = by_centring(a, b, None, problem, dtype)
    rows, slopes = Rows(*rows), [torch.empty_like(t) for t in (a, b)]
    write_by_centring(a, b, None, rows, torch.ones(len(a), 1, dtype=torch.float64), problem, dtype, *slopes)
    return rows.by_q, slopes, is_good


def errors(a, b, dtype, temperature=1.0):
    """Return the value's error in its last places, and the larger one of a gradient relative to it, of a single row."""
    value, slopes, is_good = step(a, b, dtype, temperature)
    with mpmath.workdps(60):
        right, exact = exact_step(a, b, problem_of(KL, temperature))
    off = []
    for slope, other in zip(slopes, exact, strict=True):
        other = torch.tensor([[float(x) for x in other]], dtype=torch.float64)
        off.append(float((slope.double() - other).norm() / other.norm()))
    return abs(value.float().item() / float(right) - 1) * 2**23, max(off), bool(is_good)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distance", [1e-7, 1e-5, 1e-3, 0.03, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("num_classes", [2, 40, 700])
def test_values_and_gradients_have_the_digits_of_float32_at_every_distance(num_classes, distance, dtype):
    a = torch.randn(1, num_classes)
    value, slope, is_good = errors(a, a + distance * torch.randn(1, num_classes), dtype)
    assert is_good or num_classes == 2
    assert not is_good or (value <= 6 and slope <= 3e-6)


@pytest.mark.parametrize("distance", [1e-4, 1.0])
def test_the_ways_agree_where_a_row_does_not_fit_into_the_cache(distance):
    a = torch.randn(2, 150_000)
    b = a + distance * torch.randn(2, 150_000)
    (value, slopes, _), (wide, others, is_good) = (step(a, b, dtype) for dtype in DTYPES)
    assert is_good.all()
    torch.testing.assert_close(value, wide, rtol=1e-6, atol=0)
    for slope, other in zip(slopes, others, strict=True):
        assert (slope - other).norm() <= 1e-6 * other.norm()


def shared(offset):
    """Two rows whose logits differ by a number that all classes share, and by little beside."""
    a = torch.randn(1, 300)
    return a, a + offset + 1e-3 * torch.randn(1, 300)


def test_what_all_classes_share_goes_to_float64(monkeypatch):
    a, b = shared(30.0)
    assert not errors(a, b, torch.float32)[2]
    value, slope, is_good = errors(a, b, torch.float64)
    assert is_good
    assert value <= 2
    assert slope <= 1e-6
    monkeypatch.setattr(centred, "_SHARED", dict.fromkeys(DTYPES, math.inf))  # the known-wrong twin
    value, slope, is_good = errors(a, b, torch.float32)
    assert is_good
    assert slope > 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_class_of_a_law_of_one_class_keeps_the_digits_of_its_derivative(monkeypatch, dtype):
    a = torch.randn(1, 300)
    a[0, 5] += 22 if dtype == torch.float32 else 45
    b = a + 0.1 * torch.randn(1, 300)
    value, slope, is_good = errors(a, b, dtype)
    assert is_good
    assert value <= 6
    assert slope <= 1e-6
    of_largest = centred._of_largest

    def not_from_it(*args):  # the known-wrong twin: the difference as it is
        highest, base = of_largest(*args)
        return highest, torch.zeros_like(base)

    monkeypatch.setattr(centred, "_of_largest", not_from_it)
    assert errors(a, b, dtype)[1] > 1e-5


def test_a_class_whose_weight_underflows_is_not_lost():
    a, b = torch.randn(2, 1, 300)
    a, b = a[None, 0], b[None, 0]
    a[0, 3], b[0, 3] = -120.0, 2.0
    assert not errors(a, b, torch.float32)[2]
    right, _ = exact_step(a, b, problem_of(KL))
    assert token_kl(a, b).item() == pytest.approx(float(right), rel=1e-6)


def test_classes_that_both_lack_count_as_equal_and_others_are_refused():
    a = torch.randn(4, 300)
    b = a + 0.1 * torch.randn(4, 300)
    a[:, 7:40] = b[:, 7:40] = -math.inf
    kept = torch.ones(300, dtype=torch.bool)
    kept[7:40] = False
    value, slopes, is_good = step(a, b, torch.float32)
    assert is_good.all()
    torch.testing.assert_close(value, step(a[:, kept], b[:, kept], torch.float32)[0], rtol=1e-6, atol=0)
    assert all((slope[:, 7:40] == 0).all() for slope in slopes)
    a[0, 50], b[1, 50], a[2, 50], b[3, 50] = -math.inf, -math.inf, math.nan, math.nan
    for dtype in DTYPES:
        assert not step(a, b, dtype)[2].any()
    value = token_kl(a, b)
    assert value[0].isfinite()
    assert value[1] == math.inf
    assert value[2:].isnan().all()


@pytest.mark.parametrize("temperature", [2.0, 0.7])
def test_the_temperature_divides_both_logits(temperature):
    a = 2 * torch.randn(1, 300)
    value, slope, is_good = errors(a, a + 1e-3 * torch.randn(1, 300), torch.float64, temperature)
    assert is_good
    assert value <= 2
    assert slope <= 1e-6
    assert not centred.can_be_tried(a, a, problem_of(KL, 0.7), torch.float32)


@pytest.mark.parametrize(("offset", "is_right"), [(1e-3, True), (0.03, False)])
@pytest.mark.parametrize("temperature", [0.0625, 16.0])
def test_what_all_classes_share_is_measured_after_the_temperature(temperature, offset, is_right):
    a = torch.randn(1, 300)
    b = a + temperature * (offset + 1e-3 * torch.randn(1, 300))
    assert step(a, b, torch.float32, temperature)[2].item() == is_right
