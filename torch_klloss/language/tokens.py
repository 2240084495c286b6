"""Which tokens count, which sequence each belongs to, and the mean or sum over them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from torch_klloss.numerics.arguments import check_number, check_word
from torch_klloss.numerics.tracing import is_traced

TokenReduction: TypeAlias = Literal["token_mean", "sequence_mean", "sequence_sum", "sum", "none"]

Normalizer: TypeAlias = Tensor | float | int


@dataclass(frozen=True)
class Tokens:
    """The tokens of a batch.

    Attributes:
        shape: `[*tokens]`; the last dimension is time, where the sequences are not packed.
        weights: their weights, of that shape; None if all count alike.
        keep: whether a token counts, of that shape; None if all do.
        sequence: for packed sequences, the number of the sequence of every token.
        num_sequences: how many packed sequences there are.
        shift: how many tokens at the end of every sequence are left out, though their logits are there.
    """

    shape: torch.Size
    weights: Tensor | None = None
    keep: Tensor | None = None
    sequence: Tensor | None = None
    num_sequences: int = 0
    shift: int = 0

    def weighted(self, values: Tensor) -> Tensor:
        """Return the values times their weights; 0 where a token does not count."""
        if self.weights is None or self.keep is None:
            return values
        return torch.where(self.keep, values * self.weights.to(values.dtype), 0.0)

    def reduce(self, values: Tensor, reduction: TokenReduction, normalizer: Normalizer | None) -> Tensor:
        """Return the reduced values `[*tokens]`.

        Raises:
            ValueError: if the reduction divides by a number of tokens or sequences, and there is none.
        """
        terms = self.weighted(values)
        if reduction == "none":
            return self.without_ends(terms)
        if reduction == "sum":
            return terms.sum()
        if reduction == "token_mean":
            total, count = terms.sum(), self._count(values)
        else:
            each, counts = self.by_sequence(terms), self.by_sequence(self._ones(values))
            is_there = counts > 0
            if reduction == "sequence_mean":
                each = torch.where(is_there, each / torch.where(is_there, counts, 1.0), 0.0)
            total, count = each.sum(), is_there.to(values.dtype).sum()
        if normalizer is not None:
            return total / normalizer
        return total / _checked_count(count)

    def shares(self, values: Tensor, reduction: TokenReduction) -> tuple[Tensor, Tensor]:
        """Return the factors of the values in the numerator of a reduction, and the denominator's parts by sequence.

        The numerator is the sum of factors · values, and the denominator that of the parts; "none" counts as
        "token_mean", and "sum" divides by nothing.
        """
        weights = self.weighted(torch.ones_like(values, requires_grad=False))
        counts = self.by_sequence(weights)
        if reduction in ("token_mean", "none"):
            return weights, counts
        if reduction == "sequence_mean":
            own = counts.unsqueeze(-1) if self.sequence is None else counts[self.sequence]
            weights = torch.where(own > 0, weights / torch.where(own > 0, own, 1.0), 0.0)
        return weights, (counts > 0).to(values.dtype)

    def without_ends(self, values: Tensor) -> Tensor:
        """Return `[*tokens]` without the tokens at the end of every sequence that were left out."""
        if not self.shift:
            return values
        if self.sequence is None:
            return values[..., : -self.shift]
        is_last = torch.ones_like(self.sequence, dtype=torch.bool)
        is_last[:-1] = self.sequence[1:] != self.sequence[:-1]
        order = torch.argsort(is_last.to(torch.uint8), stable=True)  # nonzero would wait for the device
        return values[order[: len(values) - self.num_sequences]]

    def _ones(self, like: Tensor) -> Tensor:
        if self.weights is None:
            return torch.ones_like(like, requires_grad=False)
        return self.weights.to(like.dtype)

    def _count(self, values: Tensor) -> Tensor:
        return self._ones(values.detach()).sum()

    def by_sequence(self, values: Tensor) -> Tensor:
        """Return the sums of values `[*tokens]` over the tokens of every sequence."""
        if self.sequence is None:
            return values.sum(-1) if values.dim() else values
        return values.new_zeros(self.num_sequences).index_add(0, self.sequence, values)


def _checked_count(count: Tensor) -> Tensor:
    """Return the denominator; NaN for zero where it cannot be looked at."""
    if is_readable(count) and not bool(count > 0):
        raise ValueError(
            "no token of the batch is valid, so there is nothing to divide by: pass normalizer= (the number of tokens "
            "or sequences of the whole step) or take reduction='sum', which give a zero with zero gradients."
        )
    return torch.where(count > 0, count, torch.nan)


def is_readable(t: Tensor) -> bool:
    """Return whether a number may be looked at: on the CPU and in eager mode, where nothing has to wait for it."""
    return t.is_cpu and not is_traced()


def tokens_of(
    shape: torch.Size,
    device: torch.device,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    shift: int = 0,
    boundaries: Tensor | None = None,
    num_classes: int | None = None,
) -> Tokens:
    """Return the tokens that labels and a mask leave.

    Args:
        shape: `[*tokens]` of the logits.
        device: their device.
        labels: token ids, `[*tokens]`; those equal to `ignore_index` do not count.
        mask: bool or weights, `[*tokens]`.
        ignore_index: the label that does not count.
        shift: 1 if the logits at a place are those of the next token: the label and the mask of a sequence then begin
            one later, and its last logits are left out.
        boundaries: of packed sequences, cumulative lengths from 0 to the number of tokens.
        num_classes: the size of the vocabulary, for the check of the labels.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or shape, or out of range.
    """
    tokens = Tokens(shape)
    if boundaries is not None:
        tokens = _packed(tokens, boundaries, device)
    weights = _weights(shape, labels, mask, ignore_index, num_classes)
    if shift:
        tokens = replace(tokens, shift=shift)
        if not shape:
            raise ValueError("shift needs logits with a dimension of time, [*tokens, vocabulary], got a single token.")
        weights = _shifted(tokens, _all_true(shape, device) if weights is None else weights)
    if weights is None:
        return tokens
    return replace(tokens, weights=weights, keep=weights != 0)


def _all_true(shape: torch.Size, device: torch.device) -> Tensor:
    return torch.ones(shape, dtype=torch.bool, device=device)


def _shifted(tokens: Tokens, weights: Tensor) -> Tensor:
    """Return the weights of the next token of the same sequence; 0 for the last one."""
    weights = torch.nn.functional.pad(weights[..., 1:], (0, 1))
    if tokens.sequence is None:
        return weights
    follows = torch.nn.functional.pad(tokens.sequence[1:] == tokens.sequence[:-1], (0, 1))
    return torch.where(follows, weights, torch.zeros_like(weights))


def _packed(tokens: Tokens, boundaries: Tensor, device: torch.device) -> Tokens:
    if not isinstance(boundaries, Tensor) or boundaries.is_floating_point() or boundaries.dim() != 1:
        raise TypeError(
            "boundaries must be a one-dimensional tensor of integers, the cumulative lengths of the packed sequences, "
            f"got {boundaries!r}."
        )
    if len(tokens.shape) != 1:
        raise ValueError(
            f"boundaries belong to packed sequences, whose logits are [tokens, vocabulary], got {len(tokens.shape)} "
            "dimensions of tokens; [batch, time, vocabulary] needs none."
        )
    if is_readable(boundaries):
        ends = boundaries.tolist()
        is_rising = all(a < b for a, b in pairwise(ends))
        if len(ends) < 2 or ends[0] != 0 or ends[-1] != tokens.shape[0] or not is_rising:
            raise ValueError(
                f"boundaries must rise from 0 to the number of tokens, {tokens.shape[0]}, got {ends}: cu_seqlens of "
                "the packed batch."
            )
    place = torch.arange(tokens.shape[0], device=device)
    sequence = torch.searchsorted(boundaries.to(device), place, right=True) - 1
    return replace(tokens, sequence=sequence, num_sequences=len(boundaries) - 1)


def _weights(
    shape: torch.Size, labels: Tensor | None, mask: Tensor | None, ignore_index: int, num_classes: int | None
) -> Tensor | None:
    weights = None
    if mask is not None:
        weights = check_mask(mask, shape)
    if labels is not None:
        is_valid = check_ids("labels", labels, shape, num_classes, ignore_index) != ignore_index
        weights = is_valid if weights is None else torch.where(is_valid, weights, torch.zeros_like(weights))
    return weights


def check_mask(mask: Any, shape: torch.Size) -> Tensor:
    """Return the mask, bool or of weights of at least 0, of the shape of the tokens."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, bool or of weights, got {type(mask).__name__}.")
    if mask.shape != shape:
        raise ValueError(
            f"mask must have the shape of the tokens {tuple(shape)}, got {tuple(mask.shape)}; it says which tokens "
            "count, and is expanded on purpose: mask.expand(...)."
        )
    if mask.dtype is not torch.bool and is_readable(mask) and not bool((mask >= 0).all()):
        raise ValueError(f"mask must be bool or weights of at least 0, got a smallest weight of {mask.min().item():g}.")
    return mask.detach()


