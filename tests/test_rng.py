"""Random streams: private seeds, replay, and the caller's stream unchanged."""

from types import SimpleNamespace

import pytest
import torch

from torch_klloss.rng import draw_seed, private_rng

CPU = torch.device("cpu")


def test_a_private_stream_is_reproducible_and_the_callers_is_restored():
    before = torch.get_rng_state()
    with private_rng(7, CPU):
        first = torch.randn(4)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    with private_rng(7, CPU):
        again = torch.randn(4)
    with private_rng(8, CPU):
        other = torch.randn(4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_stream_is_restored_where_the_block_raises():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), private_rng(7, CPU):
        torch.rand(1 // 0)
    assert torch.equal(before, torch.get_rng_state())


def test_a_device_without_a_generator_works():
    with private_rng(7, torch.device("meta")):
        assert torch.randn(2, device="meta").is_meta


def test_seeds_advance_their_generator_and_no_other():
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    seeds = [draw_seed(generator, CPU) for _ in range(3)]
    assert len(set(seeds)) == 3
    assert seeds[0] == draw_seed(torch.Generator().manual_seed(3), CPU)
    assert torch.equal(before, torch.get_rng_state())


def test_a_generator_of_the_cpu_serves_every_device_and_one_of_another_accelerator_is_refused():
    assert draw_seed(torch.Generator().manual_seed(3), torch.device("cuda", 0)) >= 0
    of_another = SimpleNamespace(device=torch.device("mps"))
    with pytest.raises(ValueError, match=r"on the device of q, cuda:0; got one on mps"):
        draw_seed(of_another, torch.device("cuda", 0))
