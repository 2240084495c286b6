"""A teacher that is known at a few tokens alone: its likeliest ones, or tokens that were drawn from it."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from torch_klloss.language.logits import check_temperature
from torch_klloss.language.tokens import is_readable
from torch_klloss.numerics.arguments import check_tensors, check_word

Tail: TypeAlias = Literal["bucket", "renormalize", "none"]


class SparseTeacher:
    """The k likeliest tokens of a teacher, with their log-probabilities in its full softmax; in place of its logits.

    What the loss compares is chosen by `tail`:

    - "bucket": the k tokens, and all others as one class. It is a lower bound of the full KL in both directions, and
      the full KL at k = V. The student's tail mass is the sum over the other tokens; it is not 1 - Σp, which cancels.
    - "renormalize": the distributions within the k tokens. What the student gives to other tokens costs nothing.
    - "none": the sum over the k tokens alone. This is no KL, and a loss refuses it: it is negative at its minimum,
      which leaves nothing on the tail.

    Args:
        ids: token ids, `[*tokens, k]`; those of one token differ.
        log_probs: their log-probabilities in the teacher's full softmax, in nats, `[*tokens, k]`.
        tail: what becomes of the other tokens.
        temperature: the temperature that the log-probabilities were computed at. A loss of another one refuses them,
            since the probabilities of k tokens do not tell those at another temperature.
        valid: bool, whether an entry is one, for fewer than k tokens, `[*tokens, k]`.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if shapes differ, an option is unknown; on the CPU if ids repeat, or probabilities sum to more than
            one by more than rounding.

    References:
        *Sparse logit sampling: accelerating knowledge distillation in LLMs* (Anshumann et al., 2025), for the bias of
        the top k and for `sampled`.

    Examples:
        >>> import torch
        >>> from torch_klloss.language import DistillationLoss, SparseTeacher, token_kl
        >>> teacher, student = torch.tensor([[3.0, 2.0, 0.0, 0.0]]), torch.tensor([[2.0, 2.0, 1.0, 0.0]])
        >>> log_probs, ids = teacher.log_softmax(-1).topk(2)
        >>> loss = DistillationLoss(reduction="sum")
        >>> token_kl(teacher, student), loss(student=student, teacher=SparseTeacher(ids, log_probs))
        (tensor([0.1816]), tensor(0.1734))
    """

    def __init__(
        self,
        ids: Tensor,
        log_probs: Tensor,
        *,
        tail: Tail = "bucket",
        temperature: float = 1.0,
        valid: Tensor | None = None,
    ) -> None:
        check_word("tail", tail, Tail)
        self._set(ids, log_probs, temperature, valid)
        self.tail: str = tail
        _check_distinct(self.ids, self.valid)
        _check_mass(self.log_probs, self.valid)

    def _set(self, ids: Tensor, log_probs: Tensor, temperature: float, valid: Tensor | None) -> None:
        check_temperature(temperature)
        check_tensors(ids=ids, log_probs=log_probs)
        if ids.is_floating_point() or ids.dtype is torch.bool:
            raise TypeError(f"ids must be token ids, integers, got {ids.dtype}: topk returns (values, indices).")
        if not log_probs.is_floating_point():
            raise TypeError(f"log_probs must be of floating point, got {log_probs.dtype}.")
        if ids.shape != log_probs.shape or ids.dim() == 0 or ids.shape[-1] == 0:
            raise ValueError(
                f"ids and log_probs must have one shape [*tokens, k] with k of at least 1, got {tuple(ids.shape)} and "
                f"{tuple(log_probs.shape)}."
            )
        if valid is not None and (not isinstance(valid, Tensor) or valid.dtype is not torch.bool):
            got = valid.dtype if isinstance(valid, Tensor) else type(valid).__name__
            raise TypeError(f"valid must be a bool tensor, which says which of the k entries there are, got {got}.")
        if valid is not None and valid.shape != ids.shape:
            raise ValueError(f"valid must have the shape of ids {tuple(ids.shape)}, got {tuple(valid.shape)}.")
        self.ids, self.log_probs, self.temperature = ids, log_probs, temperature
        self.valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid

    @classmethod
    def sampled(
        cls,
        ids: Tensor,
        log_probs: Tensor,
        *,
        counts: Tensor | None = None,
        head: SparseTeacher | None = None,
        valid: Tensor | None = None,
        temperature: float = 1.0,
    ) -> SampledTeacher:
        """Return a teacher that is known at tokens that were drawn from it: the forward KL is unbiased.

        Its value is the mean of log T - log S over the draws, and so is its gradient to the student. With a head, the
        likeliest tokens are summed exactly and the draws come from the others alone, which takes most of the noise.

        Args:
            ids: the draws, `[*tokens, n]`, from the teacher; with `head` from its tokens outside of the head.
            log_probs: their log-probabilities in the teacher's **full** softmax.
            counts: how often each was drawn, above 0, `[*tokens, n]`; by default once. With counts, ids need not
                repeat.
            head: the likeliest tokens.
            valid: bool, whether an entry is one.
            temperature: as above.

        Raises:
            TypeError, ValueError: as the class; if counts are not positive, or a draw lies in the head.

        Examples:
            >>> import torch
            >>> from torch_klloss.language import DistillationLoss, SparseTeacher, token_kl
            >>> teacher, student = torch.randn(2000, 100), torch.randn(2000, 100)
            >>> ids = teacher.softmax(-1).multinomial(12, replacement=True)
            >>> drawn = SparseTeacher.sampled(ids, teacher.log_softmax(-1).gather(-1, ids))
            >>> estimate = DistillationLoss().estimate(student=student, teacher=drawn)
            >>> gap, error = (estimate.value - token_kl(teacher, student)).mean(), estimate.std_error.norm() / 2000
            >>> bool(abs(gap) < 6 * error)
            True
        """
        return SampledTeacher(ids, log_probs, counts=counts, head=head, valid=valid, temperature=temperature)

    @property
    def tokens(self) -> torch.Size:
        """The shape of the tokens."""
        return self.ids.shape[:-1]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.ids.shape)}, tail={self.tail!r}, temperature={self.temperature!r})"


class SampledTeacher(SparseTeacher):
    """A teacher that is known at tokens that were drawn from it; made by `SparseTeacher.sampled`."""

    def __init__(
        self,
        ids: Tensor,
        log_probs: Tensor,
        *,
        counts: Tensor | None = None,
        head: SparseTeacher | None = None,
        valid: Tensor | None = None,
        temperature: float = 1.0,
    ) -> None:
        self._set(ids, log_probs, temperature, valid)
        self.tail = "sampled"
        self.counts = _checked_counts(counts, self.ids, self.valid)
        self.head = head
        if head is not None:
            self._check_head(head)

    def _check_head(self, head: Any) -> None:
        if not isinstance(head, SparseTeacher) or isinstance(head, SampledTeacher):
            raise TypeError(f"head must be a SparseTeacher of the likeliest tokens, got {type(head).__name__}.")
        if head.tokens != self.tokens or head.temperature != self.temperature:
            raise ValueError(
                f"head must be of the same tokens and temperature, got {tuple(head.tokens)} at {head.temperature} and "
                f"{tuple(self.tokens)} at {self.temperature}."
            )
        if is_readable(self.ids):
            both = torch.isin(*(_numbered(t.ids, t.valid, sign) for t, sign in ((self, -1), (head, -2))))
            if bool(both.any()):
                raise ValueError(
                    "with head=, ids must be drawn from the teacher's other tokens, but some lie in the head, which is "
                    "summed exactly: they would count twice. Set the head's probabilities to 0 before drawing."
                )


def _numbered(ids: Tensor, valid: Tensor, missing: int) -> Tensor:
    """Return ids that differ from token to token; the missing ones are `missing`."""
    rows = ids.reshape(-1, ids.shape[-1])
    place = torch.arange(len(rows), device=ids.device).unsqueeze(-1)
    return torch.where(valid.reshape(rows.shape), rows + place * 2**32, missing).flatten()


def _checked_counts(counts: Tensor | None, ids: Tensor, valid: Tensor) -> Tensor:
    if counts is None:
        return valid.to(torch.float32)
    if not isinstance(counts, Tensor) or counts.shape != ids.shape:
        got = tuple(counts.shape) if isinstance(counts, Tensor) else type(counts).__name__
        raise ValueError(f"counts must be a tensor of the shape of ids {tuple(ids.shape)}, got {got}.")
    if is_readable(counts) and not bool(((counts > 0) | ~valid).all()):
        raise ValueError(
            f"counts must be above 0, got {counts[~(counts > 0) & valid][0].item():g}: they say how often an id was "
            "drawn; leave out ids that were not, by valid=."
        )
    return torch.where(valid, counts, 0).to(torch.float32)


def _check_distinct(ids: Tensor, valid: Tensor) -> None:
    if not is_readable(ids):
        return
    place = -1 - torch.arange(ids.shape[-1])
    ordered = torch.where(valid, ids, place).sort(-1).values
    if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        raise ValueError(
            "the ids of one token must differ, but some repeat; tokens that were drawn, and may repeat, are "
            "SparseTeacher.sampled(ids, log_probs)."
        )


def _check_mass(log_probs: Tensor, valid: Tensor) -> None:
    """Raise if the probabilities of a token sum to more than one by more than the rounding of their logarithms."""
    if not is_readable(log_probs):
        return
    mass = torch.where(valid, log_probs.detach().double().exp(), 0.0).sum(-1)
    rounding = 4 * torch.finfo(log_probs.dtype).eps * (1 + math.log(log_probs.shape[-1]))
    if mass.numel() and bool((mass > 1 + rounding).any()):
        raise ValueError(
            f"log_probs must be log-probabilities in the teacher's full softmax, whose sum is at most 1, got "
            f"{mass.max().item():.6g}: logits.log_softmax(-1), not logits, before topk."
        )
