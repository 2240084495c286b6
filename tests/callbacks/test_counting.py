"""Steps, histories and calls as the callbacks count them, however the module trains."""

import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch.distributions import Normal, StudentT

from tests.callbacks.training import LIGHTNING_SAYS, data, fit, make_module
from torch_klloss import AutoKL, MonteCarloKL
from torch_klloss.callbacks import EstimatorGap, KLAnnealing, KLRoute, PosteriorCollapse
from torch_klloss.schedules import Linear

pytestmark = LIGHTNING_SAYS


def manual_module(accumulate=1, optimizers=1, critic_every=1, **attributes):
    """A module that steps its optimisers itself, every `accumulate` batches; all but the first every `critic_every`."""
    module = make_module(**attributes)
    module.automatic_optimization = False
    step = type(module).training_step

    def training_step(self, batch, batch_idx):
        self.manual_backward(step(self, batch, batch_idx) / accumulate)
        if (batch_idx + 1) % accumulate:
            return
        found = self.optimizers()
        for i, optimizer in enumerate(found if optimizers > 1 else [found]):
            if i == 0 or batch_idx % critic_every == 0:
                optimizer.step()
        self.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.01) for _ in range(optimizers)]

    type(module).training_step, type(module).configure_optimizers = training_step, configure_optimizers
    return module


