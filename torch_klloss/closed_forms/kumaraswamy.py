"""Kumaraswamy‖Kumaraswamy with the same first exponent."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Exponential, Kumaraswamy

from torch_klloss.closed_forms.alike import where_alike
from torch_klloss.closed_forms.registry import kl_divergence, register_kl
from torch_klloss.numerics.elementary import common_dtype, log_ratio
from torch_klloss.numerics.lgamma import binet_digamma_difference

_STEP = 1e-12  # from b = 1, where a difference quotient is a derivative


@register_kl(Kumaraswamy, Kumaraswamy)
def _kumaraswamy_kumaraswamy(q: Kumaraswamy, p: Kumaraswamy) -> Tensor:
    """bp/bq - 1 - log(bp/bq), the KL of two Exponentials: -log(1 - x^a) is Exponential(b).

    Both a receive a gradient too. For unequal a there is no closed form, hence no second derivative by them; under
    `torch.compile` and `torch.func`, where values cannot be read, such an element is NaN.

    Raises:
        NotImplementedError: if the first exponents differ somewhere.

    References:
        *A generalized probability density function for double-bounded random processes* (Kumaraswamy, 1980).
    """
    a_q, b_q, a_p, b_p = (t.double() for t in (q.concentration1, q.concentration0, p.concentration1, p.concentration0))
    value = kl_divergence(Exponential(b_q, validate_args=False), Exponential(b_p, validate_args=False))
    by_a = (b_q - b_p) / a_p * _mean_slope(b_q)
    value = where_alike(a_q, a_p, value + (a_p - a_q) * by_a, "first exponents (concentration1)")
    return value.to(common_dtype(q.concentration1, q.concentration0, p.concentration1, p.concentration0))


def _mean_slope(b: Tensor) -> Tensor:
    """Return (ψ(1 + b) - ψ(2))/(b - 1) > 0."""
    step = torch.where((b - 1).abs() < _STEP, _STEP, b - 1)
    two = torch.full_like(b, 2.0)
    return (binet_digamma_difference(step, 1 + b, two) + log_ratio(1 + b, two, step)) / step
