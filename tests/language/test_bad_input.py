"""Every error of bad input, by its words."""

import pytest
import torch

from torch_klloss.language import (
    DistillationLoss,
    Jeffreys,
    JensenShannon,
    LinearHead,
    SkewKL,
    VocabShards,
    log_probs_of,
    token_kl,
)

Z = torch.zeros(2, 3, 5)


def loss(student=Z, teacher=Z, reduction="token_mean", **options):
    return DistillationLoss(reduction=reduction)(student=student, teacher=teacher, **options)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: loss(teacher=torch.zeros(2, 3, 8)), ValueError, "5 and 8 columns.*vocab_size="),
        (lambda: loss(vocab_size=9), ValueError, "at most the number of columns of student, which is 5, got 9"),
        (
            lambda: loss(labels=torch.full((2, 3), 5)),
            ValueError,
            "labels must be ids of the vocabulary, 0 to 4, or -100",
        ),
        (
            lambda: loss(labels=torch.zeros(2, 2, dtype=torch.long)),
            ValueError,
            "labels must have the shape of the tokens",
        ),
        (lambda: loss(labels=torch.zeros(2, 3)), TypeError, "labels must be a tensor of token ids, integers"),
        (lambda: loss(mask=torch.ones(2)), ValueError, r"mask must have the shape of the tokens \(2, 3\), got \(2,\)"),
        (lambda: loss(mask=-torch.ones(2, 3)), ValueError, "weights of at least 0, got a smallest weight of -1"),
        (lambda: loss(teacher=torch.zeros(2, 4, 5)), ValueError, "must be of the same tokens"),
        (lambda: DistillationLoss(temperature=0.0), ValueError, "temperature must be above 0 and finite, got 0.0"),
        (lambda: token_kl(Z, Z, temperature=-1.0), ValueError, "temperature must be above 0 and finite, got -1.0"),
        (lambda: token_kl(Z.long(), Z), TypeError, "q_logits must be of floating point, got torch.int64"),
        (lambda: token_kl([0.0], Z), TypeError, "a LinearHead or VocabShards, got list"),
        (lambda: token_kl(Z[:0], Z[:0]), ValueError, "must hold at least one token.*skip empty batches"),
        (lambda: DistillationLoss()(Z, Z), TypeError, "student and teacher must be given by name"),
        (lambda: DistillationLoss()(student=Z), TypeError, "student and teacher must be given by name"),
        (lambda: DistillationLoss(reduction="mean"), ValueError, "reduction must be 'token_mean', .*got 'mean'"),
        (lambda: loss(reduction="sum", normalizer=3), ValueError, "reduction='sum' has none"),
        (lambda: loss(normalizer=0), ValueError, "normalizer must be above 0"),
        (lambda: DistillationLoss(shift=2), ValueError, "shift must be 0 or 1"),
        (lambda: DistillationLoss("forward"), TypeError, r"such as ForwardKL\(\)"),
        (lambda: DistillationLoss(weight=-1.0), ValueError, "weight must be finite and at least 0"),
        (
            lambda: loss(Z[0], Z[0], boundaries=torch.tensor([0, 2])),
            ValueError,
            "rise from 0 to the number of tokens, 3",
        ),
        (lambda: loss(boundaries=torch.tensor([0, 3])), ValueError, r"\[batch, time, vocabulary\] needs none"),
        (lambda: JensenShannon(0.0), ValueError, r"is 0 whatever.*scaled=True"),
        (lambda: JensenShannon(1.0), ValueError, r"is 0 whatever.*scaled=True"),
        (lambda: JensenShannon(1.5, scaled=True), ValueError, "beta must lie between 0 and 1"),
        (lambda: SkewKL(1.0), ValueError, r"alpha must lie in \[0, 1\)"),
        (lambda: Jeffreys(1.2), ValueError, "weight must lie between 0 and 1"),
        (lambda: log_probs_of(Z, torch.full((2, 3), 7)), ValueError, "tokens must be ids of the vocabulary, 0 to 4"),
        (lambda: LinearHead(torch.zeros(2, 3), torch.zeros(7, 4)), ValueError, r"nn\.Linear\(hidden, vocabulary\)"),
        (
            lambda: LinearHead(torch.zeros(2, 3), torch.zeros(7, 3), torch.zeros(6)),
            ValueError,
            "bias must have the shape",
        ),
        (lambda: token_kl(VocabShards(Z, 0), Z), ValueError, "must both be VocabShards or neither"),
        (lambda: token_kl(VocabShards(Z, 2), VocabShards(Z, 2)), ValueError, "leave a gap: one begins at 2"),
        (
            lambda: token_kl(VocabShards(Z, 0), VocabShards(Z[..., :4], 0)),
            ValueError,
            "5 and 4 columns.*vocab_size=",
        ),
        (lambda: VocabShards(Z.long(), 0), TypeError, "logits must be of floating point, got torch.int64"),
        (lambda: LinearHead(Z.long(), torch.zeros(7, 5)), TypeError, "hidden must be of floating point"),
        (lambda: loss(student=None), TypeError, "student and teacher must be given by name"),
        (lambda: loss(mask=[True]), TypeError, "mask must be a tensor, bool or of weights, got list"),
        (lambda: VocabShards(Z, -1), ValueError, "start must be an integer of at least 0"),
    ],
)
def test_an_error_says_what_was_expected_what_came_and_what_to_do(build, error, message):
    with pytest.raises(error, match=message):
        build()
