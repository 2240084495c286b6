"""Helpers of the tests of closed forms: numbers in float64, values and gradients."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss import kl_divergence

INF = math.inf
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def t64(*values, **kwargs) -> Tensor:
    """Return the values in float64; a single one without a dimension."""
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64, **kwargs)


def value_and_gradients(build: Callable[..., tuple[Distribution, Distribution]], *params: Tensor) -> tuple[Tensor, ...]:
    """Return the KL of the pair that `build` makes of the parameters, and the derivative by each."""
    leaves = [p.detach().clone().requires_grad_() for p in params]
    value = kl_divergence(*build(*leaves))
    return value.detach(), *torch.autograd.grad(value.sum(), leaves)


def check(actual: Tensor, *expected: float) -> None:
    """Compare a tensor with its numbers in a row, to the digits of its dtype."""
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype).reshape(actual.shape))
