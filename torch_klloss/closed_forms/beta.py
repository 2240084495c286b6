"""Beta‖Beta: the Dirichlet of two components."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Beta

from torch_klloss.closed_forms import dirichlet
from torch_klloss.closed_forms.formula import register_formula
from torch_klloss.numerics.blocks import Derivatives
from torch_klloss.numerics.lgamma import trigamma


def _direct(
    needs: Sequence[bool], q_a: Tensor, q_b: Tensor, p_a: Tensor, p_b: Tensor
) -> tuple[Tensor, Derivatives, Tensor]:
    """The sum of `dirichlet.direct`, over two components that lie apart."""
    q_total, p_total, step_a, step_b = q_a + q_b, p_a + p_b, q_a - p_a, q_b - p_b
    of_a, of_b, of_total = torch.digamma(q_a), torch.digamma(q_b), torch.digamma(q_total)
    logs = [torch.lgamma(t) for t in (p_a, p_b, q_total, q_a, q_b, p_total)]
    weights = step_a * (of_a - of_total), step_b * (of_b - of_total)
    value = (logs[0] + logs[1] + logs[2]) - (logs[3] + logs[4] + logs[5]) + (weights[0] + weights[1])
    size = sum((t.abs() for t in (*logs[1:], *weights)), logs[0].abs())
    zero = q_total.new_zeros(())
    of_q = (step_a + step_b) * trigamma(q_total) if needs[0] or needs[1] else zero
    of_p = torch.digamma(p_total) - of_total if needs[2] or needs[3] else zero
    slopes = (
        step_a * trigamma(q_a) - of_q if needs[0] else None,
        step_b * trigamma(q_b) - of_q if needs[1] else None,
        torch.digamma(p_a) - of_a - of_p if needs[2] else None,
        torch.digamma(p_b) - of_b - of_p if needs[3] else None,
    )
    return value, slopes, size


def _partials(needs: Sequence[bool], q_a: Tensor, q_b: Tensor, p_a: Tensor, p_b: Tensor) -> Sequence[Tensor | None]:
    by_q, by_p = dirichlet.partials((needs[0] or needs[1], needs[2] or needs[3]), *_joined(q_a, q_b, p_a, p_b))
    slopes = *_apart(by_q), *_apart(by_p)
    return [slope if need else None for slope, need in zip(slopes, needs, strict=True)]


def _joined(q_a: Tensor, q_b: Tensor, p_a: Tensor, p_b: Tensor) -> tuple[Tensor, Tensor]:
    q_a, q_b, p_a, p_b = torch.broadcast_tensors(q_a, q_b, p_a, p_b)
    return torch.stack((q_a, q_b), -1), torch.stack((p_a, p_b), -1)


def _apart(x: Tensor | None) -> Sequence[Tensor | None]:
    return (None, None) if x is None else x.unbind(-1)


def _whole(needs: Sequence[bool], q_a: Tensor, q_b: Tensor, p_a: Tensor, p_b: Tensor) -> tuple[Tensor, Derivatives]:
    value, (by_q, by_p) = dirichlet.whole((needs[0] or needs[1], needs[2] or needs[3]), *_joined(q_a, q_b, p_a, p_b))
    slopes = *_apart(by_q), *_apart(by_p)
    return value, [slope if need else None for slope, need in zip(slopes, needs, strict=True)]


@register_formula(
    Beta, "concentration1", "concentration0", partials=_partials, direct=_direct, whole=_whole, needs_float64=True
)
def _kl(q_a: Tensor, q_b: Tensor, p_a: Tensor, p_b: Tensor) -> Tensor:
    """KL of the Dirichlets of (concentration1, concentration0)."""
    return dirichlet.value(*_joined(q_a, q_b, p_a, p_b))
