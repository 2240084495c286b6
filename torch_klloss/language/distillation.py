"""The loss of a student that learns the token distributions of a teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_klloss.estimate import KLEstimate
from torch_klloss.language.divergences import Divergence, ForwardKL
from torch_klloss.language.logits import Logits, check_temperature, side_of, sides_of
from torch_klloss.language.sparse_divergence import METHODS, Found, sparse_divergence
from torch_klloss.language.sparse_teacher import SparseTeacher
from torch_klloss.language.tokens import Normalizer, TokenReduction, Tokens, check_token_reduction, tokens_of
from torch_klloss.language.weight import Weighted
from torch_klloss.numerics.arguments import check_flag, check_integer
from torch_klloss.numerics.softmax.divergence import divergence_of_logits
from torch_klloss.numerics.tracing import without_autocast
from torch_klloss.schedules import Schedule


@dataclass(frozen=True)
class PerToken:
    """The divergence of every token, without weights, and which tokens count."""

    found: Found
    tokens: Tokens
    method: str
    num_classes: int


class DistillationLoss(Weighted):
    """The divergence of a student's token distributions from a teacher's, reduced over the tokens, in nats.

    `loss(student=..., teacher=...)` takes its arguments by name, so that the direction cannot be mistaken. Value and
    gradient, to the student and to the teacher, are exact for logits; `SparseTeacher` says what they are for a teacher
    that is known at a few tokens. Beside the gradients the loss takes a few percent of the memory of the logits.

    Reductions, of every token's divergence D with its weight w, the mask's:

    - "token_mean": Σ w D / Σ w over all tokens.
    - "sequence_mean": the mean over sequences of their token means.
    - "sequence_sum": the mean over sequences of Σ w D: the divergence of sequences, for a given prefix each.
    - "sum": Σ w D.
    - "none": w D, `[*tokens]`.

    A sequence whose tokens all have weight zero is no sequence. A token of weight zero gives a zero and zero gradients
    even where its logits are NaN. Where nothing is valid, "sum" and every reduction with `normalizer` are zero, with a
    gradient of zero; the others raise, and are NaN on an accelerator and under `torch.compile`, which do not wait.

    Args:
        divergence: `ForwardKL()`, `ReverseKL()`, `Jeffreys()`, `JensenShannon()` or `SkewKL()`.
        temperature: T, by which both logits are divided.
        scale_by_temperature: whether the loss is multiplied by T², which keeps the size of the gradients.
        reduction: one of the words above.
        ignore_index: the label of a token that does not count.
        shift: 1 where the logits at a place are those of the *next* token, as in a causal language model with labels
            that are its inputs: the last logits of every sequence and its first label are left out.
        weight: the factor of the loss, a number of at least 0 or a Schedule. The attribute `weight` may be set, and
            `KLAnnealing` sets it.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if an option is unknown or out of range.

    References:
        *Distilling the knowledge in a neural network* (Hinton, Vinyals and Dean, 2015), for T².

    Examples:
        >>> import torch
        >>> from torch_klloss.language import DistillationLoss
        >>> loss = DistillationLoss(temperature=2.0, shift=1)
        >>> student = torch.randn(4, 16, 1000, requires_grad=True)
        >>> labels = torch.randint(1000, (4, 16))
        >>> labels[:, 10:] = -100
        >>> loss(student=student, teacher=torch.randn(4, 16, 1000), labels=labels).backward()
        >>> student.grad[:, 9:].abs().max()
        tensor(0.)
    """

    def __init__(
        self,
        divergence: Divergence | None = None,
        *,
        temperature: float = 1.0,
        scale_by_temperature: bool = True,
        reduction: TokenReduction = "token_mean",
        ignore_index: int = -100,
        shift: int = 0,
        weight: float | Schedule = 1.0,
    ) -> None:
        super().__init__(weight)
        divergence = ForwardKL() if divergence is None else divergence
        if not isinstance(divergence, Divergence):
            raise TypeError(
                f"divergence must be one of torch_klloss.language, such as ForwardKL(), got {divergence!r}."
            )
        check_temperature(temperature)
        check_token_reduction(reduction)
        check_flag("scale_by_temperature", scale_by_temperature)
        check_integer("ignore_index", ignore_index, at_least=None)
        check_integer("shift", shift, at_least=0)
        if shift > 1:
            raise ValueError(
                f"shift must be 0 or 1, got {shift}: the logits at a place are of this token, or the next."
            )
        self.divergence = divergence
        self.temperature = temperature
        self.scale_by_temperature = scale_by_temperature
        self.reduction: TokenReduction = reduction
        self.ignore_index = ignore_index
        self.shift = shift

    def forward(
        self,
        *positional: object,
        student: Logits | None = None,
        teacher: Logits | SparseTeacher | None = None,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        normalizer: Normalizer | None = None,
        vocab_size: int | None = None,
        boundaries: Tensor | None = None,
        step: float | None = None,
    ) -> Tensor:
        """Return the reduced loss.

        Args:
            positional: none; all arguments go by name.
            student: logits `[*tokens, vocabulary]`, usually `[batch, time, vocabulary]`: a tensor, a `LinearHead` or
                `VocabShards`.
            teacher: the same, of the same tokens, or a `SparseTeacher`.
            labels: token ids, `[*tokens]`; those equal to `ignore_index` do not count.
            mask: bool or weights of at least 0, `[*tokens]`. With labels both must count.
            normalizer: replaces the denominator of the first three reductions: the number of tokens or sequences of all
                microbatches and processes of a step.
            vocab_size: how many columns are real; both sides are cut to it.
            boundaries: for packed sequences, whose logits are `[tokens, vocabulary]`: their cumulative lengths, from 0
                to the number of tokens.
            step: the step at which a Schedule of the weight is evaluated.

        Returns:
            A scalar; `[*tokens]` with reduction="none", without the tokens that `shift` leaves out.

        Raises:
            TypeError: if an argument is of the wrong kind, or given without its name.
            ValueError: if shapes or vocabularies differ, an id is out of range, nothing is valid, or the divergence
                cannot be had from the teacher.
        """
        _by_name(positional, student, teacher)
        check_token_reduction(self.reduction, normalizer)
        weight = self.weight_at(step)
        guess = partial(self._guess, normalizer=normalizer, weight=weight)
        result = self.per_token(student, teacher, labels, mask, vocab_size, boundaries, guess)
        return result.tokens.reduce(result.found.value, self.reduction, normalizer) * weight

    if TYPE_CHECKING:  # torch's has no types

        def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...  # noqa: D102

    def estimate(
        self,
        *positional: object,
        student: Logits | None = None,
        teacher: Logits | SparseTeacher | None = None,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        vocab_size: int | None = None,
        boundaries: Tensor | None = None,
    ) -> KLEstimate:
        """Return the divergence of every token, T² included, as a `KLEstimate`, `[*tokens]`.

        It knows no reduction, mask weight or `weight`; tokens that do not count are 0. `method` is "exact", "bucket" (a
        lower bound), "renormalized" or "sampled_tail", which has a standard error.

        Args:
            positional: none; all arguments go by name.
            student: as in `forward`.
            teacher: as in `forward`.
            labels: as in `forward`.
            mask: as in `forward`.
            vocab_size: as in `forward`.
            boundaries: as in `forward`.

        Raises:
            TypeError, ValueError: as `forward`.
        """
        _by_name(positional, student, teacher)
        result = self.per_token(student, teacher, labels, mask, vocab_size, boundaries)
        tokens, found = result.tokens, result.found
        value, error, dof = (None if t is None else tokens.without_ends(t) for t in found)
        assert value is not None
        num_evaluations = result.num_classes
        if isinstance(teacher, SparseTeacher):
            num_evaluations = teacher.ids.shape[-1]
        is_exact = result.method == "exact"
        return KLEstimate(
            value, is_exact, std_error=error, dof=dof, method=result.method, num_evaluations=num_evaluations
        )

    def per_token(
        self,
        student: Any,
        teacher: Any,
        labels: Tensor | None,
        mask: Tensor | None,
        vocab_size: int | None,
        boundaries: Tensor | None,
        guess: Callable[[Tokens], Tensor | None] | None = None,
    ) -> PerToken:
        """Return the divergence of every token, without weights, and the tokens; the arguments are `forward`'s.

        The guess of the gradient that the divergences will get spares a head to be multiplied twice.
        """
        is_sparse = isinstance(teacher, SparseTeacher)
        if is_sparse:
            one = side_of("student", student, vocab_size)
            side, num_classes, device = one.side, one.num_classes, one.device
        else:
            sides = sides_of(("student", "teacher"), student, teacher, vocab_size)
            side, num_classes, device = sides.p, sides.num_classes, sides.q.tensors[0].device
            side = sides.q
        tokens = tokens_of(
            side.shape[:-1], device, labels=labels, mask=mask, ignore_index=self.ignore_index, shift=self.shift,
            boundaries=boundaries, num_classes=num_classes,
        )  # fmt: skip
        with without_autocast(device):
            if is_sparse:
                found = sparse_divergence(one, teacher, self.divergence, self.temperature, tokens.keep)
                method = METHODS[teacher.tail]
            else:
                value = divergence_of_logits(
                    sides.p, sides.q, self.divergence.terms, temperature=self.temperature, keep=tokens.keep,
                    guess=guess(tokens) if guess is not None and sides.takes_guess else None,
                    **sides.reduces,
                )  # fmt: skip
                found, method = Found(value), "exact"
        scale = self.temperature**2 if self.scale_by_temperature else 1.0
        wide = torch.promote_types(side.dtype, torch.float32)
        found = Found(
            found.value.to(wide) * scale if scale != 1 else found.value.to(wide),
            None if found.std_error is None else found.std_error.to(wide) * scale,
            found.dof,
        )
        return PerToken(found, tokens, method, num_classes)

    def _guess(self, tokens: Tokens, normalizer: Normalizer | None, weight: float) -> Tensor | None:
        """Return the gradient that the divergences get from one of 1; None where that is anyone's guess."""
        if self.reduction == "none":
            return None
        shares, counts = tokens.shares(torch.ones(tokens.shape, device="cpu"), self.reduction)
        scale = weight * self.temperature**2 if self.scale_by_temperature else weight
        if self.reduction != "sum":
            shares = shares / (counts.sum() if normalizer is None else normalizer)
        return shares * scale

    def extra_repr(self) -> str:
        """Return the settings, for `repr`."""
        weight = self.schedule if self.schedule is not None else self.weight
        return (
            f"{self.divergence!r}, temperature={self.temperature!r}, "
            f"scale_by_temperature={self.scale_by_temperature!r}, reduction={self.reduction!r}, "
            f"ignore_index={self.ignore_index}, shift={self.shift}, weight={weight!r}"
        )


def _by_name(positional: tuple[object, ...], student: object, teacher: object) -> None:
    if positional or student is None or teacher is None:
        raise TypeError(
            "student and teacher must be given by name, loss(student=student_logits, teacher=teacher_logits), so that "
            "the direction of the KL cannot be mistaken."
        )
