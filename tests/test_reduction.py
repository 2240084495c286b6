"""Reduction, against a loop in plain Python."""

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from torch_klloss import KLEstimate
from torch_klloss.reduction import check_reduction, expand_mask, reduce, reduce_estimate


def by_loop(value: Tensor, reduction: str, batch_dims: int, mask: Tensor | None) -> Tensor:
    """Sum the latent dimensions of every example, weight, and add up, number by number."""
    examples = value.shape[:batch_dims]
    out, total = torch.zeros(examples, dtype=value.dtype), 0.0
    for i in itertools.product(*map(range, examples)):
        latent = value[i]
        kl = math.fsum(latent.flatten().tolist())
        weight = 1.0 if mask is None else float(mask.expand(examples)[i])
        out[i] = weight * kl if weight else 0.0
        total += weight
    if reduction == "none":
        return out
    summed = torch.tensor(math.fsum(out.flatten().tolist()), dtype=value.dtype)
    return summed if reduction == "sum" else summed / total


@st.composite
def problems(draw: st.DrawFn):
    shape = draw(st.lists(st.integers(1, 3), max_size=4))
    n = math.prod(shape)
    numbers = st.floats(-10, 10, allow_subnormal=False)
    value = torch.tensor(draw(st.lists(numbers, min_size=n, max_size=n)), dtype=torch.float64).reshape(shape)
    batch_dims = draw(st.integers(0, 4))
    examples = value.shape[:batch_dims]
    mask_shape = [draw(st.sampled_from([1, size])) for size in examples][draw(st.integers(0, len(examples))) :]
    weights = st.sampled_from([0.0, 1.0, 0.25, 3.0])
    m = math.prod(mask_shape)
    mask = torch.tensor(draw(st.lists(weights, min_size=m, max_size=m)), dtype=torch.float64).reshape(mask_shape)
    mask = draw(st.sampled_from([None, mask, mask.bool()]))
    return value, draw(st.sampled_from(["mean", "sum", "none"])), batch_dims, mask


@given(problems())
def test_the_reduction_is_the_loop(problem):
    value, reduction, batch_dims, mask = problem
    if mask is not None and reduction == "mean" and mask.sum() == 0:
        with pytest.raises(ValueError, match="divides by the sum of the mask, which is zero"):
            reduce(value, reduction, batch_dims, expand_mask(mask, value.shape[:batch_dims]))
        return
    expanded = None if mask is None else expand_mask(mask, value.shape[:batch_dims])
    expected = by_loop(value, reduction, batch_dims, mask)
    atol = value.numel() * 30 * torch.finfo(torch.float64).eps
    torch.testing.assert_close(reduce(value, reduction, batch_dims, expanded), expected, rtol=1e-14, atol=atol)
    # An estimate reduces to the same value, and independent errors to the root of the sum of their squares.
    errors = value.abs() + 0.1
    estimate = KLEstimate(value, exact=False, std_error=errors, dof=3)
    reduced = reduce_estimate(estimate, reduction, batch_dims, expanded)
    torch.testing.assert_close(reduced.value, expected, rtol=1e-14, atol=atol)
    weights = None if mask is None else mask.double() ** 2
    variance = by_loop(errors**2, "none" if reduction == "none" else "sum", batch_dims, weights)
    total = 1.0
    if reduction == "mean":
        total = math.prod(value.shape[:batch_dims]) if expanded is None else expanded.double().sum()
    torch.testing.assert_close(reduced.std_error, variance.sqrt() / total, rtol=1e-13, atol=0)


def test_a_mean_over_the_latent_dimensions_is_another_number():
    value = torch.ones(4, 8)
    assert reduce(value, "mean", 1) == 8
    assert value.mean() == 1


def test_a_zero_sum_of_weights_is_an_error_only_for_the_mean():
    mask = torch.zeros(3, dtype=torch.bool)
    assert reduce(torch.ones(3), "sum", 1, mask) == 0
    assert reduce(torch.ones(3), "none", 1, mask).tolist() == [0.0] * 3
    with pytest.raises(
        ValueError, match="sum of the mask, which is zero; skip batches without a valid element, or use"
    ):
        reduce(torch.ones(3), "mean", 1, mask)


def test_an_element_of_weight_zero_adds_nothing():
    value = torch.tensor([math.nan, 2.0, math.inf], requires_grad=True)
    reduced = reduce(value, "mean", 1, torch.tensor([False, True, False]))
    assert reduced == 2.0
    assert torch.autograd.grad(reduced, value)[0].tolist() == [0.0, 1.0, 0.0]
    # Multiplying by the mask, as many do, leaves NaN.
    assert (value * torch.tensor([0.0, 1.0, 0.0])).sum().isnan()


def test_an_empty_batch_has_a_sum_and_no_mean():
    assert reduce(torch.ones(0, 4), "sum", 1) == 0
    assert reduce(torch.ones(0, 4), "none", 1).shape == (0,)
    with pytest.raises(ValueError, match=r"at least one example, got the example shape \(0,\); use reduction='sum'"):
        reduce(torch.ones(0, 4), "mean", 1)


def test_a_mask_of_a_shape_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"shape of the examples \(3,\), got \(4,\); batch_dims says"):
        expand_mask(torch.ones(4), torch.Size([3]))
    with pytest.raises(ValueError, match=r"shape of the examples \(3,\), got \(3, 2\)"):
        expand_mask(torch.ones(3, 2), torch.Size([3]))
    with pytest.raises(ValueError, match=r"shape of the examples \(\), got \(1,\)"):
        expand_mask(torch.ones(1), torch.Size([]))


@pytest.mark.parametrize("mask", [[True, False], True, "all", 1.0], ids=str)
def test_a_mask_that_is_not_a_tensor_is_a_type_error(mask):
    with pytest.raises(TypeError, match=f"mask must be a tensor, bool or of weights, got {type(mask).__name__}"):
        expand_mask(mask, torch.Size([2]))


@pytest.mark.parametrize("reduction", ["avg", "batchmean", None, "Mean", 1])
def test_an_unknown_reduction_is_an_error(reduction):
    with pytest.raises(ValueError, match=f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}"):
        check_reduction(reduction, 1)


@pytest.mark.parametrize("batch_dims", [-1, 1.0, True, None, "1"])
def test_an_invalid_number_of_batch_dims_is_an_error(batch_dims):
    with pytest.raises(ValueError, match=f"batch_dims must be an integer of at least 0, got {batch_dims!r}"):
        check_reduction("mean", batch_dims)
