"""Two processes with uneven shards of the vocabulary, against the whole logits; run by test_vocab_shards.py."""

import json
import sys

import torch
from torch import distributed, multiprocessing

from torch_klloss.language import (
    DistillationLoss,
    ForwardKL,
    Jeffreys,
    JensenShannon,
    ReverseKL,
    SkewKL,
    SparseTeacher,
    VocabShards,
    log_probs_of,
    token_kl,
)

EDGES = (0, 130, 400)


def gaps(rank):
    torch.manual_seed(0)
    teacher, student, ids = torch.randn(6, 400), torch.randn(6, 400), torch.randint(380, (6,))
    columns = slice(*EDGES[rank : rank + 2])
    mask = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 0.5])
    log_probs, tops = teacher.log_softmax(-1).topk(7)
    sparse = SparseTeacher(tops, log_probs)
    losses = {
        **{
            repr(d): lambda s, t, d=d: DistillationLoss(d, temperature=2.0)(
                student=s, teacher=t, mask=mask, vocab_size=390
            )
            for d in (ForwardKL(), ReverseKL(), Jeffreys(), JensenShannon(), SkewKL())
        },
        "near": lambda s, t: DistillationLoss()(student=s, teacher=s if s is t else t),
        "log_probs_of": lambda s, t: log_probs_of(s, ids).sum(),
        "bucket": lambda s, t: DistillationLoss()(student=s, teacher=sparse),
    }
    found = {}
    for name, loss in losses.items():
        whole = [x.clone().requires_grad_() for x in (student, teacher)]
        parts = [x[:, columns].clone().requires_grad_() for x in (student, teacher)]
        right, value = loss(*whole), loss(*(VocabShards(p, columns.start) for p in parts))
        right.backward()
        value.backward()
        worst = 0.0
        for w, p in zip(whole, parts, strict=True):
            if w.grad is not None and w.grad[:, columns].norm() > 0:
                worst = max(worst, abs(float(p.grad.norm() / w.grad[:, columns].norm()) - 1))
                worst = max(worst, float((p.grad - w.grad[:, columns]).norm() / w.grad[:, columns].norm()))
        found[name] = (abs(float(value.detach() / right.detach()) - 1), worst)
    found |= compiled(teacher[:, columns], student[:, columns], ids, columns.start)
    try:
        token_kl(*(VocabShards(torch.zeros(1, 3), 2 * rank) for _ in range(2)))
    except ValueError as error:
        found["overlap"] = str(error)
    return found


def compiled(teacher, student, ids, start):
    """Return how far values and gradients of compiled functions of shards are from those of eager ones."""
    functions = {
        "compiled": lambda s, t: token_kl(VocabShards(t * 2, start), VocabShards(s, start)).sum() * 2,
        "compiled log_probs_of": lambda s, t: log_probs_of(VocabShards(s * 2, start), ids).sum() * 2,
    }
    found = {}
    for name, function in functions.items():
        results = []
        for some in (function, torch.compile(function, backend="eager")):
            leaf = student.clone().requires_grad_()
            value = some(leaf, teacher)
            value.backward()
            results.append((value.detach(), leaf.grad))
        (right, by_right), (value, by_value) = results
        found[name] = abs(float(value / right) - 1), float((by_value - by_right).norm() / by_right.norm())
    return found


def work(rank, rendezvous, out):
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    with open(f"{out}.{rank}", "w") as file:
        json.dump(gaps(rank), file)
    distributed.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.start_processes(work, sys.argv[1:3], nprocs=2, start_method="fork")
