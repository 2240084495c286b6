"""EstimatorGap of DistillationLoss and ReferenceKL: the logged values, and a training that it does not change."""

import copy
import pickle

import pytest
import pytorch_lightning
import torch
from torch import nn

from tests.callbacks.training import LIGHTNING_SAYS, fit
from torch_klloss.callbacks import EstimatorGap
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
    log_probs_of,
    token_kl,
)

pytestmark = LIGHTNING_SAYS
BATCH, TIME, VOCABULARY = 8, 6, 12


class Module(pytorch_lightning.LightningModule):
    """Logits of a batch, near a teacher's, and a loss that is called with both."""

    def __init__(self, loss, call):
        super().__init__()
        torch.manual_seed(3)
        self.teacher = torch.randn(BATCH, TIME, VOCABULARY)
        self.student = nn.Parameter(self.teacher + 0.7 * torch.randn(BATCH, TIME, VOCABULARY))
        self.loss, self.call = loss, call
        self.seen = []

    def training_step(self, batch, batch_idx):
        value = self.call(self)
        self.seen.append(value.detach())
        return value.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def logged(loss, call, steps=1, **options):
    callback = EstimatorGap(every_n_steps=1, figure=False, **options)
    module = Module(loss, call)
    fit(module, [callback], steps=steps)
    return callback.history.get("loss", []), module


MASK = torch.arange(TIME) < torch.tensor([6, 3, 1, 4, 6, 2, 5, 0])[:, None]


@pytest.mark.parametrize(
    ("divergence", "options"),
    [
        (ForwardKL(), {"temperature": 2.0}),
        (ReverseKL(), {"reduction": "sequence_mean"}),
        (Jeffreys(0.3), {"reduction": "sequence_sum"}),
        (JensenShannon(0.2), {"reduction": "sum"}),
        (SkewKL(0.1, reverse=True), {"shift": 1, "reduction": "none"}),
    ],
    ids=repr,
)
def test_a_distillation_is_compared_with_tokens_that_are_drawn(divergence, options):
    loss = DistillationLoss(divergence, weight=3.0, **options)
    call = lambda m: m.loss(student=m.student, teacher=m.teacher, mask=MASK)
    (row,), module = logged(loss, call, num_samples=4000)
    value = module.seen[0] / 3
    if loss.reduction == "none":
        value = value.sum() / MASK[:, 1:].sum()
    assert row["value"] == pytest.approx(value.item(), rel=1e-5)
    assert 0 < row["gap_std_error"] < 0.05 * row["value"]
    assert 0 < abs(row["gap_mean"]) < 6 * row["gap_std_error"]
    assert row["gap_z"] == pytest.approx(row["gap_mean"] / row["gap_std_error"])


def test_the_error_is_that_of_the_draws():
    call = lambda m: m.loss(student=m.student, teacher=m.teacher)
    rows, _ = logged(DistillationLoss(weight=0.0), call, steps=300, num_samples=4)
    z = torch.tensor([row["gap_z"] for row in rows])
    assert z.square().mean() == pytest.approx(1, abs=6 * (2 / 300) ** 0.5)


def test_what_no_token_can_be_drawn_from_is_warned_of_once():
    tops = torch.randn(BATCH, TIME, VOCABULARY).log_softmax(-1).topk(3)
    for match, teacher in (
        ("of a SparseTeacher no tokens can be drawn", SparseTeacher(tops.indices, tops.values)),
        ("not a LinearHead", LinearHead(torch.randn(BATCH, TIME, 2), torch.randn(VOCABULARY, 2))),
    ):
        with pytest.warns(UserWarning, match=rf"logs no gap for 'loss': .*{match}") as caught:
            rows, _ = logged(DistillationLoss(), lambda m, t=teacher: m.loss(student=m.student, teacher=t), steps=2)
        assert sum("logs no gap" in str(warning.message) for warning in caught) == 1
        assert rows == []


