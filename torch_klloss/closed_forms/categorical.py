"""Categorical‖Categorical and OneHotCategorical‖OneHotCategorical, from the given probabilities or logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Categorical, OneHotCategorical

from torch_klloss.closed_forms import mixed_categoricals
from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.distributions.given import both_as_given
from torch_klloss.distributions.tensors import lacks_float64
from torch_klloss.numerics.blocks import Derivatives
from torch_klloss.numerics.custom_gradient import formula_of, kernel_of
from torch_klloss.numerics.devices import can_be_read
from torch_klloss.numerics.elementary import (
    gkl,
    has_digits_to_spare,
    log_ratio,
    product,
    quotient,
    replaced,
    spare_gkl_and_log,
)
from torch_klloss.numerics.exponentials import expm1, narrow_growth
from torch_klloss.numerics.quick_kernels import direct_or_careful
from torch_klloss.numerics.softmax import whole
from torch_klloss.numerics.softmax.centred import FEWEST
from torch_klloss.numerics.softmax.divergence import divergence_of_logits
from torch_klloss.numerics.softmax.pairs import KL
from torch_klloss.numerics.softmax.sides import Dense


@register_kl(Categorical, Categorical, needs_float64=False)
def _categorical_categorical(q: Categorical, p: Categorical) -> Tensor:
    """Σ q log(q/p) - q + p over the classes: every term is ≥ 0, and neither side is clamped.

    A class that both lack contributes 0, with a gradient of 0; one that only q lacks contributes p; one that only p
    lacks makes the KL inf, and the gradient 0.

    Raises:
        ValueError: if q and p differ in the number of classes.
    """
    q_param, p_param, given = both_as_given(q, p, is_binary=False)
    if q_param.shape[-1] != p_param.shape[-1]:
        raise ValueError(
            f"q and p must have the same number of classes, got {q_param.shape[-1]} and {p_param.shape[-1]}; give the "
            "classes that one of them lacks a probability of 0 (a logit of -inf)."
        )
    if all(given):
        is_elsewhere = has_digits_to_spare(q_param) and not can_be_read(q_param)
        return (_kl_elsewhere if is_elsewhere else _kl)(q_param, p_param)
    if any(given):
        device = q_param.device
        if lacks_float64(q, p):
            q_param, p_param = q_param.cpu(), p_param.cpu()
        return mixed_categoricals.KL[given](q_param, p_param).to(device)
    return _by_logits(q_param, p_param)


@register_kl(OneHotCategorical, OneHotCategorical, needs_float64=False)
def _one_hot_one_hot(q: OneHotCategorical, p: OneHotCategorical) -> Tensor:
    """The KL of the two Categoricals: a class and its one-hot code are the same outcome."""
    return _categorical_categorical(q._categorical, p._categorical)


def _by_logits(q: Tensor, p: Tensor) -> Tensor:
    if q.dtype != p.dtype or not has_digits_to_spare(q):
        return _logits_kl(q, p)
    if not can_be_read(q):
        return _small_kl_elsewhere(q, p) if q.numel() <= _SMALL_ELSEWHERE else _logits_kl(q, p)
    return _small_kl(q, p) if q.numel() <= _SMALL or q.shape[-1] < FEWEST else _logits_kl(q, p)


def _logits_kl(q: Tensor, p: Tensor) -> Tensor:
    q, p = torch.broadcast_tensors(q, p)
    return divergence_of_logits(Dense(q), Dense(p), KL)


_FAR = 1e-15  # times exp(δ): no KL is large beside it where a class may count whose part of q has underflowed
_SMALL = 2**18  # logits, up to which copies in float64 cost less than the many steps that need none
_SMALL_ELSEWHERE = 2**18  # the same on an accelerator


def _direct_by_logits(needs: Sequence[bool], q: Tensor, p: Tensor) -> tuple[Tensor, Derivatives, Tensor]:
    """log(1 + Σ q (exp(δ) - 1 - δ)), where δ is log p - log q less its mean under q; every term is ≥ 0.

    The logits' difference is as good as log p - log q here, and float64 has all of its digits; it is taken from that of
    q's largest class, whose δ may be tiny. What rounding leaves of the mean, and of the sum of q less 1, is felt in its
    square alone. The derivatives by the logits are -q δ and p - q.
    """
    wide = q.double()
    weights, gap = torch.softmax(wide, -1), p.double() - wide
    gap = gap - gap.gather(-1, q.argmax(-1, keepdim=True))
    gap = gap - torch.linalg.vecdot(weights, gap).unsqueeze(-1)
    weights, wide, gap = weights.float(), gap, gap.float()
    grown, lead = narrow_growth(wide, gap)
    value = torch.log1p(torch.linalg.vecdot(weights, lead))
    by_q = product(weights, gap, times=-1) if needs[0] else None
    by_p = None
    if needs[1]:
        ratio, rest = (f(-value).unsqueeze(-1) for f in (torch.exp, expm1))  # of exp(δ) to p/q
        by_p = weights * torch.addcmul(rest, grown, ratio)
    return value, (by_q, by_p), grown.amax(-1) * _FAR


def _careful_by_logits(needs: Sequence[bool], q: Tensor, p: Tensor) -> tuple[Tensor, Derivatives]:
    is_recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        logits = [t if is_recorded and t.requires_grad else t.detach().requires_grad_() for t in (q, p)]
        value = _logits_kl(*logits)
        if not any(needs):
            return value if is_recorded else value.detach(), (None, None)
        wanted = [t for t, need in zip(logits, needs, strict=True) if need]
        found = iter(torch.autograd.grad(value.sum(), wanted, create_graph=is_recorded))
    return value if is_recorded else value.detach(), [next(found) if need else None for need in needs]


_small_kl = formula_of(direct_or_careful(_direct_by_logits, _careful_by_logits, widens=False), event_dims=1)
_small_kl_elsewhere = formula_of(whole.kernel, event_dims=1)
"""The KL of two Categoricals, from their logits."""

_NEAR = 1e-7  # times `LOST`: a KL, below which the rounding of q/p is felt


def _direct(needs: Sequence[bool], q: Tensor, p: Tensor) -> tuple[Tensor, Derivatives, Tensor]:
    """Σ q (r - 1 - log r) of the rounded ratio r = p/q, over classes that both have."""
    q_total, p_total = q.sum(-1, keepdim=True), p.sum(-1, keepdim=True)
    ratio = p / q * (q_total / p_total)
    x, log = ratio - 1, torch.log(ratio)
    value = (q * (x - log)).sum(-1, keepdim=True) / q_total
    by_q = (log + value) / -q_total if needs[0] else None
    by_p = x / (ratio * p_total) if needs[1] else None
    return value.squeeze(-1), (by_q, by_p), value.new_tensor(_NEAR)


def _whole(needs: Sequence[bool], q: Tensor, p: Tensor) -> tuple[Tensor, Derivatives]:
    """The same in float64, over all classes."""
    q, p = q.double(), p.double()
    q_total, p_total = q.sum(-1, keepdim=True), p.sum(-1, keepdim=True)
    q, p = q / q_total, p / p_total
    terms, log = spare_gkl_and_log(q, p)
    value = terms.sum(-1, keepdim=True)
    missed, by_q, by_p = value == torch.inf, None, None
    if needs[0]:
        by_q = replaced(quotient(log + value, q_total, times=-1), missed, 0.0)
    if needs[1]:
        by_p = replaced((1 - q / replaced(p, p == 0, 1.0)) / p_total, missed, 0.0)
    return value.squeeze(-1), (by_q, by_p)


def _value(q: Tensor, p: Tensor) -> Tensor:
    q, p, gap, _, _ = _shares(q, p)
    return gkl(q, p, gap).sum(-1)


def _partials(needs: Sequence[bool], q_weights: Tensor, p_weights: Tensor) -> Sequence[Tensor | None]:
    q, p, gap, q_total, p_total = _shares(q_weights, p_weights)
    lacks = p == 0
    missed = (lacks & (q > 0)).any(-1, keepdim=True)
    by_q = by_p = None
    if needs[0]:
        kl = torch.where(missed, 0.0, gkl(q, p, gap).sum(-1, keepdim=True))
        by_q = torch.where(missed, 0.0, (log_ratio(q, p, gap) - kl) / q_total)
    if needs[1]:
        by_p = torch.where(lacks, 1.0, -gap / torch.where(lacks, 1.0, p)) / p_total
        by_p = torch.where(missed, 0.0, by_p)
    return by_q, by_p


def _shares(q: Tensor, p: Tensor) -> tuple[Tensor, ...]:
    """Return both probabilities, their difference as it was before the normalisation, and the two totals.

    torch normalises in its constructor, and rounds: the totals differ from 1, and from one another.
    """
    q_total, p_total = q.sum(-1, keepdim=True), p.sum(-1, keepdim=True)
    gap = q - p
    excess = gap.sum(-1, keepdim=True) / q_total
    return q / q_total, p / p_total, (gap - q * excess) / p_total, q_total, p_total


_kl = formula_of(direct_or_careful(_direct, kernel_of(_value, _partials)), partials=_partials, event_dims=1)
_kl_elsewhere = formula_of(_whole, event_dims=1)
"""The KL of two Categoricals, from weights of the classes."""