@pytest.mark.parametrize("optimizers", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_step_is_a_batch_in_which_an_optimiser_stepped(accumulate, optimizers):
    module = manual_module(accumulate, optimizers, beta=0.0)
    gap = EstimatorGap(every_n_steps=1, figure=False)
    fit(module, [KLAnnealing(Linear(steps=8 // accumulate), "beta"), gap], 8)
    assert module.seen == [i // accumulate / (8 // accumulate) for i in range(8)]
    assert [row["step"] for row in gap.history["kl"]] == list(range(8 // accumulate))


@pytest.mark.filterwarnings("ignore:The warm-up of .* takes 8 steps")  # the first part of the training is short
def test_the_count_goes_on_from_a_checkpoint(tmp_path):
    module = manual_module(2, 2, beta=0.0)
    fit(module, [KLAnnealing(Linear(steps=8), "beta")], 8).save_checkpoint(tmp_path / "last.ckpt")
    resumed = manual_module(2, 2, beta=0.0)
    fit(resumed, [KLAnnealing(Linear(steps=8), "beta")], 8, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.seen == [(4 + i // 2) / 8 for i in range(8)]


PLANS = {  # the module, the schedule's length, the Trainer's options, and what is planned (None: long enough)
    "automatic": (make_module, 9, {}, "9 steps, but the Trainer plans 8"),
    "automatic, long enough": (make_module, 8, {}, None),
    "accumulated": (make_module, 5, {"accumulate_grad_batches": 2}, "5 steps, but the Trainer plans 4"),
    "manual": (manual_module, 9, {}, "9 steps, but the Trainer plans 8"),
    "manual, accumulated": (lambda **a: manual_module(4, **a), 3, {}, "3 steps, but the Trainer plans 2"),
    "two optimisers": (lambda **a: manual_module(1, 2, **a), 9, {"max_steps": 12}, "9 steps, but the Trainer plans 6"),
    "two, long enough": (lambda **a: manual_module(1, 2, **a), 6, {"max_steps": 12}, None),
    "two, of two epochs": (
        lambda **a: manual_module(1, 2, **a),
        16,
        {"max_steps": 30, "max_epochs": 2},
        "16 steps, but the Trainer plans 15",
    ),
    "a critic": (
        lambda **a: manual_module(1, 2, critic_every=4, **a),
        17,
        {"max_steps": 20, "max_epochs": 2},
        "17 steps, but the Trainer plans 16",
    ),
    "tried": (make_module, 9, {"fast_dev_run": 3}, None),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_warm_up_that_is_too_long_is_told_once_in_its_own_unit(name):
    make, steps, options, expected = PLANS[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(make(beta=0.0), [KLAnnealing(Linear(steps=steps), "beta")], 8, **options)
    found = [str(w.message) for w in caught if "warm-up" in str(w.message)]
    assert [expected in message for message in found] == ([] if expected is None else [True])


def test_a_warm_up_in_epochs_is_compared_with_epochs():
    with pytest.warns(UserWarning, match="takes 3 epochs, but the Trainer plans 2"):
        fit(manual_module(2, 2, beta=0.0), [KLAnnealing(Linear(steps=3), "beta", interval="epoch")], 12, max_epochs=2)


@pytest.mark.parametrize("callback", [EstimatorGap, KLRoute, PosteriorCollapse])
def test_other_ranks_do_not_warn(callback):
    watcher = callback()
    watcher._rank = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watcher.warn("on the first rank alone")


def watchers():
    return [EstimatorGap(every_n_steps=4, figure=False), PosteriorCollapse(every_n_steps=4, figure=False)]


@pytest.mark.parametrize("callback", watchers(), ids=lambda c: type(c).__name__)
def test_a_history_begins_with_the_fit_and_its_steps_go_on_with_the_trainer(callback):
    fit(make_module(), [callback], 8)
    trainer = fit(make_module(), [callback], 8)
    assert [row["step"] for row in callback.history["kl"]] == [0, 4]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(make_module(), data(8))
    assert [row["step"] for row in callback.history["kl"]] == [8, 12]


@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.")  # on purpose
@pytest.mark.parametrize("first", [1, 2, 5])
@pytest.mark.parametrize("callback", watchers(), ids=lambda c: type(c).__name__)
def test_a_measured_step_without_a_kl_is_made_up_for_by_the_next_with_one(callback, first):
    module = make_module()
    step = type(module).training_step
    type(module).training_step = lambda self, batch, i: step(self, batch, i) if i % 6 == first else None
    fit(module, [callback], 12)
    assert [row["step"] for row in callback.history["kl"]] == [first, 6 + first]


@pytest.mark.parametrize("callback", [*watchers(), KLRoute()], ids=lambda c: type(c).__name__)
def test_a_loss_that_is_never_called_is_told_once(callback):
    module = make_module()
    type(module).training_step = lambda self, batch, i: self.encoder(batch[0]).mean()
    with pytest.warns(UserWarning, match="has logged nothing: no training step .* with 'kl'") as caught:
        fit(module, [callback], 6)
    assert sum("has logged nothing" in str(w.message) for w in caught) == 1


USES = {
    "call": lambda kl, q, p: kl(q, p),
    "forward": lambda kl, q, p: kl.forward(q, p),
    "estimate": lambda kl, q, p: kl.estimate(q, p).value.sum(-1).mean(),
    "reduce": lambda kl, q, p: kl.reduce(kl.estimate(q, p)).value,
}


@pytest.mark.parametrize("pair", ["closed form", "sampled"])
@pytest.mark.parametrize("use", USES)
def test_every_use_of_a_loss_is_seen_and_training_stays_as_it_is(use, pair):
    def student(module, x):
        mean, logvar = module.encoder(x).chunk(2, -1)
        return Normal(mean, (0.5 * logvar).exp()), StudentT(4.0, torch.zeros(3), 1.0)

    weights, rows = [], []
    for callbacks in (
        [],
        [EstimatorGap(every_n_steps=1, figure=False), KLRoute(1), PosteriorCollapse(1, figure=False)],
    ):
        loss = AutoKL() if pair == "closed form" else MonteCarloKL(2)
        module = make_module(loss=loss, pair=None if pair == "closed form" else student)
        type(module).training_step = lambda self, batch, i: USES[use](self.kl, *self.pair(batch[0]))
        fit(module, callbacks, 3)
        weights.append(module.encoder.weight)
        rows += [callback.history["kl"] for callback in callbacks if hasattr(callback, "history")]
    assert torch.equal(*weights)
    assert [len(row) for row in rows] == [3, 3]
    assert all(row["value"] > 0 and abs(row["gap_z"]) < 6 for row in rows[0])


def test_a_call_that_raises_leaves_the_next_one_seen():
    seen = []

    class Observer:
        def observe(self, call):
            seen.append(call.value.item())

    loss, q = AutoKL(), Normal(torch.ones(4), 1.0)
    loss.add_observer(Observer())
    for use in USES.values():
        with pytest.raises(ValueError, match="batch shapes"):
            use(loss, q, Normal(torch.zeros(3), 1.0))
        use(loss, q, Normal(0.0, 1.0))
    assert seen == [0.5] * len(USES)


def test_a_validation_alone_is_measured():
    collapse = PosteriorCollapse(stage="validation", figure=False)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(callbacks=[collapse], **options)
    trainer.validate(make_module(), data(3), verbose=False)
    assert [row["step"] for row in collapse.history["kl"]] == [0]
    trainer.validate(make_module(), data(3), verbose=False)
    assert len(collapse.history["kl"]) == 2
