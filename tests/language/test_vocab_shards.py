"""Shards of the vocabulary, alone and in two processes."""

import json

import pytest
import torch

from tests.processes import script
from torch_klloss.language import VocabShards, log_probs_of, token_kl


def test_one_shard_alone_is_the_whole():
    q, p, ids = torch.randn(4, 30), torch.randn(4, 30), torch.randint(30, (4,))
    assert torch.equal(token_kl(VocabShards(q, 0), VocabShards(p, 0)), token_kl(q, p))
    assert torch.equal(log_probs_of(VocabShards(q, 0), ids), log_probs_of(q, ids))


def test_one_shard_alone_has_a_second_derivative():
    q = torch.randn(2, 9, requires_grad=True)
    grads = [
        torch.autograd.grad(token_kl(a, b).sum(), q, create_graph=True)[0].square().sum()
        for a, b in ((q, torch.zeros(2, 9)), (VocabShards(q, 0), VocabShards(torch.zeros(2, 9), 0)))
    ]
    right, found = (torch.autograd.grad(g, q)[0] for g in grads)
    assert right.norm() > 0
    assert torch.equal(found, right)


@pytest.fixture
def one_process(tmp_path):
    """A group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_the_gradient_of_shards_cannot_be_differentiated_again_nor_transformed(one_process):
    q, p, ids = torch.randn(2, 9, requires_grad=True), VocabShards(torch.zeros(2, 9), 0), torch.tensor([0, 1])
    for function in (
        lambda x: token_kl(VocabShards(x, 0), p).sum(),
        lambda x: log_probs_of(VocabShards(x, 0), ids).sum(),
    ):
        with pytest.raises(
            NotImplementedError, match=r"cannot be differentiated again.*second derivative of whole logits"
        ):
            torch.autograd.grad(function(q), q, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"under torch.func or in forward mode.*call the loss outside"):
            torch.func.grad(function)(q.detach())


@pytest.mark.long
def test_two_processes_have_the_value_and_each_its_own_gradient_once(tmp_path):
    script("tests/language/shards.py", str(tmp_path / "meet"), str(tmp_path / "out"))
    for rank in (0, 1):
        found = json.loads((tmp_path / f"out.{rank}").read_text())
        assert "they overlap: one begins at 2 where the one before ends at 3" in found.pop("overlap")
        assert len(found) == 10
        for name, (value, gradient) in found.items():
            assert value < 1e-6, name
            assert gradient < 1e-5, name
