"""The VAE loss as a module: copies, precisions, compilation, and hooks on its KL."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    Normal,
)

import torch_klloss
from tests.elbo.test_loss import LATENT, N, assert_same, tensors
from tests.processes import run
from torch_klloss import AnalyticKL, AutoKL, ELBOLoss, diagonal_normal, elbo, methods, schedules, standard_normal_like
from torch_klloss.elbo import GECO, PIControl
from torch_klloss.schedules import Constant, Linear

LOSSES = {
    "plain": ELBOLoss(AnalyticKL(), beta=2.0),
    "schedule": ELBOLoss(beta=Linear(steps=4), free_nats=0.1, free_nats_per="dimension"),
    "capacity": ELBOLoss(beta=100.0, capacity=Constant(2.0)),
    "geco": ELBOLoss(beta=GECO(tolerance=3.0)),
    "pi": ELBOLoss(beta=PIControl(target=3.0)),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@every_loss
def test_the_loss_is_a_plain_module(loss):
    leaves = tensors()
    expected = copy.deepcopy(loss).from_tensors(*leaves, likelihood="bernoulli_logits", step=1).loss
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), nn.Sequential(loss)[0].to(torch.device("cpu"))):
        assert isinstance(twin, nn.Module)
        assert repr(twin) == repr(loss)
        fresh = copy.deepcopy(twin)
        fresh.load_state_dict(loss.state_dict())
        assert torch.equal(fresh.from_tensors(*leaves, likelihood="bernoulli_logits", step=1).loss, expected)


@pytest.mark.parametrize(
    "text",
    [
        "ELBOLoss()",
        "ELBOLoss(kl=AutoKL(reduction='sum'), beta=4.0)",
        "ELBOLoss(kl=MonteCarloKL(num_samples=8, gradient=MixedGradient(decay=0.5)), capacity=2.0)",
        "ELBOLoss(beta=Linear(start=0.0, stop=1.0, steps=4, delay=0), free_nats=0.1, free_nats_per='dimension')",
        "ELBOLoss(free_nats=0.5, free_nats_per='group', free_nats_groups=3, balance=0.8)",
        "ELBOLoss(beta=GECO(tolerance=3.0, rate=0.01, momentum=0.99, bounds=(0.0001, 10000.0)))",
        "MixedGradient()",
    ],
)
def test_it_prints_as_it_is_built(text):
    names = {**vars(torch_klloss), **vars(methods), **vars(elbo), **vars(schedules)}
    loss = eval(text, names)
    assert repr(loss) == text
    assert repr(loss) in repr(nn.Sequential(loss))


def test_a_weight_that_is_set_in_training_is_printed():
    loss = ELBOLoss(beta=2.0)
    loss.beta = 0.5
    assert repr(loss) == "ELBOLoss(beta=0.5)"


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss, dtype):
    half = [t.detach().to(dtype) for t in tensors("bernoulli")]
    terms = copy.deepcopy(loss).from_tensors(*half, step=1)
    full = copy.deepcopy(loss).from_tensors(*(t.float() for t in half), step=1)
    assert terms.loss.dtype == torch.float32
    assert torch.equal(terms.loss, full.loss)
    q = diagonal_normal(*half[2:])
    p_x = Independent(Normal(half[0], torch.ones_like(half[0])), 1)
    assert copy.deepcopy(loss)(p_x, half[1], q, standard_normal_like(q), step=1).loss.dtype == torch.float32


@every_loss
def test_autocast_changes_nothing(loss):
    leaves = tensors("bernoulli")
    expected = copy.deepcopy(loss).from_tensors(*leaves, step=1).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(copy.deepcopy(loss).from_tensors(*leaves, step=1).loss, expected)


COMPILED = """
import copy, json, torch
from tests.elbo.test_loss import tensors
from tests.elbo.test_module import LOSSES

torch.set_num_threads(1)
torch.manual_seed(0)
leaves = recon, x, mean, logvar = tensors()
def step(loss):
    return loss.from_tensors(*leaves, likelihood="bernoulli_logits", step=1)
out = {}
for name in %r:
    loss = LOSSES[name]
    eager = step(copy.deepcopy(loss))
    traced = torch.compile(step, fullgraph=True, backend="aot_eager")(copy.deepcopy(loss))
    grads = [torch.autograd.grad(terms.loss, (recon, mean, logvar)) for terms in (eager, traced)]
    gaps = [(one - other).abs().max() / one.abs().max() for one, other in zip(*grads)]
    out[name] = [((eager.loss - traced.loss) / eager.loss).abs().item(), torch.stack(gaps).max().item()]
print(json.dumps(out))
"""

IN_EVERY_RUN = ("plain", "geco")
THE_REST = [name for name in LOSSES if name not in IN_EVERY_RUN]


@pytest.mark.long
@pytest.mark.parametrize(
    "names",
    [IN_EVERY_RUN, pytest.param(THE_REST, marks=pytest.mark.exhaustive)],
    ids=["a weight of each kind", "others"],
)
def test_a_compiled_loss_is_the_eager_one(names):
    gaps = run(COMPILED % (names,))
    assert list(gaps) == list(names)
    assert all(max(gap) < 64 * torch.finfo(torch.float32).eps for gap in gaps.values()), gaps


@pytest.mark.parametrize("options", [{}, {"free_nats": 1.0}, {"free_nats": 0.1, "free_nats_per": "dimension"}])
def test_a_hook_on_the_kl_sees_every_call_once_and_changes_nothing(options):
    recon, x, mean, logvar = tensors("bernoulli")
    q = diagonal_normal(mean, logvar)
    calls = {
        "tensors": lambda loss: loss.from_tensors(recon, x, mean, logvar),
        "distributions": lambda loss: loss(Normal(recon, 1.0), x, q, standard_normal_like(q)),
        "masked": lambda loss: loss.from_tensors(recon, x, mean, logvar, mask=torch.arange(N) < 3),
        "mixture": lambda loss: loss(Normal(recon, 1.0), x, q, mixture_prior()),
    }
    for name, call in calls.items():
        if name == "mixture" and options.get("free_nats_per"):
            continue
        alone, watched, seen = ELBOLoss(**options), ELBOLoss(**options), []
        watched.kl.register_forward_hook(lambda module, args, output, seen=seen: seen.append((args, output)))
        torch.manual_seed(3)
        expected, after = call(alone), torch.rand(())
        torch.manual_seed(3)
        found = call(watched)
        assert torch.equal(after, torch.rand(()))
        assert torch.equal(found.loss, expected.loss)
        ((pair, value),) = seen
        assert pair[0].event_shape == q.event_shape
        shares = (torch.arange(N) < 3) if name == "masked" else torch.ones(N)
        assert_same((value * shares).sum() / shares.sum(), expected.kl)


def mixture_prior():
    components = Independent(Normal(torch.tensor([[-1.0] * LATENT, [1.0] * LATENT]), 1.0), 1)
    return MixtureSameFamily(Categorical(torch.ones(2)), components)


def test_the_kl_passed_in_stays_as_it_is():
    kl = AutoKL(reduction="mean")
    loss = ELBOLoss(kl)
    assert kl.reduction == "mean"
    assert loss.kl is not kl
    assert isinstance(loss.kl, AutoKL)


def test_the_loss_needs_torch_alone():
    blocked = ["lightning", "pytorch_lightning", "matplotlib", "scipy", "sklearn"]
    block = f"import json, sys; sys.modules.update(dict.fromkeys({blocked})); "
    assert run(block + "from torch_klloss import ELBOLoss; print(json.dumps(ELBOLoss().training))")
