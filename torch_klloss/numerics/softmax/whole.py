"""The KL of the softmax of logits in float64, on whole tensors by few operations: for small ones on an accelerator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_klloss.numerics.blocks import Derivatives
from torch_klloss.numerics.elementary import horner, product, replaced

_MISSING = -1e30  # the logit that stands for -inf
_NEAR_SQUARE = 1e-6  # of log p/q: a class so near takes the series of exp(z) - 1 - z
_SERIES = (1 / 2, 1 / 6, 1 / 24)
_SMALL = 1e-9  # a KL, which logarithms give six digits of, and whose square does not count


def kernel(needs: Sequence[bool], q: Tensor, p: Tensor) -> tuple[Tensor, Derivatives]:
    """Return Σ q (exp z - 1 - z) with z = log p/q, and its derivatives by the logits.

    z is the gap of the logits less the one of the log-normalisers, whose rounding a large KL does not feel. Where the
    KL is small the mean of z, which is -KL, is taken off as well: nothing is left that rounds to more than the gaps.
    """
    q_logits, p_logits = (t.double().clamp_min(_MISSING) for t in (q, p))
    log_q, log_p = torch.log_softmax(q_logits, -1), torch.log_softmax(p_logits, -1)
    q, p, gaps = log_q.exp(), log_p.exp(), p_logits - q_logits
    z = gaps - (q * (gaps + (log_q - log_p))).sum(-1, keepdim=True)
    mean = (q * z).sum(-1, keepdim=True)
    taken_off = torch.threshold(mean, -_SMALL, 0.0)
    z, difference = z - taken_off, p - q
    square = z * z
    near = q * square * horner(z, _SERIES)
    terms = torch.where(square < _NEAR_SQUARE, near, torch.addcmul(difference, q, z, value=-1))
    value, missed = terms.sum(-1), gaps.amin(-1) < _MISSING / 2
    by_q = by_p = None
    if needs[0]:
        by_q = replaced(product(q, z - (mean - taken_off), times=-1), missed.unsqueeze(-1), 0.0)
    if needs[1]:  # the largest class gets the rounding of 1 back
        excess = difference.sum(-1, keepdim=True)
        by_p = replaced(torch.addcmul(difference, q, excess, value=-1), missed.unsqueeze(-1), 0.0)
    return replaced(value, missed, torch.inf), (by_q, by_p)
