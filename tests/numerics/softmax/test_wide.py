"""Divergences in float64 by few operations, as on an accelerator, against sums of 60 digits."""

import math

import mpmath
import pytest
import torch

from torch_klloss.language import ForwardKL, Jeffreys, JensenShannon, ReverseKL, SkewKL, token_kl
from torch_klloss.numerics.softmax import rows, wide
from torch_klloss.numerics.softmax.tiles import Problem

ULP = 2.0**-24
DIVERGENCES = [
    ForwardKL(),
    ReverseKL(),
    Jeffreys(0.3),
    JensenShannon(),
    JensenShannon(0.2, scaled=True),
    SkewKL(),
    SkewKL(0.4, reverse=True),
]


def problem_of(divergence, temperature=1.0):
    """The divergence with its first side as the one that it always has, as the losses turn it."""
    terms = divergence.terms
    return Problem(terms if terms.by_q else terms._replace(by_q=terms.by_p, q_mix=terms.p_mix, by_p=0.0), temperature)


def step(a, b, problem):
    """Return value and derivatives of one pair of rows."""
    rows = wide.compute(a, b, None, problem)
    slopes = [torch.empty_like(t, dtype=torch.float64) for t in (a, b)]
    wide.write_derivatives(a, b, None, rows, torch.ones(len(a), 1, dtype=torch.float64), problem, *slopes)
    return rows.value(problem.terms), slopes


def exact_step(a, b, problem):
    """The same of a single row, in numbers of 60 digits."""
    (by_q, q_mix, by_p, p_mix), scale = problem.terms, 1 / mpmath.mpf(problem.temperature)
    q, p = (softmax([x * scale for x in map(mpmath.mpf, t[0].tolist())]) for t in (a, b))
    first, q_slope, p_slope = term(q, p, q_mix)
    second, p_slope_too, q_slope_too = term(p, q, p_mix)
    by_each = [
        [by_q * x + by_p * y for x, y in zip(*pair, strict=True)]
        for pair in ((q_slope, q_slope_too), (p_slope, p_slope_too))
    ]
    slopes = []
    for probs, slope in zip((q, p), by_each, strict=True):
        mean = mpmath.fsum(w * s for w, s in zip(probs, slope, strict=True))
        slopes.append([w * (s - mean) * scale for w, s in zip(probs, slope, strict=True)])
    return by_q * first + by_p * second, slopes


def softmax(logits):
    top = max(logits)
    weights = [mpmath.exp(x - top) for x in logits]
    total = mpmath.fsum(weights)
    return [w / total for w in weights]


def term(q, p, mix):
    """KL(q‖m) of the mixture m = (1 - mix) q + mix p, and its derivatives by the probabilities q and p."""
    mixture = [(1 - mpmath.mpf(mix)) * x + mix * y for x, y in zip(q, p, strict=True)]
    logs = [mpmath.log(x / m) for x, m in zip(q, mixture, strict=True)]
    value = mpmath.fsum(x * log for x, log in zip(q, logs, strict=True))
    ratios = [x / m for x, m in zip(q, mixture, strict=True)]
    by_q = [log - (1 - mpmath.mpf(mix)) * r for log, r in zip(logs, ratios, strict=True)]
    return value, by_q, [-mix * r for r in ratios]


