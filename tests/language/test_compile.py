"""The losses under torch.compile(fullgraph=True), in a fresh process."""

import pytest

from tests.processes import run

CODE = """
import json, math, torch
torch.set_num_threads(1)
from torch_klloss.language import *
def logits(seed):
    x = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(seed))
    x[..., 7] = -math.inf
    x[0, 1] = math.nan
    return x.requires_grad_()
mask, ids = torch.tensor([[True, False, True]] * 2), torch.randint(7, (2, 3))
tops = logits(1).detach().log_softmax(-1).topk(4)
sparse = SparseTeacher(tops.indices, tops.values.nan_to_num(-9.0))
losses = {
    "token_kl": lambda s, t: token_kl(s, t, temperature=0.7, mask=mask).sum(),
    "log_probs_of": lambda s, t: log_probs_of(s, torch.where(mask, ids, -100)).sum(),
    "mixture": lambda s, t: DistillationLoss(JensenShannon(0.1), temperature=2.0, reduction="sequence_mean")(
        student=s.flatten(0, 1), teacher=t.flatten(0, 1), mask=mask.flatten(), boundaries=torch.tensor([0, 3, 6])),
    "bucket": lambda s, t: DistillationLoss()(student=s, teacher=sparse, mask=mask),
    "exact": lambda s, t: ReferenceKL()(policy=s, reference=t, tokens=ids, mask=mask),
    "k3": lambda s, t: ReferenceKL("k3")(policy=s, reference=t, tokens=ids, mask=mask),
}
out = {}
for name in %r:
    loss = losses[name]
    results = []
    for some in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        s, t = logits(0), logits(1)
        value = some(s, t)
        value.backward()
        results.append([value.detach(), s.grad] + ([] if t.grad is None else [t.grad]))
    out[name] = [float((a - b).norm() / b.norm()) for b, a in zip(*results, strict=True)]
print(json.dumps(out))
"""


FEW = ["token_kl"]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(FEW, marks=pytest.mark.long),
        pytest.param(["log_probs_of", "mixture", "bucket", "exact", "k3"], marks=pytest.mark.exhaustive),
    ],
)
def test_compiled_losses_are_the_eager_ones_next_to_padding_and_masked_columns(names):
    gaps = run(CODE % (names,))
    assert list(gaps) == names
    for name, gap in gaps.items():
        assert max(gap) < 2e-6, f"{name}: {gap}"
