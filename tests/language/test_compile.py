"""The losses under torch.compile(fullgraph=True), in a fresh process; and the operation that a graph calls as it is."""

import pytest
import torch

import torch_klloss.language  # noqa: F401  (which defines the operation)
from tests.processes import run

CODE = """
import json, math, torch
torch.set_num_threads(1)
from torch_klloss.language import *
from torch_klloss.numerics.softmax import divergence, opaque, picked
if %r:  # every size is called as it is, none is traced
    opaque.FEWEST, divergence._traced, picked._plain = 0, None, None
def logits(seed):
    x = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(seed))
    x[..., 7] = -math.inf
    x[0, 1] = math.nan
    return x.requires_grad_()
mask, ids = torch.tensor([[True, False, True]] * 2), torch.randint(7, (2, 3))
tops = logits(1).detach().log_softmax(-1).topk(4)
weight = torch.randn(50, 5, generator=torch.Generator().manual_seed(2)).requires_grad_()
sparse = SparseTeacher(tops.indices, tops.values.nan_to_num(-9.0))
losses = {
    "token_kl": lambda s, t: token_kl(s, t, temperature=0.7, mask=mask).sum(),
    "log_probs_of": lambda s, t: log_probs_of(s, torch.where(mask, ids, -100)).sum(),
    "mixture": lambda s, t: DistillationLoss(JensenShannon(0.1), temperature=2.0, reduction="sequence_mean")(
        student=s.flatten(0, 1), teacher=t.flatten(0, 1), mask=mask.flatten(), boundaries=torch.tensor([0, 3, 6])),
    "head": lambda s, t: token_kl(t, LinearHead(s[..., :5].nan_to_num(), weight), mask=mask).sum(),
    "bucket": lambda s, t: DistillationLoss()(student=s, teacher=sparse, mask=mask),
    "exact": lambda s, t: ReferenceKL(temperature=0.7)(policy=s, reference=t, tokens=ids, mask=mask),
    "k3": lambda s, t: ReferenceKL("k3")(policy=s, reference=t, tokens=ids, mask=mask),
}
out = {}
for name in %r:
    loss = losses[name]
    results = []
    for some in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        s, t, weight.grad = logits(0), logits(1), None
        value = some(s, t)
        value.backward()
        results.append([value.detach(), *(x.grad for x in (s, t, weight) if x.grad is not None)])
    out[name] = [float((a - b).norm() / b.norm()) for b, a in zip(*results, strict=True)]
print(json.dumps(out))
"""


def gaps_of(names, *, as_they_are=False):
    gaps = run(CODE % (as_they_are, names))
    assert list(gaps) == names
    return {name: max(of_all) for name, of_all in gaps.items()}


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["token_kl"], marks=pytest.mark.long),
        pytest.param(["log_probs_of", "mixture", "head", "bucket", "exact", "k3"], marks=pytest.mark.exhaustive),
    ],
)
def test_compiled_losses_are_the_eager_ones_next_to_padding_and_masked_columns(names):
    assert all(gap < 2e-6 for gap in gaps_of(names).values())


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["token_kl", "head"], marks=pytest.mark.long),
        pytest.param(["mixture", "exact", "log_probs_of", "bucket"], marks=pytest.mark.exhaustive),
    ],
)
def test_what_a_graph_calls_as_it_is_gives_the_very_numbers_of_eager_mode(names):
    assert set(gaps_of(names, as_they_are=True).values()) == {0.0}


@pytest.mark.parametrize("keep", [None, torch.tensor([[True], [False], [True]])], ids=["all rows", "some rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_operation_has_the_shapes_that_the_compiler_is_told(keep, dtype):
    hidden, weight, p = (torch.randn(size).to(dtype).requires_grad_() for size in ((3, 4), (20, 4), (3, 20)))
    terms = [1.0, 1.0, 0.0, 1.0]
    torch.library.opcheck(
        torch.ops.torch_klloss.divergence.default,
        ([hidden, weight], [p], [True, False], terms, 1.0, keep),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("keep", [None, torch.tensor([[True], [False], [True]])], ids=["all rows", "some rows"])
@pytest.mark.parametrize("is_head", [True, False])
def test_the_operation_that_picks_has_the_shapes_that_the_compiler_is_told(keep, is_head):
    tensors = [torch.randn(size).requires_grad_() for size in (((3, 4), (20, 4)) if is_head else ((3, 20),))]
    ids, valid = torch.randint(20, (3, 2)), torch.ones(3, 2, dtype=torch.bool)
    torch.library.opcheck(
        torch.ops.torch_klloss.picked.default,
        (tensors, ids, valid, keep, is_head, True, 1.0, 0),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