def regimes():
    """Logits that are flat or peaked, near each other or far, shifted or not, in all of the scales of a KL."""
    generator = torch.Generator().manual_seed(0)
    for width in (1e-9, 0.3, 3.0, 20.0):
        for distance in (1e-8, 1e-5, 1e-2, 1.0, 10.0):
            for shift in (0.0, 5.0):
                a = width * torch.randn(1, 30, generator=generator)
                b = a + distance * min(width, 1.0) * torch.randn(1, 30, generator=generator) + shift * (width > 1e-3)
                b[0, 3] += 8.0 * (shift > 0 and width > 1)  # a class that q finds rare
                yield a, b


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_value_and_gradient_are_right_in_every_regime(divergence):
    for number, (a, b) in enumerate(regimes()):
        a, b = (t.bfloat16() if number % 3 == 2 else t for t in (a, b))
        problem = problem_of(divergence, (1.0, 2.0, 0.7)[number % 3])
        value, slopes = step(a, b, problem)
        with mpmath.workdps(60):
            exact, exact_slopes = exact_step(a, b, problem)
            if torch.equal(a, b):
                assert value == 0
                continue
            assert abs(value.item() - exact) <= (4 if divergence in DIVERGENCES[:3] else 16) * ULP * exact, number
            for slope, exact_slope in zip(slopes, exact_slopes, strict=True):
                size = max(map(abs, exact_slope))
                errors = [abs(x - y) for x, y in zip(slope[0].tolist(), exact_slope, strict=True)]
                assert max(errors) <= 1e-5 * size, number


def test_a_plain_difference_is_rejected():
    a = torch.randn(1, 30, generator=torch.Generator().manual_seed(0))
    b = a + 1e-5 * torch.randn(1, 30, generator=torch.Generator().manual_seed(1))
    log_q, log_p = a.log_softmax(-1), b.log_softmax(-1)
    with mpmath.workdps(60):
        exact = exact_step(a, b, problem_of(ForwardKL()))[0]
        assert abs((log_q.exp() * (log_q - log_p)).sum().item() - exact) > 1000 * ULP * exact


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_equal_logits_have_value_and_gradient_zero(divergence):
    a = 5 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    a[1, :7] = -math.inf
    value, slopes = step(a, a.clone(), problem_of(divergence, 0.7))
    assert not value.any()
    assert not any(slope.any() for slope in slopes)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_missing_classes(divergence):
    a, b = (torch.randn(3, 40, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    a[0, 5] = b[0, 5] = a[1, 6] = b[2, 7] = -math.inf
    value, slopes = step(a, b, problem_of(divergence))
    without, (slope, _) = step(*(torch.cat((t[:1, :5], t[:1, 6:]), -1) for t in (a, b)), problem_of(divergence))
    torch.testing.assert_close(value[:1], without, rtol=1e-12, atol=0)
    torch.testing.assert_close(slopes[0][0, 6:], slope[0, 5:], rtol=1e-9, atol=0)
    terms = problem_of(divergence).terms
    is_infinite = [False, bool(terms.by_p) and terms.p_mix == 1, terms.q_mix == 1]
    assert (value == math.inf).squeeze(-1).tolist() == is_infinite
    for s in slopes:
        assert s.isfinite().all()
        assert s[0, 5] == 0
        assert not s[is_infinite].any()


def test_nan_and_a_row_without_classes_are_nan():
    a = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    b = a + 0.1
    a[1, 3], b[2] = math.nan, -math.inf
    value, _ = step(a, b, problem_of(ForwardKL()))
    assert value.isnan().squeeze(-1).tolist() == [False, True, True]


@pytest.mark.parametrize("shape", [(7, 300), (300, 9)])
def test_many_tiles_are_as_good_as_one(shape, monkeypatch):
    a, b = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    b[3, 5] = -math.inf
    whole = step(a, b, problem_of(Jeffreys()))
    monkeypatch.setattr(wide, "_FEW", 0)
    torch.testing.assert_close(step(a, b, problem_of(Jeffreys())), whole, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(whole[0].squeeze(-1)[:3].float(), (token_kl(a, b) + token_kl(b, a))[:3] / 2)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_twice_the_digits_of_float64_are_not_had_there(dtypes):
    a, b = (torch.empty(2, 5, dtype=dtype, device="meta") for dtype in dtypes)
    assert not wide.can_be_taken(a, b)
    assert wide.can_be_taken(a.float(), b.bfloat16())
    assert rows.rows_dtype(a, b) == torch.float64
