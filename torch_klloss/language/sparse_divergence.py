"""Divergences of a student from a teacher that is known at a few tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_klloss.language.divergences import Divergence
from torch_klloss.language.logits import OneSide, reduces_of
from torch_klloss.language.sparse_teacher import SampledTeacher, SparseTeacher
from torch_klloss.language.tokens import check_ids, is_readable
from torch_klloss.numerics.exponentials import expm1
from torch_klloss.numerics.softmax.divergence import divergence_of_logits
from torch_klloss.numerics.softmax.pairs import Terms
from torch_klloss.numerics.softmax.picked import picked_log_weights
from torch_klloss.numerics.softmax.sides import Dense


class Found(NamedTuple):
    """The divergence of every token, and its standard error and degrees of freedom where it was sampled."""

    value: Tensor
    std_error: Tensor | None = None
    dof: Tensor | None = None


METHODS = {"bucket": "bucket", "renormalize": "renormalized", "sampled": "sampled_tail"}


def sparse_divergence(
    student: OneSide, teacher: SparseTeacher, divergence: Divergence, temperature: float, keep: Tensor | None
) -> Found:
    """Return the divergence of every token, as the teacher's `tail` says, in at least float32.

    Raises:
        ValueError: if the tokens, temperatures or ids do not fit, or the teacher's tail makes it no KL.
    """
    _check(student, teacher, divergence, temperature, keep)
    if isinstance(teacher, SampledTeacher):
        return _sampled(student, teacher, temperature, keep)
    picked = picked_log_weights(
        student.side,
        torch.where(teacher.valid, teacher.ids, 0),
        is_rest=teacher.tail == "bucket",
        temperature=temperature,
        start=student.start,
        valid=teacher.valid,
        keep=keep,
        **reduces_of(student.shards),
    )
    known = _known(teacher, picked)
    terms = divergence.terms
    if teacher.tail == "bucket":
        tail = _tail(teacher, known, student.num_classes, terms)
        known = torch.cat((known, tail), -1)
    else:
        picked = picked[..., :-1]
    return Found(divergence_of_logits(Dense(known), Dense(picked), terms, keep=keep))


def _known(teacher: SparseTeacher, like: Tensor) -> Tensor:
    return torch.where(teacher.valid, teacher.log_probs.to(like.dtype), -torch.inf)


def _tail(teacher: SparseTeacher, known: Tensor, num_classes: int, terms: Terms) -> Tensor:
    """Return the logarithm of the teacher's tail mass.

    Where the mass has rounded to nothing, and the divergence would be infinite, it counts as half of its rounding.
    """
    mass = known.logsumexp(-1, keepdim=True).clamp(max=0.0)
    tail = torch.log(-expm1(mass))
    if terms.by_p and terms.p_mix == 1:
        least = torch.tensor(torch.finfo(teacher.log_probs.dtype).eps / 2).log().item()
        tail = torch.where(tail > -torch.inf, tail, least)
    is_whole = teacher.valid.sum(-1, keepdim=True) >= num_classes  # where the sum of all rounds to less than one
    return torch.where(is_whole, -torch.inf, tail)


def _sampled(student: OneSide, teacher: SampledTeacher, temperature: float, keep: Tensor | None) -> Found:
    """Return Σ_head T log(T/S) + τ · mean log(T/S) over the draws from the tail, whose mass is τ."""
    head = teacher.head
    parts = (teacher,) if head is None else (head, teacher)
    ids, valid = (torch.cat([getattr(t, name) for t in parts], -1) for name in ("ids", "valid"))
    picked = picked_log_weights(
        student.side,
        torch.where(valid, ids, 0),
        is_rest=False,
        temperature=temperature,
        start=student.start,
        valid=valid,
        keep=keep,
        **reduces_of(student.shards),
    )
    known = torch.cat([_known(t, picked) for t in parts], -1)
    gaps = torch.where(valid & (known > -torch.inf), known - (picked[..., :-1] - picked[..., -1:]), 0.0)
    if keep is not None:
        gaps = torch.where(keep.unsqueeze(-1), gaps, 0.0)
    size = 0 if head is None else head.ids.shape[-1]
    counts = teacher.counts.to(gaps.dtype)
    number, draws = counts.sum(-1), gaps[..., size:]
    mean = (counts * draws).sum(-1) / number
    spread = (counts * (draws.detach() - mean.detach().unsqueeze(-1)).square()).sum(-1)
    error = (spread / ((number - 1) * number)).sqrt()
    if head is not None:
        known = known[..., :size]
        tail = -expm1(known.logsumexp(-1).clamp(max=0.0))
        mean, error = (known.exp() * gaps[..., :size]).sum(-1) + tail * mean, tail * error
    if keep is not None:
        mean, error = torch.where(keep, mean, 0.0), torch.where(keep, error, 0.0)
    return Found(mean, error, number - 1)


def _check(
    student: OneSide, teacher: SparseTeacher, divergence: Divergence, temperature: float, keep: Tensor | None
) -> None:
    if teacher.tokens != student.side.shape[:-1]:
        raise ValueError(
            f"student and teacher must be of the same tokens, got {tuple(student.side.shape[:-1])} and "
            f"{tuple(teacher.tokens)}."
        )
    if teacher.temperature != temperature:
        raise ValueError(
            f"the teacher's log-probabilities were computed at temperature={teacher.temperature!r}, but the loss has "
            f"temperature={temperature!r}: those of k tokens cannot be brought to another temperature exactly. Compute "
            "them at the loss's, log_softmax(logits / temperature), and say so by SparseTeacher(temperature=...)."
        )
    used = teacher.valid if keep is None else teacher.valid & keep.unsqueeze(-1)
    for t in (teacher,) if getattr(teacher, "head", None) is None else (teacher, teacher.head):  # type: ignore[attr-defined]
        valid = used if t is teacher else t.valid
        check_ids("the teacher's ids", torch.where(valid, t.ids, 0), t.ids.shape, student.num_classes)
    if teacher.tail == "none":
        raise ValueError(_truncated(teacher))
    terms = divergence.terms
    if isinstance(teacher, SampledTeacher) and (terms.by_p or terms.q_mix != 1):
        raise ValueError(
            f"a sampled teacher gives the forward KL alone, got {divergence!r}: the draws of a teacher are weighted by "
            "the teacher, where the other divergences ask for its probability at tokens that the student would say. "
            "Take ForwardKL(), or the teacher's top k with tail='bucket'."
        )
    if isinstance(teacher, SampledTeacher) and is_readable(teacher.counts):
        number = teacher.counts.sum(-1)
        if bool(((number == 0) if keep is None else (number == 0) & keep).any()):
            raise ValueError(
                "a sampled teacher needs at least one draw for every token that counts, got a token without."
            )


def _truncated(teacher: SparseTeacher) -> str:
    """Return why the sum over the top k is refused, with the number that it could fall to."""
    mass = 0.8
    if is_readable(teacher.log_probs):
        mass = (
            torch.where(teacher.valid, teacher.log_probs.detach().double().exp(), 0.0)
            .sum(-1)
            .clamp(max=1)
            .mean()
            .item()
        )
    least = mass * torch.tensor(mass).log().item() if mass > 0 else 0.0
    return (
        "tail='none' is no KL: the sum over the teacher's top k, Σ T log(T/S), falls below 0. Its minimum over "
        f"students is P log P = {least:.4f} nats for a head of mass P = {mass:.4f}, at a student that gives nothing to "
        "all other tokens. Take tail='bucket', a lower bound of the KL, or SparseTeacher.sampled, which is unbiased."
    )
