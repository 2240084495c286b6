"""Cases of the losses of language models: every divergence and option, kind of logits, teacher and estimator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional

from tests.devices.pairs import Case, numbers
from torch_klloss.language import (
    DistillationLoss,
    ForwardKL,
    Jeffreys,
    JensenShannon,
    LinearHead,
    ReferenceKL,
    ReverseKL,
    SkewKL,
    SparseTeacher,
    VocabShards,
    log_probs_of,
    token_kl,
)
from torch_klloss.language.reference import Estimator
from torch_klloss.language.tokens import TokenReduction

B, T, V, H, K = 2, 4, 9, 3, 5  # batch, time, vocabulary, hidden, tokens of a sparse teacher
MASK = torch.tensor([[True, True, True, False], [True, True, False, False]])
LABELS = torch.tensor([[1, 8, 0, -100], [4, -100, -100, -100]])
TOKENS = torch.tensor([[1, 8, 0, 3], [4, 2, 7, 5]])
IDS = torch.arange(B * T * K).view(B, T, K) % V
DIVERGENCES = (
    ForwardKL(),
    ReverseKL(),
    Jeffreys(0.3),
    JensenShannon(),
    JensenShannon(0.2, scaled=True),
    SkewKL(),
    SkewKL(0.4, reverse=True),
)
CONSTRUCTED: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 2.0},
    "a temperature that is no power of two": {"temperature": 0.7, "scale_by_temperature": False},
    "shift": {"shift": 1},
    "weight": {"weight": 0.5},
    **{f"reduction={name}": {"reduction": name} for name in get_args(TokenReduction)},
}


def by_hand(first: Tensor, second: Tensor, *_: Tensor) -> Tensor:
    """Return the lines that people write for two tensors of logits."""
    logs = [functional.log_softmax(t, -1) for t in (first, second)]
    return functional.kl_div(*logs, log_target=True, reduction="none").sum(-1).mean()


def token_losses() -> Iterator[Case]:
    yield from distillation()
    yield from other_logits()
    yield from sparse_teachers()
    yield from references()


def distillation() -> Iterator[Case]:
    logits = numbers((B, T, V), (B, T, V))

    def case(name: str, tensors: list[Tensor], names: tuple[str, ...] = (), call: Any = None, **options: Any) -> Case:
        loss = DistillationLoss(**options)

        def step(student: Tensor, teacher: Tensor, *rest: Tensor) -> Tensor:
            given = dict(zip(names, rest, strict=True))
            return loss(student=3 * student, teacher=3 * teacher, **given, **(call or {}))

        return Case(f"DistillationLoss: {name}", tensors, step, by_hand, range(2, len(tensors)))

    for divergence in DIVERGENCES:
        yield case(repr(divergence), [*logits, MASK], ("mask",), divergence=divergence)
    for name, options in CONSTRUCTED.items():
        yield case(name, [*logits, MASK], ("mask",), **options)
    yield case("labels", [*logits, LABELS], ("labels",), shift=1)
    yield case("labels and weights", [*logits, LABELS, MASK * 0.5], ("labels", "mask"))
    yield case("a normalizer", [*logits, MASK], ("mask",), {"normalizer": 7})
    yield case("a normalizer on the device", [*logits, MASK, torch.tensor(7.0)], ("mask", "normalizer"))
    yield case("vocab_size", logits, (), {"vocab_size": V - 2})
    yield case("no mask", logits)
    packed = [t.flatten(0, 1) for t in logits]
    yield case("boundaries", [*packed, torch.tensor([0, 3, 8])], ("boundaries",), shift=1, reduction="sequence_mean")


def other_logits() -> Iterator[Case]:
    first, second = numbers((B, T, V), (B, T, V))
    hidden, weight, bias = numbers((B, T, H), (V, H), (V,))
    yield Case("token_kl", [first, second], lambda q, p: token_kl(3 * q, 3 * p).mean(), by_hand)
    yield Case(
        "token_kl: temperature, mask and vocab_size",
        [first, second, MASK],
        lambda q, p, mask: token_kl(3 * q, 3 * p, temperature=0.7, mask=mask, vocab_size=V - 1).sum(),
        by_hand,
        [2],
    )
    yield Case(
        "token_kl: a head",
        [first, hidden, weight, bias],
        lambda q, hidden, weight, bias: token_kl(q, LinearHead(hidden, weight, bias)).mean(),
        lambda q, hidden, weight, bias: by_hand(q, functional.linear(hidden, weight, bias)),
    )
    yield Case(
        "DistillationLoss: two heads, weights and a mixture",
        [hidden, weight, bias, MASK * 0.5],
        lambda hidden, weight, bias, mask: DistillationLoss(JensenShannon())(
            student=LinearHead(hidden, weight, bias), teacher=LinearHead(2 * hidden, weight), mask=mask
        ),
        lambda hidden, weight, bias, mask: by_hand(hidden @ weight.mT, functional.linear(hidden, weight, bias)),
        [3],
    )
    yield Case(
        "token_kl: shards",
        [first, second],
        lambda q, p: token_kl(VocabShards(3 * q, 0), VocabShards(3 * p, 0)).mean(),
        by_hand,
    )

    def picked(logits: Tensor, tokens: Tensor) -> Tensor:
        return functional.log_softmax(logits, -1).gather(-1, tokens.clamp_min(0).unsqueeze(-1)).sum()

    yield Case("log_probs_of", [first, LABELS], lambda t, ids: log_probs_of(3 * t, ids).sum(), picked, [1])
    yield Case(
        "log_probs_of: a head",
        [hidden, weight, bias, TOKENS],
        lambda hidden, weight, bias, ids: log_probs_of(LinearHead(hidden, weight, bias), ids, temperature=2.0).sum(),
        lambda hidden, weight, bias, ids: picked(functional.linear(hidden, weight, bias), ids),
        [3],
    )


def sparse_teachers() -> Iterator[Case]:
    student, raw = numbers((B, T, V), (B, T, K))
    few = (3 * raw).log_softmax(-1) - 0.5  # with some mass left for the others
    valid = torch.ones(B, T, K, dtype=torch.bool)
    valid[0, 1, 3:] = False

    def case(name: str, divergence: Any = None, **options: Any) -> Case:
        def step(student: Tensor, few: Tensor, ids: Tensor, valid: Tensor, mask: Tensor) -> Tensor:
            teacher = SparseTeacher(ids, few, valid=valid, **options)
            return DistillationLoss(divergence)(student=3 * student, teacher=teacher, mask=mask)

        return Case(f"SparseTeacher: {name}", [student, few, IDS, valid, MASK], step, peer, [1, 2, 3, 4])

    def peer(student: Tensor, few: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
        log_probs = functional.log_softmax(student, -1).gather(-1, ids)
        return (few.exp() * (few - log_probs)).sum()

    yield case("bucket")
    yield case("bucket, reversed", ReverseKL())
    yield case("renormalize", tail="renormalize")
    for name, options in {"sampled": {}, "sampled with counts": {"counts": True}}.items():

        def sampled(
            student: Tensor, few: Tensor, ids: Tensor, counts: Tensor, uses_counts: bool = bool(options)
        ) -> Any:
            teacher = SparseTeacher.sampled(ids, few, counts=counts if uses_counts else None)
            return DistillationLoss()(student=3 * student, teacher=teacher)

        yield Case(f"SparseTeacher: {name}", [student, few, IDS, 1 + IDS % 3], sampled, peer, [1, 2, 3])


def references() -> Iterator[Case]:
    policy, reference, behavior = numbers((B, T, V), (B, T, V), (B, T))
    tensors = [policy, reference, TOKENS, MASK, behavior - 2]

    def case(
        name: str, estimator: Estimator, *, off_policy: bool = False, rewards: bool = False, **options: Any
    ) -> Case:
        loss = ReferenceKL(estimator, **options)

        def step(policy: Tensor, reference: Tensor, tokens: Tensor, mask: Tensor, behavior: Tensor) -> Tensor:
            given: dict[str, Any] = {"policy": 3 * policy, "reference": 3 * reference, "tokens": tokens, "mask": mask}
            if rewards:
                return loss.rewards(**given)
            return loss(**given, log_behavior=behavior if off_policy else None)

        return Case(f"ReferenceKL: {name}", tensors, step, by_hand, [2, 3, 4])

    for estimator in get_args(Estimator):
        for gradient in ("full", "token", "none"):
            yield case(f"{estimator}, {gradient}", estimator, gradient=gradient)
        yield case(f"{estimator}, off policy", estimator, off_policy=True)
    yield case("temperature and sum", "exact", temperature=2.0, reduction="sum")
    yield case("rewards", "k1", rewards=True)
