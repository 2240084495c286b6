"""The KL of every token's distribution, and log-probabilities of given tokens, from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_klloss.language.logits import Logits, OneSide, check_temperature, reduces_of, side_of, sides_of
from torch_klloss.language.tokens import check_ids, check_mask
from torch_klloss.numerics.softmax.divergence import divergence_of_logits
from torch_klloss.numerics.softmax.pairs import KL
from torch_klloss.numerics.softmax.picked import picked_log_weights
from torch_klloss.numerics.tracing import without_autocast


def token_kl(
    q_logits: Logits,
    p_logits: Logits,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Return KL(softmax(q/T)‖softmax(p/T)) of every token, in nats: exact in value and in both gradients.

    Beside the gradients it takes a few percent of the memory of the logits, and it computes in at least float32. A
    column where both logits are -inf drops out; where p's alone is, and q has mass, the KL is inf, with gradients of 0.

    Args:
        q_logits: logits of q, `[*tokens, vocabulary]`: a tensor, a `LinearHead` or `VocabShards`.
        p_logits: logits of p, of the same tokens.
        temperature: T, above 0.
        mask: bool or weights of at least 0, `[*tokens]`. A token of weight zero gives 0 and is not computed, even if
            its logits are NaN; others are multiplied by their weight.
        vocab_size: how many columns are real; both sides are cut to it.

    Returns:
        The KL of every token, `[*tokens]`; float32 for half-precision logits.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if the vocabularies, the tokens or the mask differ in shape, or there is no token.

    Examples:
        >>> import torch
        >>> from torch_klloss.language import token_kl
        >>> q, p = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 1.0]])
        >>> token_kl(q, p)
        tensor([0.1201, 0.0000])
    """
    check_temperature(temperature)
    sides = sides_of(("q_logits", "p_logits"), q_logits, p_logits, vocab_size)
    weights = None if mask is None else check_mask(mask, sides.q.shape[:-1])
    keep = None if weights is None else weights != 0
    with without_autocast(sides.q.tensors[0].device):
        guess = None
        if sides.takes_guess:
            guess = torch.ones(sides.q.shape[:-1], device="cpu") if weights is None else weights
        value = divergence_of_logits(
            sides.q, sides.p, KL, temperature=temperature, keep=keep, guess=guess, **sides.reduces
        )
    if weights is None or weights.dtype is torch.bool or keep is None:
        return value
    return torch.where(keep, value * weights.to(value.dtype), 0.0)


def log_probs_of(logits: Logits, tokens: Tensor, *, temperature: float = 1.0, ignore_index: int = -100) -> Tensor:
    """Return the log-probabilities of given tokens under softmax(logits/T), in nats.

    It is what `kl_from_log_probs` takes. One number a token is kept for the gradient, where `log_softmax` and `gather`
    keep as many as there are logits.

    Args:
        logits: `[*tokens, vocabulary]`: a tensor, a `LinearHead` or `VocabShards`.
        tokens: token ids, `[*tokens]`.
        temperature: T, above 0.
        ignore_index: an id whose token gives 0, with a gradient of 0, even if its logits are NaN.

    Returns:
        The log-probabilities, `[*tokens]`; float32 for half-precision logits.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if the shapes differ, there is no token, or an id is out of range (on the CPU and in eager mode;
            elsewhere its log-probability is NaN).

    Examples:
        >>> import torch
        >>> from torch_klloss.language import log_probs_of
        >>> log_probs_of(torch.zeros(2, 4), torch.tensor([3, -100]))
        tensor([-1.3863,  0.0000])
    """
    check_temperature(temperature)
    return log_probs(side_of("logits", logits), tokens, temperature, ignore_index)


def log_probs(one: OneSide, tokens: Tensor, temperature: float, ignore_index: int | None) -> Tensor:
    """Return the log-probabilities of tokens on a checked side, as `log_probs_of`."""
    ids = check_ids("tokens", tokens, one.side.shape[:-1], one.num_classes, ignore_index)
    keep = None if ignore_index is None else ids != ignore_index
    with without_autocast(one.device):
        picked = picked_log_weights(
            one.side, ids.unsqueeze(-1), is_rest=False, temperature=temperature, start=one.start, keep=keep,
            **reduces_of(one.shards),
        )  # fmt: skip
    value = (picked[..., 0] - picked[..., 1]).to(torch.promote_types(one.side.dtype, torch.float32))
    is_out = (ids < 0) | (ids >= one.num_classes)
    if keep is None:
        return torch.where(is_out, torch.nan, value)
    return torch.where(keep, torch.where(is_out, torch.nan, value), 0.0)