def of_sequences(call, module):
    """Return k1, k3 and the exact steps of every sequence, by their definitions."""
    tokens, keep = torch.arange(TIME).expand(BATCH, TIME), MASK[:7]
    log_q, log_p = (log_probs_of(x, tokens)[:7].double() for x in (module.student.detach(), module.teacher))
    ratio = torch.where(keep, log_q - log_p, 0.0)
    steps = torch.where(keep, token_kl(module.student.detach(), module.teacher)[:7].double(), 0.0)
    whole = ratio.sum(-1)
    return {"exact": steps.sum(-1), "k1": whole, "k3": torch.expm1(-whole) + whole}


@pytest.mark.parametrize("estimator", ["exact", "k1", "k3"])
@pytest.mark.parametrize("normalizer", [None, 50])
@pytest.mark.filterwarnings("ignore:.*a Pareto tail")  # seven sequences
def test_a_reference_kl_is_compared_with_the_exact_steps(estimator, normalizer):
    tokens = torch.arange(TIME).expand(BATCH, TIME)
    call = lambda m: m.loss(policy=m.student, reference=m.teacher, tokens=tokens, mask=MASK, normalizer=normalizer)
    loss = ReferenceKL(estimator)
    (row,), module = logged(loss, call)
    right = of_sequences(call, Module(loss, call))
    scale = 7 if normalizer is None else normalizer
    assert row["value"] == pytest.approx(module.seen[0].item(), rel=1e-5)
    other = "k1" if estimator == "exact" else "exact"
    assert row["reference"] == pytest.approx(right[other].sum().item() / scale, rel=1e-5)
    for name in ("k1", "k3"):
        gap = right[name] - right["exact"]
        assert row[name] == pytest.approx(right[name].sum().item() / scale, rel=1e-5)
        assert row[f"{name}_gap_mean"] == pytest.approx(gap.sum().item() / scale, rel=1e-4)
        assert row[f"{name}_gap_std_error"] == pytest.approx(gap.std().item() * 7**0.5 / scale, rel=1e-4)


def test_every_reduction_of_a_reference_kl_is_that_of_the_loss():
    tokens, log_behavior = torch.arange(TIME).expand(BATCH, TIME), torch.full((BATCH, TIME), -2.5)
    call = lambda m: m.loss(policy=m.student, reference=m.teacher, tokens=tokens, mask=MASK, log_behavior=log_behavior)
    for reduction in ("token_mean", "sequence_mean", "sequence_sum", "sum"):
        (row,), module = logged(ReferenceKL(gradient="token", reduction=reduction), call)
        assert row["value"] == pytest.approx(module.seen[0].item(), rel=1e-5)


def test_log_probabilities_have_no_exact_value():
    tokens = torch.arange(TIME).expand(BATCH, TIME)
    call = lambda m: m.loss(policy=log_probs_of(m.student, tokens), reference=log_probs_of(m.teacher, tokens))
    with pytest.warns(UserWarning, match=r"no gap for 'loss': the exact value needs logits"):
        assert logged(ReferenceKL("k1"), call)[0] == []


def test_training_is_bit_for_bit_that_without_the_callback():
    def call(m):
        return m.loss(student=m.student + 0.1 * torch.rand_like(m.student), teacher=m.teacher)

    weights = []
    for callbacks in ([], [EstimatorGap(every_n_steps=1, figure=False)]):
        module = Module(DistillationLoss(), call)
        fit(module, callbacks, steps=3)
        weights.append(module.student.detach())
    assert torch.equal(*weights)


def test_copies_and_pickles_have_no_observers_and_a_removed_one_is_told_nothing():
    class Count:
        calls = 0

        def observe(self, call):
            self.calls += 1

    loss, observer = DistillationLoss(), Count()
    loss.add_observer(observer)
    for some in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        some(student=torch.zeros(1, 3), teacher=torch.zeros(1, 3))
    assert observer.calls == 1
    loss.remove_observer(observer)
    loss(student=torch.zeros(1, 3), teacher=torch.zeros(1, 3))
    assert observer.calls == 1
    assert not loss._forward_hooks
