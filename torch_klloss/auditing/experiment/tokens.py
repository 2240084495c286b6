"""Probes of the token distributions of language models: logits `[batch, time, vocabulary]` with a mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from torch_klloss.auditing.experiment.probes import Categoricals, Layout, Shape

# All sizes of a probe differ, and the lengths of its sequences.
TOKEN_SHAPES: tuple[Shape, ...] = (
    *((4, 6, 10), (3, 5, 12), (6, 4, 13), (2, 7, 11), (5, 3, 14), (8, 5, 9), (3, 8, 15), (7, 6, 8)),
    *((5, 7, 9), (3, 6, 13), (4, 3, 12), (2, 5, 14), (6, 8, 10), (9, 4, 11), (5, 6, 8), (4, 7, 14)),
)
TOKEN_SCALES = (0.5, 1.0, 1.8, 4.0)  # of the scores: the last one's rare tokens are as rare as those of a vocabulary
Shares = Callable[[Tensor, int], Tensor]
"""A reduction of the tokens: takes a mask `[batch, time]` of ones and zeros and the size of the vocabulary, and returns
the factor of every token in the sum that it is."""


def token_mask(batch: int, time: int) -> Tensor:
    """Return which tokens count, `[batch, time]`: sequences of several lengths, the first of them whole."""
    lengths = torch.tensor([time - (3 * row + row // 2) % time for row in range(batch)])
    return torch.arange(time) < lengths.unsqueeze(-1)


def token_mean(mask: Tensor, vocabulary: int) -> Tensor:
    """Return the shares of the mean over all tokens that count."""
    return mask / mask.sum()


def _shifted_mean(mask: Tensor, vocabulary: int) -> Tensor:
    return torch.nn.functional.pad(mask[:, 1:], (0, 1)) / mask[:, 1:].sum()


TOKEN_CONVENTIONS: Mapping[Shares, str] = {
    token_mean: "the mean over the tokens that count",
    lambda mask, vocabulary: mask: "the sum over the tokens that count",
    lambda mask, vocabulary: mask / mask.sum(-1, keepdim=True) / len(mask): "the mean over the sequences of their "
    "token means",
    lambda mask, vocabulary: mask / len(mask): "the mean over the sequences of their sums",
    _shifted_mean: "the mean over the tokens that count, each with the logits before it",
}
"""What is no mistake, in words."""


@dataclass(frozen=True)
class Tokens(Categoricals):
    """The token distributions of q and p; the probes' examples are their tokens, whatever the layout says."""

    @cached_property
    def by_token(self) -> Layout:
        """The layout whose examples are the tokens."""
        return replace(self.layout, example_dims=2)

    @cached_property
    def keep(self) -> Tensor:
        """Whether a token counts, `[num_tokens]`."""
        return torch.cat([token_mask(*shape[:2]).flatten() for shape in self.layout.shapes])

    def totals(self, values: Tensor, shares: Shares) -> Tensor:
        """Return the sums of shares · values `[num_tokens]` of every probe."""
        factors = [shares(token_mask(*shape[:2]).double(), shape[2]).flatten() for shape in self.layout.shapes]
        sums = values.new_zeros(len(factors))
        return sums.index_add(0, self.by_token.probe_of_example, torch.cat(factors) * values)
