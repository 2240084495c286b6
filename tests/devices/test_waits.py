"""What a large batch costs on the device: no more waits, and no more memory than a small one in proportion."""

import pytest

from tests.processes import run

CODE = """
import json, torch
from torch.distributions import Distribution, Gamma, Laplace, LogNormal, NegativeBinomial, Normal, Poisson
from tests.devices.pretended import NAME, pretended
from torch_klloss import kl_divergence
from torch_klloss.language import DistillationLoss, ForwardKL, Jeffreys, LinearHead
from torch_klloss.methods import Enumeration, Quadrature
from torch_klloss.methods.enumeration import counts
from torch_klloss.methods.quadrature import method

Distribution.set_default_validate_args(False)
PART = 4  # elements, so that a few dozen are many parts
method._LARGE_CHUNK, counts._CHUNK = 64 * PART, 2**11

CASES = {
    "kinks": (Quadrature(rtol=1e-4), lambda x: (Normal(x - 1, x), Laplace(0 * x, 1 + 0 * x))),
    "half line": (Quadrature(rtol=1e-4), lambda x: (Gamma(x, x), LogNormal(0 * x, x))),
    "counts": (Enumeration(), lambda x: (Poisson(5 * x), NegativeBinomial(5 + 0 * x, x / 3))),
}

def waits(estimator, build, size):
    with pretended() as found:
        for _ in range(2 if size == PART else 1):  # the first of all copies constants
            x = torch.linspace(0.5, 2.0, PART).repeat(size // PART).to(NAME).requires_grad_()
            found.clear()
            estimator.estimate(*build(x)).value.sum().backward()
        return found.num_waits

def step(shape, rate):
    value = kl_divergence(Gamma(shape, rate), Gamma(rate, shape))
    return [value.detach(), *torch.autograd.grad(value.sum(), (shape, rate))]

def memory(size):
    host = [torch.linspace(0.5, 2.0, size), torch.linspace(3.0, 0.25, size)]
    with pretended() as found:
        ours = [t.to(NAME).requires_grad_() for t in host]
        found.clear()
        before = found.bytes
        results = [t.cpu() for t in step(*ours)]
        peak = (found.peak - before) / (8 * size)
    for result, expected in zip(results, step(*(t.requires_grad_() for t in host))):
        torch.testing.assert_close(result, expected)
    return peak

def token_loss(divergence, dtype, heads):
    # The memory beyond the gradients, in tensors of logits, and the kernels; once the results are the CPU's.
    generator = torch.Generator().manual_seed(0)
    shapes = [(512, 128), (16000, 128), (512, 16000)] if heads else [(128, 32000), (128, 32000)]
    host = [torch.randn(shape, generator=generator).mul_(0.3 if heads else 1.0).to(dtype) for shape in shapes]

    def step(*t):
        student = LinearHead(t[0], t[1]) if heads else t[0]
        mask = torch.ones(len(t[-1]), device=t[0].device)
        loss = DistillationLoss(divergence)(student=student, teacher=t[-1], mask=mask)
        return [loss.detach(), *torch.autograd.grad(loss, [each for each in t if each.requires_grad])]

    with pretended() as found:
        ours = [t.to(NAME).requires_grad_(i < 2) for i, t in enumerate(host)]
        found.clear()
        before = found.bytes
        results = step(*ours)
        extra = found.peak - before - sum(t.nbytes for t in results[1:])
        launched, results = found.num_kernels, [t.cpu() for t in results]
    for result, expected in zip(results, step(*(t.requires_grad_(i < 2) for i, t in enumerate(host)))):
        torch.testing.assert_close(result, expected, rtol=1e-4 if dtype == torch.float32 else 0.02, atol=1e-6)
    return extra / host[-1].nbytes, launched

with pretended():  # before any backward pass
    pass
found = {name: [waits(*case, size) for size in (PART, 4 * PART, 8 * PART)] for name, case in CASES.items()}
found["memory"] = [memory(size) for size in (2**10, 2**20)]
found["tokens"] = [
    token_loss(Jeffreys(), torch.bfloat16, heads=False),
    token_loss(ForwardKL(), torch.float32, heads=True),
]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    return run(CODE)


@pytest.mark.long
@pytest.mark.parametrize("name", ["kinks", "half line"])
def test_quadrature_waits_at_most_four_times_as_often_for_any_batch_as_for_a_small_one(found, name):
    small, large, larger = found[name]
    assert 15 <= small <= 150  # as its docstring says
    assert small < large == larger <= 4 * small


@pytest.mark.long
def test_a_sum_over_all_counts_waits_as_often_for_any_batch(found):
    small, large, larger = found["counts"]
    assert small == large == larger <= 10


@pytest.mark.long
def test_many_gammas_are_computed_in_parts(found):
    small, large = found["memory"]
    assert large < 0.7 * small


@pytest.mark.long
def test_losses_of_tokens_take_a_part_of_the_logits_and_few_kernels(found):
    (memory, kernels), (head_memory, head_kernels) = found["tokens"]
    assert memory <= 0.15  # in bfloat16
    assert head_memory <= 0.40
    assert kernels <= 20_000
    assert head_kernels <= 10_000
