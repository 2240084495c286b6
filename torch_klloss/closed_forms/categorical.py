"""Categorical‖Categorical and OneHotCategorical‖OneHotCategorical, from the given probabilities or logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Categorical, OneHotCategorical

from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.distributions.given import GIVEN, Given, both_as_given
from torch_klloss.numerics.custom_gradient import custom_gradient
from torch_klloss.numerics.elementary import common_dtype, e2, gkl, has_float64, log_ratio
from torch_klloss.numerics.error_free import difference_error
from torch_klloss.numerics.logit_sides import Dense
from torch_klloss.numerics.softmax_divergence import divergence_of_logits
from torch_klloss.numerics.softmax_pairs import KL

Formula = Callable[[Tensor, Tensor, bool], Tensor]
Partials = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]

_SMALL = 0.1  # a KL; below it the classes where q and p are far apart cannot hold all the mass
_TINY = 1e-290
_NO_SHIFT = 300.0  # up to here exp neither over- nor underflows, and an unshifted logit is exact


@register_kl(Categorical, Categorical)
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
    if any(given):
        return _RECORDED[given](*torch.broadcast_tensors(q_param, p_param)).squeeze(-1)
    q_logits, p_logits = torch.broadcast_tensors(q_param, p_param)
    return divergence_of_logits(Dense(q_logits), Dense(p_logits), KL)


@register_kl(OneHotCategorical, OneHotCategorical)
def _one_hot_one_hot(q: OneHotCategorical, p: OneHotCategorical) -> Tensor:
    """The KL of the two Categoricals: a class and its one-hot code are the same outcome."""
    return _categorical_categorical(q._categorical, p._categorical)


def _probs_kl(q_probs: Tensor, p_probs: Tensor, series: bool) -> Tensor:
    """Return the KL of weights in float64, with the last dimension kept.

    The normalisation may bring float32 weights nearer to one another than they are, hence the series for all.
    """
    q, p, gap, _, _ = _shares(q_probs, p_probs)
    return gkl(q, p, gap, series=True).sum(-1, keepdim=True)


def _probs_partials(q_probs: Tensor, p_probs: Tensor, kl: Tensor, series: bool) -> tuple[Tensor, Tensor]:
    """Return the derivatives of the KL by the weights."""
    q, p, gap, q_total, p_total = _shares(q_probs, p_probs)
    lacks = p == 0
    missed = (lacks & (q > 0)).any(-1, keepdim=True)
    by_q = (log_ratio(q, p, gap) - torch.where(missed, 0.0, kl)) / q_total
    by_p = torch.where(lacks, 1.0, -gap / torch.where(lacks, 1.0, p)) / p_total
    return torch.where(missed, 0.0, by_q), torch.where(missed, 0.0, by_p)


def _shares(q: Tensor, p: Tensor) -> tuple[Tensor, ...]:
    """Return both probabilities, their difference as it was before the normalisation, and the two totals.

    torch normalises in its constructor, and rounds: the totals differ from 1, and from one another.
    """
    q_total, p_total = q.sum(-1, keepdim=True), p.sum(-1, keepdim=True)
    gap = q - p
    excess = gap.sum(-1, keepdim=True) / q_total
    return q / q_total, p / p_total, (gap - q * excess) / p_total, q_total, p_total


class _Ratios(NamedTuple):
    """q and p of the classes, log p/q up to a constant, and three candidates for that constant, per row."""

    q: Tensor
    p: Tensor
    ratio: Tensor
    mean: Tensor  # of the ratio under q
    log_norm: Tensor  # log E_q[exp(ratio)], which the ratio exceeds log p/q by
    is_small: Tensor  # the KL, which is log_norm - mean, so that the mean is the better known constant


def _ratios(a: Tensor, b: Tensor, series: bool) -> _Ratios:
    """Return the terms of the KL from the log-weights a of q and b of p, in float64.

    The ratio is taken relative to the class that q finds likeliest, so that the ratios of the other classes keep their
    digits where q is nearly certain of one.
    """
    a, b = torch.broadcast_tensors(a, b)
    top, likeliest = a.max(-1, keepdim=True)
    (q, q_total, q_shift), (p, p_total, p_shift) = _softmax(a), _softmax(b)
    ratio = torch.where((a == b) & a.isinf(), 0.0, b - a)
    ratio = ratio - ratio.gather(-1, likeliest)
    if series:
        lost = difference_error(b, a).nan_to_num(0.0, 0.0, 0.0)
        ratio = ratio + (lost - lost.gather(-1, likeliest))
    ratio = torch.where(q == 0, 0.0, ratio)
    q_top, p_top = q.gather(-1, likeliest), p.gather(-1, likeliest)
    underflows = p_top < _TINY
    log_norm = (p_total.log() + (p_shift - b.gather(-1, likeliest))) - (q_total.log() + (q_shift - top))
    of_shares = torch.log(q_top) - torch.log(torch.where(underflows, 1.0, p_top))
    log_norm = torch.where(underflows, log_norm, of_shares)
    mean = (q * ratio).sum(-1, keepdim=True)
    return _Ratios(q, p, ratio, mean, log_norm, log_norm - mean < _SMALL)


def _softmax(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    top = a.amax(-1, keepdim=True)
    shift = torch.where(top.abs() < _NO_SHIFT, 0.0, top)
    weights = torch.exp(a - shift)
    total = weights.sum(-1, keepdim=True)
    return weights / total, total, shift


def _kl_of(r: _Ratios, series: bool) -> Tensor:
    """Return the KL, of classes near and far: q (exp(z) - 1 - z) of z = log p/q, and p - q - q z.

    Where the KL is large, z is known and the terms add up to it. Where it is small, z is known but for the KL itself:
    with z taken from the mean, exp(KL) (1 - Σ_far p) = 1 + Σ_near q (exp(z) - 1 - z) - Σ_far q (1 + z).
    """
    z = r.ratio - torch.where(r.is_small, r.mean, r.log_norm)
    is_near = (z.abs() < 1) & (r.q > 0)
    terms = torch.where(is_near, r.q * e2(z.clamp(-1, 1), series=series), -r.q * (1 + z)).sum(-1, keepdim=True)
    far = torch.where(is_near, 0.0, r.p).sum(-1, keepdim=True)
    small_terms, small_far = torch.where(r.is_small, terms, 0.0), torch.where(r.is_small, far, 0.0)
    return torch.where(r.is_small, torch.log1p(small_terms) - torch.log1p(-small_far), terms + far)


def _logits_kl(given: Given, q_param: Tensor, p_param: Tensor, series: bool) -> Tensor:
    """Return the KL of a pair in which q or p is given by its logits, in float64, with the last dimension kept."""
    a, b = _log_weights(q_param, given.q_is_probs), _log_weights(p_param, given.p_is_probs)
    missed = (b == -torch.inf) & (a > -torch.inf)
    value = _kl_of(_ratios(a, torch.where(missed, a, b), series), series)
    return torch.where(missed.any(-1, keepdim=True), torch.inf, value)


def _logits_partials(given: Given, q_param: Tensor, p_param: Tensor, kl: Tensor, series: bool) -> tuple[Tensor, Tensor]:
    """Return the derivatives of `_logits_kl` by the parameters."""
    a, b = _log_weights(q_param, given.q_is_probs), _log_weights(p_param, given.p_is_probs)
    missed = (b == -torch.inf) & (a > -torch.inf)
    r = _ratios(a, torch.where(missed, a, b), series)
    z = r.ratio - torch.where(r.is_small, r.mean + kl, r.log_norm)
    deviation, lacks = r.mean - r.ratio, r.q == 0
    if given.q_is_probs:
        by_a = torch.where(lacks & ~(r.p == 0), -_BOUND, deviation) / a.exp().sum(-1, keepdim=True)
    else:
        by_a = r.q * deviation
    if given.p_is_probs:
        by_b = torch.where(lacks, 1.0, -torch.expm1(-z)) / b.exp().sum(-1, keepdim=True)
    else:
        by_b = torch.where((z < 1) & ~lacks, r.q * torch.expm1(z.clamp(max=1)), r.p - r.q)
    missed = missed.any(-1, keepdim=True)
    return torch.where(missed, 0.0, by_a), torch.where(missed, 0.0, by_b)


_BOUND = 645.0  # of log q/p where q is 0, as in log_ratio


def _log_weights(param: Tensor, is_probs: bool) -> Tensor:
    """Return the logarithms, -inf of 0, where the derivative is 0."""
    if not is_probs:
        return param
    return torch.where(param == 0, -torch.inf, torch.where(param == 0, 1.0, param).log())


def _recorded(formula: Formula, partials: Partials) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the traceable form of the formula, for `torch.func` and `torch.compile`."""

    def derivatives(needs: Sequence[bool], q_param: Tensor, p_param: Tensor) -> Sequence[Tensor | None]:
        q, p, series = q_param.double(), p_param.double(), has_float64(q_param, p_param)
        by = partials(q, p, formula(q, p, series), series)
        return tuple(d if need else None for d, need in zip(by, needs, strict=True))

    @custom_gradient(derivatives)
    def kl(q_param: Tensor, p_param: Tensor) -> Tensor:
        series = has_float64(q_param, p_param)
        return formula(q_param.double(), p_param.double(), series).to(common_dtype(q_param, p_param))

    return kl


_RECORDED = {
    given: _recorded(_probs_kl, _probs_partials)
    if all(given)
    else _recorded(partial(_logits_kl, given), partial(_logits_partials, given))
    for given in GIVEN
    if any(given)
}
