"""PosteriorCollapse: its counts, against models with known ones, and a training that it does not change."""

import math
import warnings

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.utils.data import DataLoader, TensorDataset

from tests.callbacks.training import LIGHTNING_SAYS, data, fit, make_module
from torch_klloss import AutoKL, MonteCarloKL, categorical, diagonal_normal, kl_divergence, standard_normal_like
from torch_klloss.callbacks import PosteriorCollapse

pytestmark = LIGHTNING_SAYS


def normals(means, scales=1.0):
    """A pair with the given posterior means, `[examples, units]`, against the standard normal."""
    return lambda module, x: (
        Independent(Normal(means + 0 * module.encoder(x).sum(), scales), 1),
        Independent(Normal(torch.zeros(means.shape[1]), 1.0), 1),
    )


def measured(module, callback=None, steps=1, **options):
    callback = callback or PosteriorCollapse(every_n_steps=1)
    trainer = fit(module, [callback], steps=steps, **options)
    return {key.removeprefix("collapse/kl/"): v.item() for key, v in trainer.callback_metrics.items()}, callback


@pytest.mark.parametrize("package", [pytorch_lightning, lightning.pytorch], ids=["pytorch_lightning", "lightning"])
def test_the_kl_of_every_unit_is_that_of_the_batch(package):
    module = make_module(package, dead=1)
    (x,) = next(iter(data(1)))
    q, p = module.pair(x)
    expected = kl_divergence(q.base_dist, p.base_dist).mean(0)
    got, callback = measured(module, package=package)
    assert [got[f"kl/{j}"] for j in range(3)] == pytest.approx(expected.tolist(), rel=1e-6)
    assert got["kl/2"] == 0
    assert (got["collapsed_units"], got["active_units"]) == (1, 2)
    assert callback.history["kl"][0]["step"] == 0


def test_a_unit_is_active_by_the_variance_of_its_means():
    """Not by that of its draws, nor by its distance from the prior: the known-wrong twins."""
    pattern = torch.tensor([1.0, -1.0] * 4).unsqueeze(-1)  # of variance one
    means = torch.cat([0.101 * pattern, 0.099 * pattern, torch.full((8, 1), 3.0)], 1)
    got, callback = measured(make_module(pair=normals(means)))
    assert got["active_units"] == 1
    assert callback.history["kl"][0]["variances"] == pytest.approx([0.101**2, 0.099**2, 0], abs=1e-8)
    assert got["collapsed_units"] == 2  # ½ · 0.1² nats; the third is far from the prior, but constant


def test_the_mutual_information_is_that_of_the_examples():
    apart = torch.tensor([0.0, 100.0, 200.0, 300.0] * 2).unsqueeze(-1)
    same = torch.ones(8, 1)
    assert measured(make_module(pair=normals(apart)))[0]["mutual_information"] == pytest.approx(math.log(4), abs=1e-6)
    assert measured(make_module(pair=normals(same)))[0]["mutual_information"] == pytest.approx(0, abs=1e-6)


def test_the_kl_of_a_pair_that_does_not_factorise_is_one_unit():
    def pair(module, x):
        q, _ = normals(torch.randn(8, 3))(module, x)
        return q, MixtureSameFamily(Categorical(torch.ones(2)), Independent(Normal(torch.randn(2, 3), 1.0), 1))

    got, callback = measured(make_module(pair=pair))
    assert "kl/0" in got
    assert "kl/1" not in got
    assert len(callback.history["kl"][0]["variances"]) == 3  # the means still have three


def test_discrete_units_have_no_means():
    def pair(module, x):
        logits = module.encoder(x).view(8, 2, 3)
        return Independent(categorical(logits), 1), Independent(categorical(torch.zeros(2, 3)), 1)

    got, _ = measured(make_module(pair=pair))
    assert "active_units" not in got
    assert {"kl/0", "kl/1", "mutual_information", "collapsed_units"} <= set(got)


def test_masked_examples_count_for_nothing_even_if_they_are_nan():
    means = torch.randn(8, 3)
    keep = torch.arange(8) < 5
    bad = torch.where(keep.unsqueeze(-1), means, math.nan)

    class Masked(AutoKL):
        def forward(self, q, p, mask=None, generator=None):
            return super().forward(q, p, mask, generator)

    got = {}
    for name, values in (("bad", bad), ("good", means)):
        module = make_module(pair=lambda m, x, v=values: (Normal(v + 0 * m.encoder(x).sum(), 1.0), Normal(0.0, 1.0)))
        module.training_step = lambda batch, i, m=module: m.kl(*m.pair(batch[0]), mask=keep)
        torch.distributions.Distribution.set_default_validate_args(False)
        got[name], _ = measured(module)
        torch.distributions.Distribution.set_default_validate_args(True)
    assert got["bad"] == got["good"]
    assert got["good"]["kl/0"] == pytest.approx((means[keep, 0] ** 2 / 2).mean().item(), rel=1e-6)


