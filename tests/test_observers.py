"""Observers of a loss: they see every call as it was, once, and a loss without them knows nothing of any."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributions import Distribution, Normal, StudentT
from torch.utils.checkpoint import set_checkpoint_early_stop

from torch_klloss import AnalyticKL, AutoKL, MonteCarloKL
from torch_klloss.rng import replayed_rng

P = Normal(0.0, 1.0)


class Recorder:
    def __init__(self, loss=None, called=None):
        self.calls = []
        if loss is not None:
            loss.add_observer(self, called)

    def observe(self, call):
        self.calls.append(call)


class Halved(AutoKL):
    """Overrides `forward`, and calls the one above."""

    def forward(self, q, p, mask=None, generator=None):
        return 0.5 * super().forward(q, p, mask, generator)


class ByItself(AutoKL):
    """Overrides `forward`, and never calls the one above."""

    def forward(self, q, p, mask=None, generator=None):
        return 0.25 * self.estimate(q, p, generator).value.mean()


def pair(*shape):
    return Normal(torch.full(shape, 2.0, requires_grad=True), 1.0), P


def num_hooks(module):
    return len(module._forward_pre_hooks) + len(module._forward_hooks)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mask", [None, torch.tensor([True, False, True, True]), torch.tensor([0.0, 0.5, 2.0, 1.0])])
def test_a_call_is_told_once_with_its_own_mask_and_reduction(mask, reduction):
    loss = AnalyticKL(reduction=reduction)
    first, second = Recorder(loss), Recorder(loss)
    q, p = pair(4, 3)
    value = loss(q=q, p=p, mask=mask)
    (call,) = first.calls
    assert second.calls == [call]
    assert call.loss is loss
    assert (call.batch.elements, call.batch.num_example_dims) == ((4,), 1)
    assert call.batch.weights is None if mask is None else torch.equal(call.batch.weights, mask)
    assert torch.equal(call.value, value)
    assert not call.value.requires_grad
    assert call.reduction == reduction


def test_what_is_masked_does_not_reach_an_observer():
    loss = AutoKL()
    recorder = Recorder(loss)
    keep = torch.arange(4) < 2
    loss(Normal(torch.where(keep, 2.0, torch.nan), 1.0, validate_args=False), P, keep)
    assert not recorder.calls[0].q.loc.isnan().any()


@pytest.mark.parametrize("by_generator", [False, True])
def test_the_draws_of_a_call_can_be_repeated(by_generator):
    loss = MonteCarloKL(3)
    recorder = Recorder(loss)
    generator = torch.Generator().manual_seed(1) if by_generator else None
    q, p = Normal(torch.zeros(5), 1.0), StudentT(4.0)
    values = [loss(q, p, generator=generator) for _ in range(2)]
    for call, value in zip(recorder.calls, values, strict=True):
        with replayed_rng(call.random_state, torch.device("cpu")) as replayed, loss.unobserved():
            assert torch.equal(loss.estimate(call.q, call.p, generator=replayed).value.mean(), value)


@pytest.mark.parametrize(("cls", "factor"), [(AutoKL, 1.0), (Halved, 0.5), (ByItself, 0.25)])
def test_the_value_is_what_the_forward_of_a_subclass_returns(cls, factor):
    loss = cls()
    recorder = Recorder(loss)
    value = loss(*pair(4))
    (call,) = recorder.calls
    assert call.value == value == 2 * factor


def test_the_value_is_what_the_hooks_of_a_user_make_of_it():
    loss = AutoKL()
    seen = []
    loss.register_forward_hook(lambda module, args, output: seen.append(output) or 3 * output)
    recorder = Recorder(loss)
    assert loss(*pair(4)) == 6
    assert seen == [2]
    assert recorder.calls[0].value == 6


def test_an_observer_that_is_removed_leaves_nothing_behind():
    loss, (q, p) = AutoKL(), pair(4)
    before = vars(copy.deepcopy(loss))
    first, second = Recorder(loss), Recorder(loss)
    assert num_hooks(loss) == 2
    loss.remove_observer(first)
    loss.remove_observer(first)
    loss(q, p)
    assert (len(first.calls), len(second.calls)) == (0, 1)
    loss.remove_observer(second)
    assert num_hooks(loss) == 0
    assert {key: vars(loss)[key] for key in before if key != "method"} == {
        k: v for k, v in before.items() if k != "method"
    }


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_a_copy_has_no_observers_but_the_hooks_of_its_user(copied):
    loss = AutoKL()
    loss.register_forward_hook(_count)
    recorder = Recorder(loss)
    twin = copied(loss)
    assert twin.observers == []
    assert num_hooks(twin) == 1
    assert num_hooks(loss) == 3
    twin(*pair(4))
    assert recorder.calls == []
    own = Recorder(twin)
    twin(*pair(4))
    assert (len(own.calls), len(recorder.calls)) == (1, 0)


def _count(module, args, output):
    return output


def test_observers_are_no_part_of_the_state():
    loss = AutoKL()
    state, text = loss.state_dict(), repr(loss)
    Recorder(loss)
    assert loss.state_dict() == state
    assert repr(loss) == text


def test_a_call_that_raises_is_not_told_and_the_next_one_is():
    loss = MonteCarloKL(2)
    recorder = Recorder(loss)
    with pytest.raises(ValueError, match="batch"):
        loss(Normal(torch.zeros(2), 1.0), Normal(torch.zeros(3), 1.0))
    torch.manual_seed(0)
    expected = torch.get_rng_state()
    loss(*pair(2))
    (call,) = recorder.calls
    assert torch.equal(call.random_state.cpu, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at every input's
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_loss_is_told_outside_of_its_one_graph(monkeypatch, in_place):
    monkeypatch.setattr(Distribution, "_validate_args", Distribution._validate_args)  # Dynamo turns it off for good
    loss, (q, p) = AutoKL(), pair(4)
    options = {"backend": "eager", "fullgraph": True}
    if in_place:
        loss.compile(**options)
    compiled = loss if in_place else torch.compile(loss, **options)
    alone = compiled(q, p)
    recorder = Recorder(loss, compiled)
    value = compiled(q, p)
    assert torch.equal(value, alone)
    (call,) = recorder.calls
    assert torch.equal(call.value, value)
    loss.remove_observer(recorder)
    assert num_hooks(compiled) == 0


@pytest.mark.parametrize("outside", [True, False])
def test_a_loss_in_a_wrapper_that_calls_it_again_is_told_once(outside):
    """Activation checkpointing repeats the forward in the backward; inside of the wrapper it would be told twice."""

    class Weighted(AutoKL):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, q, p, mask=None, generator=None):
            return (self.weight * super().forward(q, p, mask, generator)).exp()

    loss = Weighted()
    wrapper = checkpoint_wrapper(loss)
    recorder = Recorder(loss, wrapper if outside else None)
    with set_checkpoint_early_stop(False):
        wrapper(*pair(4)).backward()
    assert len(recorder.calls) == (1 if outside else 2)
