"""Digits and memory of compiled formulas, in a fresh process: as they are traced, and as they are fused."""

import re
from pathlib import Path

import pytest

import torch_klloss
from tests.processes import run

BACKENDS = [
    pytest.param("aot_eager", marks=pytest.mark.long),
    pytest.param("inductor", marks=pytest.mark.exhaustive),  # half a minute of a C++ compiler
]

FAMILIES = """
import json, torch
torch.set_num_threads(1)
from torch.distributions import *
from torch.distributions import kl_divergence as torch_kl
from torch_klloss import kl_divergence
torch.manual_seed(0)
steps = torch.cat([10.0 ** -torch.linspace(0, 6, 32), torch.linspace(-4, 4, 32)]) * torch.randn(64)
q = torch.randn(64)
real, positive = (q, q + steps), ((3 * q).exp(), (3 * (q + steps)).exp())
build = {
    "Bernoulli": lambda x, s: Bernoulli(logits=x),
    "Poisson": lambda x, s: Poisson(s),
    "Normal": lambda x, s: Normal(x, s),
}
def kls(kl):
    return lambda *t: [kl(family(*t[:2]), family(*t[2:])) for family in build.values()]
def values_and_gradients(f, dtype):
    leaves = [t.to(dtype).requires_grad_() for pair in zip(real, positive) for t in pair]
    values = f(*leaves)
    grads = torch.autograd.grad(sum(v.sum() for v in values), leaves)
    return [v.detach().double() for v in values], [g.double() for g in grads]
right, right_grads = values_and_gradients(kls(kl_divergence), torch.float64)
found, grads = values_and_gradients(torch.compile(kls(kl_divergence), fullgraph=True, backend=%r), torch.float32)
theirs, _ = values_and_gradients(kls(torch_kl), torch.float32)
relative = lambda some: [float(((a - b) / b).abs().max()) for a, b in zip(some, right, strict=True)]
gaps = [float((a - b).norm() / b.norm()) for a, b in zip(grads, right_grads, strict=True)]
print(json.dumps([relative(found), gaps, relative(theirs)]))
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_formulas_keep_their_digits_near_equality_and_far_from_it(backend):
    values, gradients, torch_values = run(FAMILIES % backend)
    assert max(values) <= 8 * 2.0**-23
    assert max(gradients) <= 1e-5
    assert min(torch_values) > 1e-2


LOGITS = """
import json, torch
torch.set_num_threads(1)
from tests.language.test_memory import extra_memory
from torch_klloss.language import token_kl
torch.manual_seed(0)
backend, scale, dtype, size = %r
teacher = (scale * torch.randn(size)).to(getattr(torch, dtype))
student = (teacher + 0.01 * torch.randn(size)).to(teacher.dtype)
student[10:] = scale * torch.randn(size)[10:]
student[7] = float("nan")
mask = torch.arange(size[0]) != 7
teacher, student = teacher.requires_grad_(), student.requires_grad_()
def loss(kl=torch.compile(token_kl, fullgraph=True, backend=backend)):
    return kl(teacher, student, mask=mask, temperature=2.0)
value = loss()
value.sum().backward()
compiled = [t.grad.double() for t in (teacher, student)]
wide = [t.detach().double().requires_grad_() for t in (teacher, student)]
right = token_kl(*wide, mask=mask, temperature=2.0)
right.sum().backward()
teacher.grad = student.grad = None
memory = extra_memory(lambda: loss().sum(), teacher, student) / student.nbytes
kept = right > 0
print(json.dumps({
    "value": ((value - right) / right)[kept].abs().max().item(), "kept": kept.sum().item(), "memory": memory,
    "dropped": value[~mask].abs().max().item() + compiled[1][~mask].abs().max().item(),
    "gradients": [float((a - b.grad).norm() / b.grad.norm()) for a, b in zip(compiled, wide)],
}))
"""


@pytest.mark.parametrize(
    ("backend", "scale", "dtype", "size"),
    [
        pytest.param("aot_eager", 2.0, "float32", (20, 4100), marks=pytest.mark.long),
        pytest.param("inductor", 2.0, "float32", (260, 4100), marks=pytest.mark.exhaustive),
        pytest.param("inductor", 8.0, "bfloat16", (260, 4100), marks=pytest.mark.exhaustive),
    ],
)
def test_a_compiled_kl_of_many_logits_keeps_its_digits_and_nothing_of_their_size(backend, scale, dtype, size):
    found = run(LOGITS % ((backend, scale, dtype, size),))
    assert found["kept"] == size[0] - 1
    assert found["value"] <= 4 * 2.0**-23
    assert found["dropped"] == 0
    assert max(found["gradients"]) <= (1e-6 if dtype == "float32" else 2.0**-8)
    if backend == "inductor":
        assert found["memory"] <= 0.10


def test_no_formula_asks_the_compiler_for_an_exponential_less_one():
    """It takes exp(x) and subtracts 1 on the CPU, whatever x is; `exponentials.expm1` does not."""
    package = Path(torch_klloss.__file__).parent
    asking = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "auditing" not in path.parts and re.search(r"torch\.expm1|\.expm1\(\)", path.read_text())
    }
    assert asking == {"numerics/exponentials.py"}
