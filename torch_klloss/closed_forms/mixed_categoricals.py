"""Categorical‖Categorical where one is given by its probabilities and the other by its logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_klloss.distributions.given import GIVEN, Given
from torch_klloss.numerics.custom_gradient import Formula, custom_gradient
from torch_klloss.numerics.error_free import difference_error
from torch_klloss.numerics.exponentials import e2, expm1

_SMALL = 0.1  # a KL; below it the classes where q and p are far apart cannot hold all the mass
_TINY = 1e-290
_NO_SHIFT = 300.0  # up to here exp neither over- nor underflows, and an unshifted logit is exact


class _Ratios(NamedTuple):
    """q and p of the classes, log p/q up to a constant, and three candidates for that constant, per row."""

    q: Tensor
    p: Tensor
    ratio: Tensor
    mean: Tensor  # of the ratio under q
    log_norm: Tensor  # log E_q[exp(ratio)], which the ratio exceeds log p/q by
    is_small: Tensor  # the KL, which is log_norm - mean, so that the mean is the better known constant


def _ratios(a: Tensor, b: Tensor) -> _Ratios:
    """Return the terms of the KL from the log-weights a of q and b of p, in float64.

    The ratio is taken relative to the class that q finds likeliest, so that the ratios of the other classes keep their
    digits where q is nearly certain of one.
    """
    a, b = torch.broadcast_tensors(a, b)
    top, likeliest = a.max(-1, keepdim=True)
    (q, q_total, q_shift), (p, p_total, p_shift) = _softmax(a), _softmax(b)
    ratio = torch.where((a == b) & a.isinf(), 0.0, b - a)
    ratio = ratio - ratio.gather(-1, likeliest)
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


def _kl_of(r: _Ratios) -> Tensor:
    """Return the KL, of classes near and far: q (exp(z) - 1 - z) of z = log p/q, and p - q - q z.

    Where the KL is large, z is known and the terms add up to it. Where it is small, z is known but for the KL itself:
    with z taken from the mean, exp(KL) (1 - Σ_far p) = 1 + Σ_near q (exp(z) - 1 - z) - Σ_far q (1 + z).
    """
    z = r.ratio - torch.where(r.is_small, r.mean, r.log_norm)
    is_near = (z.abs() < 1) & (r.q > 0)
    terms = torch.where(is_near, r.q * e2(z.clamp(-1, 1)), -r.q * (1 + z)).sum(-1, keepdim=True)
    far = torch.where(is_near, 0.0, r.p).sum(-1, keepdim=True)
    small_terms, small_far = torch.where(r.is_small, terms, 0.0), torch.where(r.is_small, far, 0.0)
    return torch.where(r.is_small, torch.log1p(small_terms) - torch.log1p(-small_far), terms + far)


def _value(given: Given, q_param: Tensor, p_param: Tensor) -> Tensor:
    """Return the KL of a pair in which q or p is given by its logits, in float64, with the last dimension kept."""
    a, b = _log_weights(q_param, given.q_is_probs), _log_weights(p_param, given.p_is_probs)
    missed = (b == -torch.inf) & (a > -torch.inf)
    value = _kl_of(_ratios(a, torch.where(missed, a, b)))
    return torch.where(missed.any(-1, keepdim=True), torch.inf, value)


def _slopes(given: Given, q_param: Tensor, p_param: Tensor, kl: Tensor) -> tuple[Tensor, Tensor]:
    """Return the derivatives of `_value` by the parameters."""
    a, b = _log_weights(q_param, given.q_is_probs), _log_weights(p_param, given.p_is_probs)
    missed = (b == -torch.inf) & (a > -torch.inf)
    r = _ratios(a, torch.where(missed, a, b))
    z = r.ratio - torch.where(r.is_small, r.mean + kl, r.log_norm)
    deviation, lacks = r.mean - r.ratio, r.q == 0
    if given.q_is_probs:
        by_a = torch.where(lacks & ~(r.p == 0), -_BOUND, deviation) / a.exp().sum(-1, keepdim=True)
    else:
        by_a = r.q * deviation
    if given.p_is_probs:
        by_b = torch.where(lacks, 1.0, -expm1(-z)) / b.exp().sum(-1, keepdim=True)
    else:
        by_b = torch.where((z < 1) & ~lacks, r.q * expm1(z.clamp(max=1)), r.p - r.q)
    missed = missed.any(-1, keepdim=True)
    return torch.where(missed, 0.0, by_a), torch.where(missed, 0.0, by_b)


_BOUND = 645.0  # of log q/p where q is 0, as in log_ratio


def _log_weights(param: Tensor, is_probs: bool) -> Tensor:
    """Return the logarithms, -inf of 0, where the derivative is 0."""
    if not is_probs:
        return param
    return torch.where(param == 0, -torch.inf, torch.where(param == 0, 1.0, param).log())


def _formula(given: Given) -> Formula:
    def partials(needs: Sequence[bool], q_param: Tensor, p_param: Tensor) -> Sequence[Tensor | None]:
        q, p = q_param.double(), p_param.double()
        by = _slopes(given, q, p, _value(given, q, p))
        return [d if need else None for d, need in zip(by, needs, strict=True)]

    @custom_gradient(partials, event_dims=1)
    def kl(q_param: Tensor, p_param: Tensor) -> Tensor:
        return _value(given, q_param.double(), p_param.double()).squeeze(-1)

    return kl


KL = {given: _formula(given) for given in GIVEN if any(given) and not all(given)}
"""The KL, computed in float64, from the parameters that the two are given by."""
