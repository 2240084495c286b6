"""Pareto and Uniform, whose supports move with their parameters."""

import math

import torch
from torch.distributions import Pareto, Uniform

from tests.closed_forms.checks import DTYPES, INF, check, t64, value_and_gradients
from torch_klloss import kl_divergence


def test_a_pareto_that_starts_below_another_is_infinitely_far():
    build = lambda a, b, c, d: (Pareto(a, b), Pareto(c, d))
    value, *grads = value_and_gradients(build, t64(2.0, 1.0), t64(1.0, 1.0), t64(1.0, 2.0), t64(3.0, 3.0))
    check(value, 3 * math.log(2) + 2 - math.log(3), INF)
    assert all(g.isfinite().all() for g in grads)
    assert all(g[1] == 0 for g in grads)


def test_paretos_broadcast_against_each_other():
    q, p = Pareto(t64(2.0, 0.5), t64(1.0)), Pareto(t64([[1.0], [0.25]]), t64(2.0))
    base = 1 - math.log(2)
    check(kl_divergence(q, p), 2 * math.log(2) + base, INF, 2 * math.log(8) + base, 2 * math.log(2) + base)


def test_a_uniform_inside_another_is_as_far_as_the_logarithm_of_their_widths():
    build = lambda a, b, c, d: (Uniform(a, b), Uniform(c, d))
    value, *grads = value_and_gradients(build, t64(0.0), t64(1.0), t64(-1.0), t64(3.0))
    check(value, math.log(4))
    for grad, expected in zip(grads, (1.0, -1.0, -0.25, 0.25), strict=True):
        check(grad, expected)


def test_a_uniform_that_leaves_another_is_infinitely_far_with_a_gradient_of_zero():
    build = lambda a, b, c, d: (Uniform(a, b), Uniform(c, d))
    value, *grads = value_and_gradients(build, t64(0.0, -1e-9), t64(1 + 1e-9, 1.0), t64(0.0, 0.0), t64(1.0, 1.0))
    check(value, INF, INF)
    assert all((g == 0).all() for g in grads)


def test_uniforms_broadcast_against_each_other():
    q, p = Uniform(t64(0.0, 0.5), t64(1.0, 1.5)), Uniform(t64([[0.0], [-1.0]]), t64([[1.0], [2.0]]))
    check(kl_divergence(q, p), 0.0, INF, math.log(3), math.log(3))


@DTYPES
def test_a_gap_of_one_rounding_error_is_seen(dtype):
    high = torch.tensor(1.0, dtype=dtype)
    above = torch.nextafter(high, 2 * high)
    check(
        kl_divergence(Uniform(torch.zeros_like(high), high), Uniform(torch.zeros_like(high), above)),
        torch.finfo(dtype).eps,
    )
