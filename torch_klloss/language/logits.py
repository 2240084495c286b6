"""What can stand in for logits: a head that is applied a few tokens at a time, and a shard of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, distributed

from torch_klloss.numerics.arguments import check_integer, check_tensors
from torch_klloss.numerics.softmax.sides import Dense, Head, Side
from torch_klloss.numerics.tracing import is_traced


@dataclass(frozen=True, eq=False)
class LinearHead:
    """The logits hidden · weightᵀ + bias, in place of their tensor, which then never exists as a whole.

    The loss multiplies a few tokens at a time, and on the CPU takes the gradients beside the values. If the gradient
    that comes is no multiple of the one that was expected, as where tokens are weighted afterwards, and on an
    accelerator, it multiplies again in the backward pass. Gradients go to all three tensors; those of the weight and
    the bias are added up in at least float32, so that their rounding does not depend on how many tokens are taken at a
    time. A second derivative is taken through the whole logits.

    Args:
        hidden: the hidden states, `[*tokens, hidden]`.
        weight: the weight of the head, `[vocabulary, hidden]`, as `nn.Linear` has it.
        bias: its bias, `[vocabulary]`, or None.

    Raises:
        TypeError: if one of them is not a floating-point tensor.
        ValueError: if their shapes do not fit.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch_klloss.language import DistillationLoss, LinearHead
        >>> head, hidden, teacher = nn.Linear(16, 1000), torch.randn(4, 32, 16), torch.randn(4, 32, 1000)
        >>> loss = DistillationLoss()(student=LinearHead(hidden, head.weight, head.bias), teacher=teacher)
        >>> torch.allclose(loss, DistillationLoss()(student=head(hidden), teacher=teacher))
        True
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        tensors = {"hidden": self.hidden, "weight": self.weight}
        tensors |= {} if self.bias is None else {"bias": self.bias}
        check_tensors(**tensors)
        for name, t in tensors.items():
            _check_floating(name, t)
        if self.weight.dim() != 2 or self.hidden.dim() < 1 or self.hidden.shape[-1] != self.weight.shape[-1]:
            raise ValueError(
                "LinearHead needs hidden [*tokens, hidden] and a weight [vocabulary, hidden], got "
                f"{tuple(self.hidden.shape)} and {tuple(self.weight.shape)}; nn.Linear(hidden, vocabulary).weight has "
                "that shape."
            )
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"bias must have the shape [vocabulary] {tuple(self.weight.shape[:1])}, got {tuple(self.bias.shape)}."
            )


@dataclass(frozen=True, eq=False)
class VocabShards:
    """This process's columns of the vocabulary, in place of whole logits.

    Both sides of a loss are shards, of the same columns. Every process gets the value of the whole vocabulary, and the
    gradient of its own columns, counted once: a loss is not to be divided by the number of shards. `torch.compile`
    leaves what is computed of shards out of its graph.

    Args:
        logits: `[*tokens, columns]`.
        start: the index of the first column in the vocabulary.
        group: the processes that hold the vocabulary; by default all of them, or this one alone where
            `torch.distributed` is not initialised.

    Raises:
        TypeError: if the logits are not a floating-point tensor.
        ValueError: if `start` is not an integer of at least 0; in a loss, if shards overlap or leave a gap.

    Examples:
        >>> import torch
        >>> from torch_klloss.language import VocabShards, token_kl
        >>> q, p = torch.randn(3, 50), torch.randn(3, 50)
        >>> torch.equal(token_kl(VocabShards(q, 0), VocabShards(p, 0)), token_kl(q, p))
        True
    """

    logits: Tensor
    start: int
    group: Any = None

    def __post_init__(self) -> None:
        check_tensors(logits=self.logits)
        _check_floating("logits", self.logits)
        check_integer("start", self.start, at_least=0)

    @property
    def is_alone(self) -> bool:
        """Whether this process holds the whole vocabulary."""
        return not (distributed.is_available() and distributed.is_initialized())

    def total(self, t: Tensor) -> Tensor:
        """Return the sum of a tensor over the shards."""
        return self._reduced(t, "SUM")

    def largest(self, t: Tensor) -> Tensor:
        """Return the maximum of a tensor over the shards."""
        return self._reduced(t, "MAX")

    def _reduced(self, t: Tensor, operation: str) -> Tensor:
        if self.is_alone:
            return t
        t = t.clone()
        distributed.all_reduce(t, getattr(distributed.ReduceOp, operation), group=self.group)
        return t

    def vocabulary(self) -> int:
        """Return the size of the vocabulary, after a look at the columns of all shards.

        Raises:
            ValueError: if they overlap or leave a gap.
        """
        width = self.logits.shape[-1]
        if self.is_alone:
            ranges = [(self.start, width)]
        else:
            ranges = [(0, 0)] * distributed.get_world_size(self.group)
            distributed.all_gather_object(ranges, (self.start, width), group=self.group)
        end = 0
        for start, width in sorted(ranges):
            if start != end:
                what = "overlap" if start < end else "leave a gap"
                raise ValueError(
                    f"the shards must follow one another from column 0 on, but they {what}: one begins at {start} "
                    f"where the one before ends at {end}. Give VocabShards(logits, start) the index of this process's "
                    "first column."
                )
            end = start + width
        return end


Logits: TypeAlias = Tensor | LinearHead | VocabShards


