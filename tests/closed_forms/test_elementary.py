"""Laws that every elementary pair obeys: shapes, derivatives, equality, NaN, extreme parameters."""

import math

import pytest
import torch
from torch.distributions import (
    Binomial,
    Cauchy,
    Distribution,
    Exponential,
    Gumbel,
    HalfCauchy,
    HalfNormal,
    Laplace,
    LogNormal,
    Pareto,
    Poisson,
    Uniform,
)

from tests.closed_forms.checks import DTYPES, t64, value_and_gradients
from tests.references.elementary import REFERENCES
from tests.references.harness import draw
from torch_klloss import kl_divergence


def each(references):
    return pytest.mark.parametrize("reference", references, ids=lambda reference: reference.name)


PAIRS = each(REFERENCES)


def kl_of_params(reference, regime="moderate", dtype=torch.float64, shapes=((), ()), seed=0):
    """Return parameters of q and p of the batch shapes, and how to compute the KL from all of them in a row."""
    sides, keys = [], []
    for side, shape in enumerate(shapes):
        params = draw(reference, regime, dtype, max(1, math.prod(shape)), seed)[side]
        keys.append(list(params))
        sides.append([t.detach().reshape(shape + t.shape[1:]) for t in params.values()])

    def kl(*params):
        q, p = params[: len(keys[0])], params[len(keys[0]) :]
        return kl_divergence(*reference.build(dict(zip(keys[0], q, strict=True)), dict(zip(keys[1], p, strict=True))))

    return *sides, kl


@each([r for r in REFERENCES if r.type_q not in (Pareto, Uniform, Binomial)])  # whose draws go together: see below
@pytest.mark.parametrize("shapes", [((), (2, 3)), ((2, 3), (3,)), ((2, 1), (1, 3))], ids=str)
def test_batch_shapes_broadcast_either_way_in_value_and_gradient(reference, shapes):
    q, p, kl = kl_of_params(reference, shapes=shapes)
    shape = torch.broadcast_shapes(*shapes)
    params = [t.clone().requires_grad_() for t in q + p]
    expanded = [t.expand(shape + t.shape[len(s) :]) for side, s in zip((q, p), shapes, strict=True) for t in side]
    expanded = [t.clone().requires_grad_() for t in expanded]
    value, expected = kl(*params), kl(*expanded)
    assert value.shape == shape
    torch.testing.assert_close(value, expected, rtol=1e-14, atol=0)
    grads = torch.autograd.grad(value.sum(), params)
    for grad, whole in zip(grads, torch.autograd.grad(expected.sum(), expanded), strict=True):
        torch.testing.assert_close(grad, whole.sum_to_size(grad.shape), rtol=1e-12, atol=1e-12)


@PAIRS
@DTYPES
@pytest.mark.parametrize("regime", ["moderate", "wide"])
def test_value_and_gradient_are_zero_at_equality(reference, dtype, regime):
    q, _, kl = kl_of_params(reference, regime, dtype, ((50,), (50,)))
    params = [t.clone().requires_grad_() for t in q + q]
    value = kl(*params)
    assert torch.equal(value, torch.zeros(50, dtype=dtype))
    if reference.type_q not in (Uniform, Pareto):  # whose KL begins with a slope, where p just reaches
        grads = torch.autograd.grad(value.sum(), params, allow_unused=True)
        tolerance = 4 * torch.finfo(dtype).eps if reference.held else 0.0  # the constructor's own rounding
        assert all(g is None or float(g.abs().max()) <= tolerance for g in grads)


@PAIRS
def test_nan_in_a_parameter_gives_nan_and_only_there(reference):
    q, p, _ = kl_of_params(reference, shapes=((3,), (3,)))
    names = [list(side) for side in draw(reference, "moderate", torch.float64, 1)]
    for i, keys in enumerate(names):
        for j, key in enumerate(keys):
            if key in reference.constants:
                continue
            sides = [dict(zip(k, [t.clone() for t in s], strict=True)) for k, s in zip(names, (q, p), strict=True)]
            sides[i][key].view(3, -1)[1, 0] = math.nan
            built = without_validation(reference, *sides)
            assert kl_divergence(*built).isnan().tolist() == [False, True, False], (i, j)


