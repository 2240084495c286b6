"""Observers of the KL in an ELBOLoss: they see what is in its terms, once a level, and nothing is computed again."""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from tests.elbo.test_loss import LATENT, N, tensors
from tests.test_observers import Recorder
from torch_klloss import AutoKL, ELBOLoss, MonteCarloKL, diagonal_normal, standard_normal_like
from torch_klloss.methods import FirstOf
from torch_klloss.rng import replayed_rng

RECON, X, MEAN, LOGVAR = tensors("bernoulli")
Q = diagonal_normal(MEAN, LOGVAR)
P = standard_normal_like(Q)
MIXTURE = MixtureSameFamily(
    Categorical(torch.ones(2)), Independent(Normal(torch.tensor([[-1.0] * LATENT, [1.0] * LATENT]), 1.0), 1)
)
KEEP = torch.arange(N) < 3
SHARES = torch.rand(N, generator=torch.Generator().manual_seed(1)) * KEEP


def sequences(loss, **masks):
    """Call the loss on sequences of 3 steps."""
    recon, x, mean, logvar = (t.detach().unsqueeze(1).expand(-1, 3, -1).contiguous() for t in (RECON, X, MEAN, LOGVAR))
    return loss.from_tensors(recon, x, mean, logvar, **masks)


CALLS = {
    "tensors": lambda loss: loss.from_tensors(RECON, X, MEAN, LOGVAR),
    "distributions": lambda loss: loss(Normal(RECON, 1.0), X, Q, P),
    "masked": lambda loss: loss.from_tensors(RECON, X, MEAN, LOGVAR, mask=KEEP),
    "weighted": lambda loss: loss.from_tensors(RECON, X, MEAN, LOGVAR, mask=SHARES),
    "lengths": lambda loss: sequences(loss, lengths=torch.arange(N) % 4),
    "mixture": lambda loss: loss(Normal(RECON, 1.0), X, Q, MIXTURE),
    "hierarchy": lambda loss: loss(Normal(RECON, 1.0), X, [(Q, P), (P, Q)]),
}
OPTIONS = {
    "mean": lambda: ELBOLoss(beta=2.0),
    "sum": lambda: ELBOLoss(AutoKL(reduction="sum")),
    "none": lambda: ELBOLoss(AutoKL(reduction="none")),
    "free nats": lambda: ELBOLoss(free_nats=1.0),
    "balance": lambda: ELBOLoss(balance=0.8),
    "sampled": lambda: ELBOLoss(MonteCarloKL(2)),
}


@pytest.mark.filterwarnings("ignore:balance needs a prior that learns")
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("build", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_level_is_told_once_as_it_is_in_the_terms(call, build, hooked):
    alone, observed, outputs = build(), build(), []
    recorder = Recorder(observed.kl)
    if hooked:
        observed.kl.register_forward_hook(lambda module, args, output: outputs.append(output))
    torch.manual_seed(3)
    expected, after = call(alone), torch.rand(())
    torch.manual_seed(3)
    terms = call(observed)
    assert torch.equal(torch.rand(()), after)
    assert torch.equal(terms.loss, expected.loss)
    assert len(recorder.calls) == len(terms.kl_per_level)
    assert len(outputs) == (len(terms.kl_per_level) if hooked else 0)
    for told, kl in zip(recorder.calls, terms.kl_per_level, strict=True):
        assert told.loss is observed.kl
        assert told.reduction == observed.reduction
        torch.testing.assert_close(told.value, kl.detach(), rtol=16 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("call", [CALLS[name] for name in CALLS if name != "mixture"])  # which is sampled
def test_the_batch_that_is_told_reduces_the_kl_of_the_pair_to_the_value(call):
    loss = ELBOLoss()
    recorder = Recorder(loss.kl)
    call(loss)
    for told in recorder.calls:
        again = told.batch.total(AutoKL().estimate(told.q, told.p).value, "mean")
        assert again.item() == pytest.approx(told.value.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["tensors", "distributions", "masked", "lengths"])
def test_nothing_is_computed_again_for_an_observer(monkeypatch, name):
    loss, asked = ELBOLoss(), []
    first = FirstOf._first  # a value and an estimate alike are asked for by it
    monkeypatch.setattr(FirstOf, "_first", lambda *args: asked.append(args) or first(*args))
    recorder = Recorder(loss.kl)
    CALLS[name](loss)
    assert len(recorder.calls) == 1
    assert asked == []


def test_a_second_evaluation_would_be_seen(monkeypatch):
    """The twin: a hook of a user, which only a call of the loss can reach."""
    loss, asked = ELBOLoss(), []
    first = FirstOf._first  # a value and an estimate alike are asked for by it
    monkeypatch.setattr(FirstOf, "_first", lambda *args: asked.append(args) or first(*args))
    loss.kl.register_forward_hook(lambda *args: None)
    CALLS["tensors"](loss)
    assert len(asked) == 1


@pytest.mark.parametrize("generator", [None, torch.Generator().manual_seed(5)], ids=["global", "generator"])
def test_the_draws_of_every_level_can_be_repeated(generator):
    loss = ELBOLoss(MonteCarloKL(2))
    recorder = Recorder(loss.kl)
    loss(Normal(RECON, 1.0), X, [(Q, P), (Q, MIXTURE)], generator=generator)
    for told in recorder.calls:
        with replayed_rng(told.random_state, torch.device("cpu")) as replayed, loss.kl.unobserved():
            value = loss.kl.estimate(told.q, told.p, generator=replayed).value.mean()
        assert math.isclose(value.item(), told.value.item(), rel_tol=1e-6)


def test_a_direct_call_of_the_kl_inside_is_told_too():
    loss = ELBOLoss()
    recorder = Recorder(loss.kl)
    value = loss.kl(Q, P)
    (told,) = recorder.calls
    assert torch.equal(told.value, value)


def test_a_loss_that_raises_goes_on_telling():
    loss = ELBOLoss(free_nats=0.1, free_nats_per="dimension")
    recorder = Recorder(loss.kl)
    with pytest.raises(ValueError, match="free nats of dimensions"):
        loss(Normal(RECON, 1.0), X, Q, MIXTURE)
    loss(Normal(RECON, 1.0), X, Q, P)
    assert len(recorder.calls) == 1


def test_a_loss_that_is_built_on_an_observed_one_has_no_observers():
    kl = AutoKL()
    recorder = Recorder(kl)
    CALLS["tensors"](ELBOLoss(kl))
    assert recorder.calls == []