class Sides(NamedTuple):
    """Two checked sides, of the same classes, and what their shards need.

    Attributes:
        q, p: the sides.
        num_classes: the size of the vocabulary.
        shards: one of them, if they are shards.
    """

    q: Side
    p: Side
    num_classes: int
    shards: VocabShards | None = None

    @property
    def reduces(self) -> dict[str, Any]:
        """The sums over shards that the numerics need."""
        return reduces_of(self.shards)

    @property
    def takes_guess(self) -> bool:
        """Whether a guess of the gradient is of use: for a head, on the CPU and outside of a graph."""
        return self.q.tensors[0].is_cpu and not is_traced() and any(isinstance(s, Head) for s in (self.q, self.p))


def reduces_of(shards: VocabShards | None) -> dict[str, Any]:
    """Return the sums over shards that the numerics need; none for whole logits."""
    return {} if shards is None or shards.is_alone else {"total": shards.total, "largest": shards.largest}


class OneSide(NamedTuple):
    """One checked side.

    Attributes:
        side: its logits.
        num_classes: the size of the vocabulary.
        start: the first column of a shard.
        shards: the shards that it is one of.
    """

    side: Side
    num_classes: int
    start: int = 0
    shards: VocabShards | None = None

    @property
    def device(self) -> torch.device:
        """The device of the logits."""
        return self.side.tensors[0].device


def side_of(name: str, logits: object, vocab_size: int | None = None) -> OneSide:
    """Return logits as a side of the numerics, cut to the first `vocab_size` columns.

    Raises:
        TypeError: if they are none of the kinds of logits, or not of floating point.
        ValueError: if they hold no token, or fewer columns than `vocab_size`.
    """
    if isinstance(logits, LinearHead):
        found = OneSide(Head(logits.hidden, logits.weight, logits.bias), logits.weight.shape[0])
    elif isinstance(logits, VocabShards):
        is_read = logits.logits.is_cpu and not is_traced()
        num_classes = logits.vocabulary() if is_read or logits.is_alone else 2**62
        found = OneSide(Dense(logits.logits), num_classes, logits.start, logits)
    elif isinstance(logits, Tensor):
        _check_floating(name, logits)
        if logits.dim() == 0:
            raise ValueError(f"{name} must be logits [*tokens, vocabulary], got a scalar.")
        found = OneSide(Dense(logits), logits.shape[-1])
    else:
        raise TypeError(
            f"{name} must be logits, a floating-point tensor [*tokens, vocabulary], a LinearHead or VocabShards, got "
            f"{type(logits).__name__}."
        )
    if found.side.shape[:-1].numel() == 0:
        raise ValueError(
            f"{name} must hold at least one token, got logits of shape {tuple(found.side.shape)}; skip empty batches."
        )
    return found if vocab_size is None else _cut(name, found, vocab_size)


def _cut(name: str, found: OneSide, vocab_size: int) -> OneSide:
    check_integer("vocab_size", vocab_size)
    if vocab_size > found.num_classes and found.num_classes < 2**62:
        raise ValueError(
            f"vocab_size must be at most the number of columns of {name}, which is {found.num_classes}, got "
            f"{vocab_size}: it says how many of the columns are real."
        )
    width = found.side.shape[-1]
    columns = width if found.shards is None else max(0, min(width, vocab_size - found.start))
    columns = min(columns, vocab_size)
    return found._replace(side=found.side.cut(columns), num_classes=vocab_size)


def sides_of(names: tuple[str, str], q: object, p: object, vocab_size: int | None = None) -> Sides:
    """Return two checked sides of the same tokens and vocabulary.

    Raises:
        TypeError, ValueError: as `side_of`; if the two differ in tokens or vocabulary, or one alone is a shard.
    """
    first, second = side_of(names[0], q, vocab_size), side_of(names[1], p, vocab_size)
    if (first.shards is None) != (second.shards is None):
        raise ValueError(
            f"{names[0]} and {names[1]} must both be VocabShards or neither, got {type(q).__name__} and "
            f"{type(p).__name__}: a process needs the same columns of both."
        )
    if first.num_classes != second.num_classes:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same vocabulary, got {first.num_classes} and "
            f"{second.num_classes} columns. If the first {min(first.num_classes, second.num_classes)} are the real "
            "tokens of both, say vocab_size=: both are cut to it; padding of the vocabulary is no token."
        )
    if first.side.shape[:-1] != second.side.shape[:-1]:
        raise ValueError(
            f"{names[0]} and {names[1]} must be of the same tokens, got {tuple(first.side.shape[:-1])} and "
            f"{tuple(second.side.shape[:-1])}."
        )
    if first.shards is not None and (first.start, first.side.shape[-1]) != (second.start, second.side.shape[-1]):
        raise ValueError(
            f"the shards of {names[0]} and {names[1]} must be the same columns, got {first.side.shape[-1]} from "
            f"{first.start} on and {second.side.shape[-1]} from {second.start} on."
        )
    return Sides(first.side, second.side, first.num_classes, first.shards)


def check_temperature(temperature: Any) -> None:
    """Raise unless the temperature is a number above 0."""
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature must be a number, got {temperature!r}.")
    if not 0 < temperature < float("inf"):
        raise ValueError(
            f"temperature must be above 0 and finite, got {temperature!r}: logits are divided by it. The limit of 0 is "
            "a choice of the likeliest token, which has no KL."
        )


def _check_floating(name: str, t: Tensor) -> None:
    if not t.is_floating_point():
        raise TypeError(
            f"{name} must be of floating point, got {t.dtype}: pass the model's logits, not token ids or a mask."
        )