def without_validation(reference, q, p):
    before = Distribution._validate_args
    try:
        Distribution.set_default_validate_args(False)
        return reference.build(q, p)
    finally:
        Distribution.set_default_validate_args(before)


@PAIRS
def test_a_functional_gradient_under_vmap_is_that_of_backward(reference, monkeypatch):
    monkeypatch.setattr(Distribution, "_validate_args", False)  # torch's validation looks at values
    q, p, kl = kl_of_params(reference, shapes=((4,), (4,)))
    params = [t.clone().requires_grad_() for t in q + p]
    value = kl(*params)
    expected = torch.autograd.grad(value.sum(), params, allow_unused=True)
    torch.testing.assert_close(torch.func.vmap(kl)(*params), value, rtol=1e-14, atol=0)
    grads = torch.func.vmap(torch.func.grad(kl, argnums=tuple(range(len(params)))))(*params)
    for grad, e in zip(grads, expected, strict=True):
        if e is not None:
            torch.testing.assert_close(grad, e, rtol=1e-12, atol=1e-12)


@PAIRS
def test_the_gradient_can_be_differentiated_again(reference):
    differentiate_twice(reference, *kl_of_params(reference, shapes=((2,), (2,))))


# At equality the KL of supports that move has no derivative from both sides, and Laplace's no third one.
@each([r for r in REFERENCES if r.type_q not in (Uniform, Pareto, Laplace)])
def test_the_gradient_can_be_differentiated_again_at_equality(reference):
    q, _, kl = kl_of_params(reference, shapes=((2,), (2,)))
    differentiate_twice(reference, q, q, kl)


def test_the_curvature_of_laplace_at_equality_is_its_fisher_information():
    loc, scale = t64(0.3), t64(2.0)
    build = lambda x: kl_divergence(Laplace(x[0], x[1]), Laplace(loc, scale))
    hessian = torch.autograd.functional.hessian(build, torch.stack((loc, scale)))
    torch.testing.assert_close(hessian, torch.eye(2, dtype=torch.float64) / 4)


def differentiate_twice(reference, q, p, kl):
    constants = [key in reference.constants for side in draw(reference, "moderate", torch.float64, 1) for key in side]
    params = [t.clone().requires_grad_(not c) for t, c in zip(q + p, constants, strict=True)]
    assert torch.autograd.gradcheck(kl, params)
    assert torch.autograd.gradgradcheck(kl, params, atol=1e-4 if "Gumbel" in reference.name else 1e-5)


@DTYPES
@pytest.mark.parametrize("family", [Exponential, HalfNormal, HalfCauchy, Poisson])
def test_scales_and_rates_may_lie_50_orders_of_magnitude_apart(family, dtype):
    large, small = torch.tensor([1e25, 1e-25], dtype=dtype), torch.tensor([1e-25, 1e25], dtype=dtype)
    value, by_q, by_p = value_and_gradients(lambda a, b: (family(a), family(b)), large, small)
    exact = kl_divergence(family(large.double()), family(small.double()))
    torch.testing.assert_close(value, exact.to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=0)
    assert (value > 0).all()
    assert not (by_q.isnan() | by_p.isnan()).any()


@DTYPES
@pytest.mark.parametrize("family", [Laplace, Cauchy, LogNormal, Gumbel])
def test_locations_and_scales_may_be_extreme_without_a_nan_or_a_negative_value(family, dtype):
    numbers = torch.tensor([1e-25, 1e-3, 1.0, 1e3, 1e25], dtype=dtype)
    loc, scale = (t.flatten() for t in torch.meshgrid(torch.cat((-numbers, numbers)), numbers, indexing="ij"))
    q = (loc[:, None].expand(-1, len(loc)), scale[:, None].expand(-1, len(loc)))
    p = (loc.expand(len(loc), -1), scale.expand(len(loc), -1))
    value, *grads = value_and_gradients(lambda a, b, c, d: (family(a, b), family(c, d)), *q, *p)
    assert not value.isnan().any()
    assert (value >= 0).all()
    assert (value.diagonal() == 0).all()
    assert not any(g.isnan().any() for g in grads)
