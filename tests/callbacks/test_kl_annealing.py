"""KLAnnealing: every batch has the weight of its step, also after a resume; warnings and errors for bad schedules."""

import math
import warnings

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.distributions import Bernoulli, Independent

from tests.callbacks.training import LIGHTNING_SAYS, WEIGHTS_ONLY, data, fit, make_module
from torch_klloss import ELBOLoss
from torch_klloss.callbacks import KLAnnealing
from torch_klloss.schedules import Constant, Cosine, Cyclical, Linear, Sigmoid

pytestmark = LIGHTNING_SAYS


@pytest.mark.parametrize("schedule", [Linear(steps=4), Cyclical(steps=6), Sigmoid(steps=5), Cosine(steps=5, stop=3.0)])
def test_every_batch_has_the_weight_of_its_step(schedule):
    module = make_module(beta=1.0)
    fit(module, [KLAnnealing(schedule, attribute="beta")])
    assert module.seen == [schedule(step) for step in range(6)]


@pytest.mark.parametrize("package", [pytorch_lightning, lightning.pytorch], ids=["pytorch_lightning", "lightning"])
def test_every_elbo_loss_of_the_module_is_driven_in_both_packages(package):
    class Model(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 4)
            self.losses = nn.ModuleList([ELBOLoss(), ELBOLoss(beta=4.0)])
            self.seen = []

        def training_step(self, batch, batch_idx):
            (x,) = batch
            module = make_module(latent=2)
            q, p = module.pair(x)
            p_x = Independent(Bernoulli(logits=self.layer(x)[:, :1].expand(-1, 5)), 1)
            terms = [loss(p_x, (x > 0).float(), q, p) for loss in self.losses]
            self.seen.append([term.beta for term in terms])
            return sum(term.loss for term in terms)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    model = Model()
    fit(model, [KLAnnealing(Linear(steps=4))], package=package)
    assert model.seen == [[min(1, k / 4)] * 2 for k in range(6)]


def test_epochs_are_counted_where_that_is_asked_for():
    module = make_module(beta=1.0)
    fit(module, [KLAnnealing(Linear(steps=2), attribute="beta", interval="epoch")], steps=2, max_epochs=3)
    assert module.seen == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]


def test_accumulated_gradients_count_as_one_step():
    module = make_module(beta=1.0)
    fit(module, [KLAnnealing(Linear(steps=3), attribute="beta")], accumulate_grad_batches=2)
    assert module.seen == [0.0, 0.0, 1 / 3, 1 / 3, 2 / 3, 2 / 3]


def test_a_path_a_tensor_and_a_hyperparameter_can_be_named():
    inner = nn.Module()
    inner.register_buffer("weight", torch.zeros(()))
    module = make_module(inner=inner)
    module.save_hyperparameters({"beta": 0.0})
    buffer = module.inner.weight
    annealing = [KLAnnealing(Constant(0.5), attribute=name) for name in ("inner.weight", "hparams.beta")]
    for callback in annealing:
        fit(module, [callback])
    assert module.inner.weight is buffer
    assert (buffer.item(), module.hparams.beta) == (0.5, 0.5)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the second run saves nothing
@pytest.mark.parametrize("every", [{"every_n_train_steps": 4}, {"every_n_epochs": 1}], ids=["mid_epoch", "epoch_end"])
def test_a_resumed_run_goes_on_in_mid_schedule(tmp_path, every):
    schedule = Linear(steps=12)
    whole = make_module(beta=1.0)
    fit(whole, [KLAnnealing(schedule, attribute="beta")], max_epochs=2)

    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **every)
    first = make_module(beta=1.0)
    fit(first, [KLAnnealing(schedule, attribute="beta"), checkpoint], enable_checkpointing=True, max_epochs=2)
    assert first.seen == whole.seen
    start = 4 if "every_n_train_steps" in every else 6
    second = make_module(beta=1.0)
    path = tmp_path / f"step={start}.ckpt"
    fit(second, [KLAnnealing(schedule, attribute="beta")], ckpt_path=path, max_epochs=2)
    assert second.seen == whole.seen[start:]


