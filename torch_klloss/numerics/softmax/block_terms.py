"""What is added up over the classes for divergences in blocks, and their derivatives, in the dtype of what comes in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from torch_klloss.numerics.softmax.pairs import Rows, Terms
from torch_klloss.numerics.softmax.strips import Strips
from torch_klloss.numerics.softmax.tiles import Problem

FAR = 1e30  # log p/q of a class that only one of them has; in a mixture:
_FAR_MIXED = 80.0

Work: TypeAlias = "tuple[Tensor | None, ...]"


class Sums(NamedTuple):
    """Sums over the classes.

    Attributes:
        number: how many they are.
        terms: called with x, y, `factor_of` a row, three buffers or Nones, and whether there may be infinite logits, it
            yields the terms of one sum after the other, in the same memory.
    """

    number: int
    terms: Callable[[Tensor, Tensor, Tensor, Work, bool], Iterator[Tensor]]


def first_sums(terms: Terms) -> Sums:
    """Return the sums of both exponentials; for plain KLs also those of b - a under both."""

    def parts(x: Tensor, y: Tensor, factor: Tensor, work: Work, with_gaps: bool) -> Iterator[Tensor]:
        if terms.is_mixed:
            yield torch.exp(x, out=work[0])
            yield torch.exp(y, out=work[1])
            return
        q = torch.exp(x, out=work[0])
        yield q
        first = _ratio(x, y, work[1], with_gaps).mul_(q)
        p = torch.exp(y, out=work[0])
        yield p
        yield first
        if terms.by_p:
            yield _ratio(x, y, work[1], with_gaps).mul_(p)

    return Sums(2 if terms.is_mixed else 4 if terms.by_p else 3, parts)


def _ratio(x: Tensor, y: Tensor, out: Tensor | None, with_gaps: bool) -> Tensor:
    ratio = torch.sub(y, x, out=out)
    return ratio.nan_to_num_(0.0, FAR, -math.inf) if with_gaps else ratio


def second_sums(terms: Terms, *, after_first: bool) -> Sums:
    """Return two sums, with v ∝ m/q: of log v under q, and under p of log p/q - log v, or of 1/v for a single term.

    After the first sums of the same x and y, the buffers hold their exponentials.
    """
    rest, _ = rest_of(terms.q_mix)

    def parts(x: Tensor, y: Tensor, factor: Tensor, work: Work, with_gaps: bool) -> Iterator[Tensor]:
        q, p, out = work
        if not after_first or q is None or p is None:
            q, p = torch.exp(x, out=q), torch.exp(y, out=p)
        mixture = mixed_ratio(x, y, out, with_gaps).exp_().mul_(factor).add_(rest)
        if terms.is_single:
            yield p.div_(mixture)
            yield q.mul_(mixture.log_())
            return
        log = mixture.log_()
        yield q.mul_(log)
        yield mixed_ratio(x, y, q, with_gaps).sub_(log).mul_(p)

    return Sums(2, parts)


def mixed_ratio(x: Tensor, y: Tensor, out: Tensor | None, with_gaps: bool) -> Tensor:
    """Return y - x, within what its exponential can be taken of where one of them is infinite."""
    ratio = torch.sub(y, x, out=out)
    return ratio.nan_to_num_(0.0, _FAR_MIXED, -_FAR_MIXED) if with_gaps else ratio


def rest_of(mix: float) -> tuple[float, float]:
    """Return a power of two next to 1 - mix, and its ratio to that.

    Added to a number of float32, another one would round the same way class after class.
    """
    rest = 2.0 ** round(math.log2(1 - mix))
    return rest, rest / (1 - mix)


# --- the derivatives ----------------------------------------------------------------------------------------------


def write_by_blocks(
    a: Tensor, b: Tensor, index: Tensor | None, rows: Rows, grad: Tensor, problem: Problem, dtype: torch.dtype,
    by_a: Tensor | None, by_b: Tensor | None,
) -> None:  # fmt: skip
    """Write the derivatives of `by_blocks`, given its rows and grad, `[rows, 1]`."""
    form = _mixed_forms if problem.terms.is_mixed else _plain_forms
    write = _write_mixed if problem.terms.is_mixed else _write_plain
    forms, with_gaps = form(rows, grad * problem.scale, problem.terms), bool(rows.q_score.any())
    wanted = [
        (out, [None if f is None else f.to(dtype) for f in form], is_first)
        for out, form, is_first in zip((by_a, by_b), forms, (True, False), strict=True)
        if out is not None
    ]
    num_work = 2 + any(out.dtype != dtype for out, *_ in wanted)
    for strip in Strips(a, b, index, problem.scale, dtype, num_work).within(slice(0, len(grad))):
        for out, factors, is_first in wanted:
            target = out[strip.where]
            into = target if out.dtype == dtype else strip.work[2]
            some = [None if f is None else f[strip.place] for f in factors]
            write(strip.x, strip.y, is_first, some, problem.terms, strip.work, into, with_gaps)
            if into is not target:
                target.copy_(into)


Form: TypeAlias = "tuple[Tensor | None, ...]"


def _plain_forms(rows: Rows, g: Tensor, terms: Terms) -> tuple[Form, Form]:
    """Return α, β and γ of both derivatives: own (α + β (b - a)) + γ other, of unnormalised weights."""
    q_total, p_total, log_norm, by_q, by_p = rows.q_total, rows.p_total, rows.centre, rows.by_q, rows.by_p
    q_mean, p_mean = log_norm - by_q, log_norm + by_p
    q_share, p_share = g / q_total, g / p_total
    first = q_share * (terms.by_q * q_mean + terms.by_p), -terms.by_q * q_share, -terms.by_p * p_share
    second = p_share * (terms.by_q - terms.by_p * p_mean), terms.by_p * p_share, -terms.by_q * q_share
    return (
        (first[0], first[1], first[2] if terms.by_p else None),
        (second[0], second[1] if terms.by_p else None, second[2]),
    )


def _write_plain(
    x: Tensor, y: Tensor, is_first: bool, factors: list[Tensor | None], terms: Terms, work: Work, out: Tensor,
    with_gaps: bool,
) -> None:  # fmt: skip
    own, other = (x, y) if is_first else (y, x)
    alpha, beta, gamma = factors
    assert alpha is not None
    if beta is None:
        torch.exp(own, out=out).mul_(alpha)
    else:
        ratio = _ratio(x, y, work[0], with_gaps)
        torch.exp(own, out=out).mul_(ratio.mul_(beta).add_(alpha))
    if gamma is not None:
        torch.addcmul(out, torch.exp(other, out=work[0]), gamma, out=out)


def _mixed_forms(rows: Rows, g: Tensor, terms: Terms) -> tuple[Form, Form]:
    """Return a factor, α, β and γ of both derivatives: own (α + β log v + γ/v), with v ∝ m/q, or m/p for two terms."""
    # log p/q is off by as much as it was in the means, so that the derivatives add up to zero.
    log_norm, by_q, by_p, share = rows.centre - rows.p_gap, rows.by_q, rows.by_p, rows.q_gap
    q_share, p_share = g / rows.q_total, g / rows.p_total
    _, scale = rest_of(terms.q_mix)
    factor, log_scale = terms.q_mix * scale * torch.exp(-log_norm), math.log(scale)
    if not terms.is_single:
        _, p_scale = rest_of(terms.p_mix)
        q_share, p_share = terms.by_q * q_share, terms.by_p * p_share
        p_factor = terms.p_mix * p_scale * torch.exp(log_norm)
        second = p_factor, p_share * (math.log(p_scale) - by_p), -p_share, None
        return (factor, q_share * (log_scale - by_q), -q_share, None), second
    q_share, p_share = terms.by_q * q_share, terms.by_q * p_share
    rest, mix = 1 - terms.q_mix, terms.q_mix
    mean = by_q - rows.p_gap * mix * share - (1 - mix * share)
    first = factor, q_share * (log_scale - mean), -q_share, -rest * scale * q_share
    return first, (factor, p_share * mix * share, None, -mix * scale * p_share)


def _write_mixed(
    x: Tensor, y: Tensor, is_first: bool, factors: list[Tensor | None], terms: Terms, work: Work, out: Tensor,
    with_gaps: bool,
) -> None:  # fmt: skip
    is_turned = not is_first and not terms.is_single
    factor, alpha, beta, gamma = factors
    assert factor is not None
    assert alpha is not None
    ratio = mixed_ratio(*((y, x) if is_turned else (x, y)), work[0], with_gaps)
    mixture = ratio.exp_().mul_(factor).add_(rest_of(terms.p_mix if is_turned else terms.q_mix)[0])
    result = alpha
    if beta is not None:
        result = torch.log(mixture, out=work[1]).mul_(beta).add_(alpha)
    if gamma is not None:
        result = mixture.reciprocal_().mul_(gamma).add_(result)
    torch.exp(x if is_first else y, out=out).mul_(result)
