"""Sequences with padding: the masks and lengths of a step, and its numbers with the padding left out or counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from torch_klloss.auditing.experiment.names import words_of
from torch_klloss.auditing.training_step.record import FunctionRecord, NamedValue

_MASK_WORDS = frozenset({"mask", "masks", "pad", "padding", "valid", "keep"})
_OTHER_MASKS = frozenset({"causal", "tril", "triu", "subsequent", "lookahead", "ahead", "future", "dropout", "drop"})
_LENGTH_WORDS = frozenset({"length", "lengths", "len", "lens", "seqlen", "seqlens", "seq_len"})
_TOLERANCE = 1e-4  # relative
MEAN_OF_MEANS = "the mean over the batch of each example's mean over its steps, nats a step"


def mask_of(records: Iterable[FunctionRecord], shape: Sequence[int]) -> Tensor | None:
    """Return which of the steps `[batch, steps]` of a pair of this shape are no padding; None if the step has no mask.

    A mask of padding has zeros at the end, or at the beginning, of its rows; one of the causes of attention, or of
    what is to be predicted, has others.
    """
    if len(shape) < 2:
        return None
    values = [value for record in records for value in record.values if isinstance(value.value, Tensor)]
    found = (mask for value in values for mask in _masks(value, shape[0], shape[1]))
    return next((mask for mask in found if bool(mask.any()) and not bool(mask.all())), None)


def _masks(value: NamedValue, batch: int, steps: int) -> Iterator[Tensor]:
    words, t = set(words_of(value.role)), value.value.detach().cpu()
    if words & _LENGTH_WORDS and t.shape == (batch,) and not t.is_floating_point() and t.dtype is not torch.bool:
        if bool(((t >= 0) & (t <= steps)).all()):
            yield torch.arange(steps) < t[:, None]
    elif (
        words & _MASK_WORDS
        and not words & _OTHER_MASKS
        and t.numel() == batch * steps
        and t.shape[:2] == (batch, steps)
    ):
        t = t.reshape(batch, steps)
        if bool(((t == 0) | (t == 1)).all()):
            mask = t == 1
            changes = (mask[:, 1:] != mask[:, :-1]).sum(1)
            if bool((changes <= 1).all()):
                yield ~mask if words & {"pad", "padding"} and not bool(mask[:, 0].all()) else mask


def masked_totals(elements: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return what a right loss makes of the KL's elements, `[batch, steps, …]`, by the name of its reduction."""
    steps = elements.reshape(*mask.shape, -1).sum(-1) * mask
    lengths = mask.sum(1)
    total = steps.sum()
    return {
        "the mean over the batch": total / len(mask),
        "the sum over the batch": total,
        "a value for each example": steps.sum(1),
        "the mean over the steps that are no padding, nats a step": total / lengths.sum(),
        MEAN_OF_MEANS: _mean_of_means(steps, lengths),
        "a value for each step": steps,
        "a value for each step that is no padding": steps[mask],
        "a value for each element": elements.reshape(*mask.shape, -1) * mask[..., None],
    }


def _mean_of_means(steps: Tensor, lengths: Tensor) -> Tensor:
    return (steps.sum(1) / lengths.clamp(min=1)).mean()


def is_near(value: Tensor, expected: Tensor) -> bool:
    """Return whether a number of the step is what is expected, up to the rounding of float32."""
    flat, wanted = value.detach().double().cpu().reshape(-1), expected.reshape(-1)
    return flat.shape == wanted.shape and torch.allclose(
        flat, wanted, rtol=_TOLERANCE, atol=1e-6 * float(wanted.abs().max())
    )