def test_the_steps_of_sequences_are_examples():
    means = torch.randn(8, 4, 3)  # [batch, time, latent]

    def pair(module, x):
        q = diagonal_normal(means + 0 * module.encoder(x).sum(), torch.zeros(8, 4, 3), batch_dims=2)
        return q, standard_normal_like(q)

    got, callback = measured(make_module(pair=pair, loss=AutoKL(batch_dims=2)))
    flat = means.flatten(0, 1)
    assert [got[f"kl/{j}"] for j in range(3)] == pytest.approx((flat**2 / 2).mean(0).tolist(), rel=1e-6)
    assert callback.history["kl"][0]["variances"] == pytest.approx(flat.var(0, correction=0).tolist(), rel=1e-5)
    assert 0 < got["mutual_information"] <= math.log(32)


@pytest.mark.parametrize("batch_size", [24, 5])
def test_validation_is_measured_as_a_whole(batch_size):
    (x,) = DataLoader(data(3).dataset, batch_size=24)._get_iterator().__next__()
    module = make_module()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    validation = DataLoader(TensorDataset(x), batch_size=batch_size)
    got, callback = measured(module, PosteriorCollapse(stage="validation"), steps=2, validation=validation)
    q, p = module.pair(x)
    assert len(callback.history["kl"]) == 1  # the sanity check is none
    expected = kl_divergence(q.base_dist, p.base_dist).mean(0)
    assert [got[f"kl/{j}"] for j in range(3)] == pytest.approx(expected.tolist(), rel=1e-6)
    variances = q.mean.var(0, correction=0)
    assert callback.history["kl"][0]["variances"] == pytest.approx(variances.tolist(), rel=1e-5)


@pytest.mark.parametrize("loss", [AutoKL(), MonteCarloKL(3)], ids=["exact", "sampled"])
def test_training_is_bit_for_bit_the_same_with_and_without_it(loss):
    states = []
    for callbacks in ([], [PosteriorCollapse(1)], [PosteriorCollapse(stage="validation")]):
        module = make_module(loss=loss)
        fit(module, callbacks, validation=data(2))
        states.append((module.state_dict(), torch.get_rng_state()))
    for state, stream in states[1:]:
        assert all(torch.equal(a, state[key]) for key, a in states[0][0].items())
        assert torch.equal(stream, states[0][1])


def collapse_warnings(module, callback, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(module, [callback], **options)
    return [str(w.message) for w in caught if "latent units" in str(w.message)], trainer


def test_it_warns_once_when_most_units_have_died():
    messages, _ = collapse_warnings(make_module(dead=2), PosteriorCollapse(1))
    assert messages == [
        "1 of the 3 latent units of 'kl' are in use after step 2: the posterior collapses. Let β rise from 0 "
        "(KLAnnealing), grant free nats (ELBOLoss(free_nats=...)), or take a smaller β or a weaker decoder."
    ]


def test_it_is_silent_while_half_of_the_units_live_or_few_have_been_seen():
    assert collapse_warnings(make_module(dead=1), PosteriorCollapse(1))[0] == []
    assert collapse_warnings(make_module(dead=3), PosteriorCollapse(1), steps=2)[0] == []


def test_a_resumed_run_has_the_whole_history_and_does_not_warn_again(tmp_path):
    messages, trainer = collapse_warnings(make_module(dead=2), PosteriorCollapse(1), steps=4)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    callback = PosteriorCollapse(1)
    again, _ = collapse_warnings(make_module(dead=2), callback, steps=4, ckpt_path=tmp_path / "last.ckpt", max_epochs=2)
    assert (len(messages), len(again)) == (1, 0)
    assert [row["step"] for row in callback.history["kl"]] == list(range(8))


def test_only_every_nth_step_is_observed():
    hooks = []

    class Look(pytorch_lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            hooks.append(len(pl_module.kl._forward_hooks))

    fit(make_module(), [PosteriorCollapse(every_n_steps=3), Look()])
    assert hooks == [1, 0, 0, 1, 0, 0]


def test_the_observer_is_gone_after_fit_raised():
    module = make_module()
    module.validation_step = lambda *args: (_ for _ in ()).throw(RuntimeError("boom"))
    with pytest.raises(RuntimeError, match="boom"):
        fit(module, [PosteriorCollapse(stage="validation")], validation=data(1), num_sanity_val_steps=0)
    assert not module.kl._forward_hooks
    assert not module.kl._forward_pre_hooks


def test_a_module_without_a_loss_gets_one_warning_and_trains_on():
    with pytest.warns(UserWarning, match="PosteriorCollapse found no KLLoss in Module and will log nothing"):
        trainer = fit(make_module(loss=lambda q, p: AutoKL()(q, p)), [PosteriorCollapse(1)])
    assert trainer.global_step == 6


def test_a_latent_without_examples_is_passed_over():
    callback = PosteriorCollapse(1)
    fit(make_module(loss=AutoKL(batch_dims=0)), [callback])
    assert callback.history == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be an integer of at least 1, got 0"),
        ({"stage": "test"}, "stage must be 'train' or 'validation', got 'test'"),
        ({"patience": 0}, "patience must be an integer of at least 1, got 0"),
        ({"num_draws": 0}, "num_draws must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PosteriorCollapse(**arguments)