def test_a_checkpoint_is_evaluated_under_the_weight_it_was_saved_with(tmp_path):
    module = make_module(beta=1.0)
    trainer = fit(module, [KLAnnealing(Linear(steps=6), attribute="beta")])
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    fresh = make_module(beta=1.0)
    evaluation = pytorch_lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        callbacks=[KLAnnealing(Linear(steps=6), attribute="beta")],
    )
    evaluation.validate(fresh, data(1), ckpt_path=tmp_path / "end.ckpt", verbose=False, **WEIGHTS_ONLY)
    assert fresh.beta == 5 / 6


def test_the_weight_is_logged_on_every_nth_step(tmp_path):
    logger = pytorch_lightning.loggers.CSVLogger(tmp_path, name="", version="")
    fit(make_module(beta=0.0), [KLAnnealing(Linear(steps=5), "beta", every_n_steps=2)], logger=logger)
    header, *rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    logged = [(int(row[header.index("step")]), float(row[header.index("kl/beta")])) for row in rows]
    assert logged == [(0, 0.0), (2, 0.4), (4, 0.8)]


def said_by(callback, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(make_module(beta=0.0), [callback], **options)
    assert trainer.global_step > 0
    return [str(w.message) for w in caught if "warm-up" in str(w.message) or "KLAnnealing" in str(w.message)]


def test_a_warm_up_longer_than_the_training_draws_a_warning_with_the_weight_that_is_reached():
    assert said_by(KLAnnealing(Linear(steps=10), "beta")) == [
        "The warm-up of Linear(start=0.0, stop=1.0, steps=10, delay=0) takes 10 steps, but the Trainer plans 6: the "
        "weight ends at 0.5 instead of 1. Shorten the schedule or train longer."
    ]
    (message,) = said_by(KLAnnealing(Linear(steps=10), "beta", interval="epoch"), steps=2, max_epochs=2)
    assert "takes 10 epochs, but the Trainer plans 2: the weight ends at 0.1" in message
    assert said_by(KLAnnealing(Linear(steps=7), "beta"), max_steps=3)


def test_a_warm_up_that_fits_and_one_that_nobody_can_tell_are_silent():
    assert said_by(KLAnnealing(Linear(steps=6), "beta")) == []
    assert said_by(KLAnnealing(Linear(steps=2), "beta", interval="epoch"), steps=2, max_epochs=2) == []
    assert said_by(KLAnnealing(lambda step: step / 100, "beta")) == []  # a function has no end


def test_a_module_without_an_elbo_loss_gets_one_warning_and_trains_on():
    assert said_by(KLAnnealing(Linear(steps=100))) == [
        "KLAnnealing found no ELBOLoss in Module and sets nothing. Keep the loss as an attribute of the module "
        "(self.loss = ELBOLoss()), or name an attribute: KLAnnealing(schedule, attribute='beta')."
    ]


def test_an_attribute_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"attribute='betta'.* must name an attribute of Module, which has none"):
        fit(make_module(beta=0.0), [KLAnnealing(Linear(steps=4), attribute="betta")])


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(ValueError, match=r"must be at least 0 and finite, got .* at step 0"):
        fit(make_module(beta=0.0), [KLAnnealing(lambda step: weight, attribute="beta")])


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"schedule": 0.5}, TypeError, "schedule must take a step and return a weight, .* got 0.5"),
        ({"interval": "batch"}, ValueError, "interval must be 'step' or 'epoch', got 'batch'"),
        ({"every_n_steps": 0}, ValueError, "every_n_steps must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, kind, message):
    with pytest.raises(kind, match=message):
        KLAnnealing(**{"schedule": Constant(1.0), **arguments})


def test_the_weights_of_the_losses_of_language_models_are_set_too():
    from torch_klloss.language import DistillationLoss, ReferenceKL

    class Student(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.distil, self.reference = DistillationLoss(), ReferenceKL()

    callback, module = KLAnnealing(Linear(steps=4)), Student()
    callback._targets = callback._find(module)
    callback._set(0.25)
    assert (module.distil.weight, module.reference.weight) == (0.25, 0.25)
