"""Shards of the vocabulary, alone and in two processes."""

import json

import pytest
import torch

from tests.processes import output
from torch_klloss.language import VocabShards, log_probs_of, token_kl


def test_one_shard_alone_is_the_whole():
    q, p, ids = torch.randn(4, 30), torch.randn(4, 30), torch.randint(30, (4,))
    assert torch.equal(token_kl(VocabShards(q, 0), VocabShards(p, 0)), token_kl(q, p))
    assert torch.equal(log_probs_of(VocabShards(q, 0), ids), log_probs_of(q, ids))


def test_its_gradient_cannot_be_differentiated_again():
    q = torch.randn(2, 9, requires_grad=True)
    (grad,) = torch.autograd.grad(token_kl(q, torch.zeros(2, 9)).sum(), q, create_graph=True)
    assert grad.requires_grad


@pytest.mark.long
def test_two_processes_have_the_value_and_each_its_own_gradient_once(tmp_path):
    output("-m", "tests.language.shards", tmp_path / "meet", tmp_path / "out")
    for rank in (0, 1):
        found = json.loads((tmp_path / f"out.{rank}").read_text())
        assert "they overlap: one begins at 2 where the one before ends at 3" in found.pop("overlap")
        assert len(found) == 8
        for name, (value, gradient) in found.items():
            assert value < 1e-6, name
            assert gradient < 1e-5, name