def check_ids(
    name: str, ids: Any, shape: torch.Size, num_classes: int | None, ignore_index: int | None = None
) -> Tensor:
    """Return token ids of the shape of the tokens, within the vocabulary."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name} must be a tensor of token ids, integers, got {got}.")
    if ids.shape != shape:
        raise ValueError(f"{name} must have the shape of the tokens {tuple(shape)}, got {tuple(ids.shape)}.")
    if num_classes is not None and ids.numel() and is_readable(ids):
        is_out = (ids < 0) | (ids >= num_classes)
        if ignore_index is not None:
            is_out &= ids != ignore_index
        if bool(is_out.any()):
            known = "" if ignore_index is None else f", or {ignore_index} for a token that does not count"
            raise ValueError(
                f"{name} must be ids of the vocabulary, 0 to {num_classes - 1}{known}, got "
                f"{ids[is_out].flatten()[0].item()}."
            )
    return ids


def check_token_reduction(reduction: object, normalizer: Any = None) -> None:
    """Raise unless the reduction is one of the words, and the normalizer fits to it."""
    check_word("reduction", reduction, TokenReduction)
    if normalizer is None:
        return
    if reduction in ("sum", "none"):
        raise ValueError(
            f"normalizer replaces the denominator of a mean, and reduction={reduction!r} has none: take 'token_mean', "
            "'sequence_mean' or 'sequence_sum'."
        )
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0 and normalizer.numel() != 1:
            raise ValueError(f"normalizer must be one number, got a tensor of shape {tuple(normalizer.shape)}.")
        if is_readable(normalizer) and not bool((normalizer > 0).all()):
            raise ValueError(f"normalizer must be above 0, got {normalizer.item():g}.")
        return
    check_number("normalizer", normalizer)
    if not normalizer > 0:
        raise ValueError(f"normalizer must be above 0, got {normalizer!r}.")
