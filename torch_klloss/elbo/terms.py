"""Terms of the VAE loss."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class ELBOTerms(NamedTuple):
    """The loss and its terms, in nats per example; all tensors carry gradients.

    Attributes:
        loss: the number to minimise: reconstruction + beta · kl, with the KL changed by free nats or a capacity.
        reconstruction: the negative log-likelihood, summed over the dimensions of x.
        kl: the true KL, summed over the latent dimensions and over the levels, unchanged by free nats or a capacity.
        kl_per_dimension: its mean over the examples, `[*latent]`, which sums to `kl`; None if the KL does not split.
            With a list of (q, p) pairs, a tuple with one entry a level.
        beta: the weight of the KL.
        kl_per_level: the true KL of every (q, p) pair; a single entry without a hierarchy.
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor
    kl_per_dimension: Tensor | tuple[Tensor | None, ...] | None
    beta: float | Tensor
    kl_per_level: tuple[Tensor, ...]

    def bits_per_dimension(self, num_dimensions: int, levels: int = 1) -> Tensor:
        """Return the negative ELBO, at a weight of one, in bits per dimension of x.

        Args:
            num_dimensions: how many dimensions one x has: 3 · 32 · 32 for CIFAR-10.
            levels: for a density of integers 0 … levels - 1 that were divided by `levels`: 256 for 8-bit pixels scaled
                to [0, 1]. The density of the integers is lower by that factor in every dimension.

        Raises:
            ValueError: if one of them is below 1.

        References:
            *A note on the evaluation of generative models* (Theis, van den Oord and Bethge, 2016), section 3.1.

        Examples:
            >>> import torch
            >>> from torch_klloss import ELBOTerms
            >>> kl, nll = torch.tensor(2.0), torch.tensor(64.0).log() * 8
            >>> terms = ELBOTerms(nll + 4 * kl, nll, kl * 0, None, 4.0, (kl,))
            >>> terms.bits_per_dimension(num_dimensions=8), terms.bits_per_dimension(num_dimensions=8, levels=256)
            (tensor(6.), tensor(14.))
        """
        if num_dimensions < 1 or levels < 1:
            raise ValueError(f"num_dimensions and levels must be at least 1, got {num_dimensions} and {levels}.")
        return (self.reconstruction + self.kl) / (num_dimensions * math.log(2)) + math.log2(levels)
