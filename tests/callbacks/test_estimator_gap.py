"""EstimatorGap: the values that it logs, and a training that it does not change."""

import math
import warnings

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from torch import nn
from torch.distributions import (
    Categorical,
    Distribution,
    Geometric,
    Independent,
    MixtureSameFamily,
    Normal,
    Poisson,
    StudentT,
)
from torch.utils.data import DataLoader, TensorDataset

from torch_klloss import (
    AnalyticKL,
    AutoKL,
    ELBOLoss,
    KLEstimate,
    KLLoss,
    MonteCarloKL,
    diagonal_normal,
    standard_normal_like,
)
from torch_klloss.callbacks import EstimatorGap
from torch_klloss.methods import Enumeration, FirstOf, MonteCarlo, Quadrature

PACKAGES = [pytorch_lightning, lightning.pytorch]
KEYS = ("value", "reference", "gap_mean", "gap_std_error", "gap_z")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # the data are in memory
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
    pytest.mark.filterwarnings("ignore:.*The number of training batches"),  # small on purpose
    pytest.mark.filterwarnings("ignore:.*log_every_n_steps"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated"),  # Lightning's own
]


def make_module(package, loss, prior=None, calls=1, mask=None, compiled=False, pair=None):
    """A VAE-like module of the given package around a loss."""

    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.encoder = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.3), nn.BatchNorm1d(6))
            self.prior_loc = nn.Parameter(torch.full((3,), 0.3))
            self.kl = torch.compile(loss, backend="eager") if compiled else loss

        def pair(self, x):
            mean, logvar = self.encoder(x).chunk(2, -1)
            q = diagonal_normal(mean, logvar)
            if pair is not None:
                return pair
            return q, standard_normal_like(q) if prior is None else prior(self, q)

        def training_step(self, batch, batch_idx):
            q, p = self.pair(batch[0])
            total = q.rsample().square().mean() if q.has_rsample else self.prior_loc.square().mean()
            for _ in range(calls):
                total = total + self.kl(q, p, mask=mask) if mask is not None else total + self.kl(q, p)
            return total.mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    return Module()


def fit(package, module, callbacks, steps=6, **options):
    torch.manual_seed(11)
    data = TensorDataset(torch.randn(8 * steps, 5))
    trainer = package.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=options.pop("logger", False),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **options,
    )
    trainer.fit(module, DataLoader(data, batch_size=8))
    return trainer


def logged(trainer, path="kl", prefix="kl"):
    return {key: trainer.callback_metrics[f"{prefix}/{path}/{key}"].item() for key in KEYS}


def student_prior(module, q):
    return Independent(StudentT(torch.full(q.event_shape, 4.0), module.prior_loc), 1)


@pytest.mark.parametrize("package", PACKAGES, ids=["pytorch_lightning", "lightning"])
@pytest.mark.parametrize("in_list", [True, False], ids=["list", "alone"])
def test_it_logs_value_reference_and_gap_in_both_packages(package, in_list):
    callback = EstimatorGap(every_n_steps=2, num_samples=512)
    module = make_module(package, AutoKL())
    got = logged(fit(package, module, [callback] if in_list else callback))
    float32 = 8 * torch.finfo(torch.float32).eps * got["value"]  # what Lightning keeps its metrics in
    assert got["gap_mean"] == pytest.approx(got["value"] - got["reference"], abs=float32)
    assert got["gap_z"] == pytest.approx(got["gap_mean"] / got["gap_std_error"])
    assert 0 < got["gap_std_error"] < 0.2
    assert abs(got["gap_z"]) < 6


def test_training_that_samples_is_compared_with_the_closed_form():
    module = make_module(pytorch_lightning, MonteCarloKL(4))
    seen = []
    module.kl.register_forward_hook(
        lambda m, args, output: seen.append((output.item(), AnalyticKL()(*args).item())), with_kwargs=False
    )
    got = logged(fit(pytorch_lightning, module, [EstimatorGap(every_n_steps=1)], steps=3))
    assert got["value"] == pytest.approx(seen[-1][0])
    assert got["reference"] == pytest.approx(seen[-1][1])
    assert abs(got["gap_z"]) < 6


def test_a_single_draw_takes_its_error_from_the_spread_of_the_examples():
    got = logged(fit(pytorch_lightning, make_module(pytorch_lightning, MonteCarloKL(1)), [EstimatorGap(1)]))
    assert math.isfinite(got["gap_std_error"])
    assert got["gap_std_error"] > 0


def test_a_pair_without_a_closed_form_is_compared_with_a_larger_sample():
    module = make_module(pytorch_lightning, AutoKL(), prior=student_prior)
    got = logged(fit(pytorch_lightning, module, [EstimatorGap(1, num_samples=256)]))
    assert got["reference"] != got["value"]
    assert abs(got["gap_z"]) < 6


@pytest.mark.parametrize("method", [Enumeration(), FirstOf(Quadrature(), Enumeration())], ids=repr)
def test_a_sum_that_is_certified_but_not_exact_is_compared_with_a_sample(method):
    """Against a sum of our own, and a closed form or another sum would leave no error to measure the gap by."""
    counts = torch.arange(200.0)
    q, p = Poisson(torch.full((8,), 3.0)), Geometric(torch.full((8,), 0.25))
    truth = (q.log_prob(counts[:, None]).exp() * (q.log_prob(counts[:, None]) - p.log_prob(counts[:, None]))).sum(0)
    loss = KLLoss(method)
    assert not loss.estimate(q, p).exact
    callback = EstimatorGap(1, num_samples=512, side_by_side=["exact"])
    got = logged(fit(pytorch_lightning, make_module(pytorch_lightning, loss, pair=(q, p)), [callback]))
    assert got["value"] == pytest.approx(truth.mean().item(), rel=1e-5)
    assert got["gap_std_error"] > 0
    assert abs(got["gap_z"]) < 6
    assert callback.history["kl"][-1]["sampled_reference"] == 1


def test_the_standard_error_is_that_of_repeated_gaps():
    """Over repeated seeds of the reference, the gaps of one and the same step spread as they say."""
    gaps = []
    for seed in range(60):
        module = make_module(pytorch_lightning, AutoKL())
        gaps.append(logged(fit(pytorch_lightning, module, [EstimatorGap(1, num_samples=8, seed=seed)], steps=1)))
    spread = torch.tensor([g["gap_mean"] for g in gaps]).std().item()
    stated = torch.tensor([g["gap_std_error"] for g in gaps]).mean().item()
    assert spread == pytest.approx(stated, rel=5 / math.sqrt(2 * 60))  # five standard errors of a standard deviation


def test_a_wrong_value_shows_as_a_gap():
    """The known-wrong twin: the mean over latent dimensions, where the KL sums."""

    class MeanOverLatent:
        def estimate(self, q, p, generator=None):
            value = AnalyticKL().estimate(q, p).value / q.event_shape.numel()
            return KLEstimate(value, exact=True, method="mean over latent")

    got = logged(
        fit(pytorch_lightning, make_module(pytorch_lightning, KLLoss(MeanOverLatent())), [EstimatorGap(1, 2048)])
    )
    assert got["gap_z"] < -6
    assert got["value"] / got["reference"] == pytest.approx(1 / 3, abs=0.1)


@pytest.mark.parametrize("loss", [AutoKL(), MonteCarloKL(3)], ids=["exact", "sampled"])
def test_training_is_bit_for_bit_the_same_with_and_without_it(loss):
    weights = []
    for callbacks in ([], [EstimatorGap(every_n_steps=1)]):
        module = make_module(pytorch_lightning, loss)
        fit(pytorch_lightning, module, callbacks)
        weights.append((module.state_dict(), torch.get_rng_state()))
    assert all(torch.equal(a, weights[1][0][key]) for key, a in weights[0][0].items())
    assert torch.equal(weights[0][1], weights[1][1])


def test_pairs_leave_weights_buffers_and_random_stream_alone():
    states = []
    for callbacks in ([], [EstimatorGap(1, pairs=lambda module, batch: {"prior": module.pair(batch[0])})]):
        module = make_module(pytorch_lightning, lambda q, p: AutoKL()(q, p))  # a function, not a KLLoss
        trainer = fit(pytorch_lightning, module, callbacks)
        states.append(module.state_dict())
    assert all(torch.equal(a, states[1][key]) for key, a in states[0].items())
    assert abs(logged(trainer, path="prior")["gap_z"]) < 6


def hooks(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_the_observer_is_gone_after_fit():
    module = make_module(pytorch_lightning, AutoKL())
    fit(pytorch_lightning, module, [EstimatorGap(1)])
    assert hooks(module) == 0


def test_the_observer_is_gone_after_fit_raised():
    module = make_module(pytorch_lightning, AutoKL())
    seen = []

    class Boom(pytorch_lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            seen.append(hooks(pl_module))
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fit(pytorch_lightning, module, [EstimatorGap(1), Boom()])
    assert seen == [2]  # there were some
    assert hooks(module) == 0


def test_a_second_call_in_the_same_step_is_logged_by_itself():
    trainer = fit(pytorch_lightning, make_module(pytorch_lightning, AutoKL(), calls=2), [EstimatorGap(1)])
    assert logged(trainer, "kl")["value"] == logged(trainer, "kl.1")["value"]
    assert logged(trainer, "kl")["reference"] != logged(trainer, "kl.1")["reference"]


def test_mask_and_reduction_of_the_call_are_kept():
    mask = torch.arange(8) < 3
    means = logged(
        fit(pytorch_lightning, make_module(pytorch_lightning, AutoKL(), mask=mask), [EstimatorGap(1)], steps=1)
    )
    sums = logged(
        fit(
            pytorch_lightning,
            make_module(pytorch_lightning, AutoKL(reduction="sum"), mask=mask),
            [EstimatorGap(1)],
            steps=1,
        )
    )
    for key in ("value", "reference", "gap_std_error"):
        assert sums[key] == pytest.approx(3 * means[key], rel=1e-5)
    nones = make_module(pytorch_lightning, AutoKL(reduction="none"))
    assert math.isfinite(logged(fit(pytorch_lightning, nones, [EstimatorGap(1)]))["gap_z"])


def test_only_every_nth_step_is_logged_and_every_logger_gets_it(tmp_path):
    logger = pytorch_lightning.loggers.CSVLogger(tmp_path, name="", version="")
    module = make_module(pytorch_lightning, AutoKL())
    fit(pytorch_lightning, module, [EstimatorGap(every_n_steps=4)], steps=10, logger=logger, log_every_n_steps=3)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    step = lines[0].split(",").index("step")
    value = lines[0].split(",").index("kl/kl/value")
    assert [line.split(",")[step] for line in lines[1:] if line.split(",")[value]] == ["0", "4", "8"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at every input's
def test_a_compiled_loss_is_observed_outside_of_the_graph(monkeypatch):
    monkeypatch.setattr(Distribution, "_validate_args", Distribution._validate_args)  # Dynamo turns it off for good
    got = logged(fit(pytorch_lightning, make_module(pytorch_lightning, AutoKL(), compiled=True), [EstimatorGap(1)]))
    assert abs(got["gap_z"]) < 6


def test_sampled_exact_and_quadrature_are_logged_side_by_side():
    callback = EstimatorGap(1, num_samples=256, side_by_side=("sampled", "exact", "quadrature"))
    metrics = fit(pytorch_lightning, make_module(pytorch_lightning, MonteCarloKL(4)), [callback]).callback_metrics
    exact, sampled = metrics["kl/kl/exact"].item(), metrics["kl/kl/sampled"].item()
    assert exact == pytest.approx(metrics["kl/kl/reference"].item(), rel=1e-6)
    assert metrics["kl/kl/quadrature"].item() == pytest.approx(exact, rel=2e-6)  # certified to 1e-6
    assert 0 < abs(sampled - exact) < 6 * metrics["kl/kl/sampled_std_error"].item()


def test_a_column_without_a_route_is_nan_and_draws_one_warning():
    callback = EstimatorGap(1, side_by_side=("exact", "sampled"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(pytorch_lightning, make_module(pytorch_lightning, AutoKL(), prior=student_prior), [callback])
    assert math.isnan(trainer.callback_metrics["kl/kl/exact"].item())
    assert math.isfinite(trainer.callback_metrics["kl/kl/sampled"].item())
    assert len([w for w in caught if "logs NaN as kl/exact" in str(w.message)]) == 1


def test_the_columns_are_reduced_as_the_loss_is():
    mask = torch.arange(8) < 3
    for loss in (AutoKL(), AutoKL(reduction="sum")):
        module = make_module(pytorch_lightning, loss, mask=mask)
        metrics = fit(pytorch_lightning, module, [EstimatorGap(1, side_by_side=["exact"])], steps=1).callback_metrics
        assert metrics["kl/kl/exact"].item() == pytest.approx(metrics["kl/kl/value"].item(), rel=1e-6)


def test_what_was_logged_is_kept_and_comes_back_with_the_checkpoint(tmp_path):
    callback = EstimatorGap(every_n_steps=2)
    trainer = fit(pytorch_lightning, make_module(pytorch_lightning, AutoKL()), [callback])
    rows = callback.history["kl"]
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert rows[-1]["value"] == pytest.approx(logged(trainer)["value"])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][callback.state_key]
    again = EstimatorGap()
    again.load_state_dict(state)
    assert again.history == callback.history


def test_an_elbo_loss_is_watched_through_the_kl_inside_of_it():
    class Model(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.vae = make_module(pytorch_lightning, None)
            self.loss = ELBOLoss()
            self.seen = []

        def training_step(self, batch, batch_idx):
            q, p = self.vae.pair(batch[0])
            p_x = Independent(Normal(q.rsample().mean(-1, keepdim=True).expand(-1, 5), 1.0), 1)
            terms = self.loss(p_x, batch[0], q, p)
            self.seen.append(terms.kl.item())
            return terms.loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    model = Model()
    trainer = fit(pytorch_lightning, model, [EstimatorGap(every_n_steps=5, num_samples=512)])
    got = logged(trainer, "loss.kl")
    assert got["value"] == pytest.approx(model.seen[5], rel=1e-6)
    assert abs(got["gap_z"]) < 6


def test_another_prefix():
    trainer = fit(pytorch_lightning, make_module(pytorch_lightning, AutoKL()), [EstimatorGap(1, prefix="check")])
    assert abs(logged(trainer, prefix="check")["gap_z"]) < 6


def test_a_module_without_a_loss_gets_one_warning_and_trains_on():
    module = make_module(pytorch_lightning, lambda q, p: AutoKL()(q, p))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(pytorch_lightning, module, [EstimatorGap(1)])
    assert [str(w.message) for w in caught if "EstimatorGap" in str(w.message)] == [
        "EstimatorGap found no KLLoss in Module and will log nothing. Keep the loss as an attribute of the module "
        "(self.kl = AutoKL()), or pass EstimatorGap(pairs=...) a function (module, batch) -> {name: (q, p)}. "
        "Whether a KL that the module computes by hand is right, torch_klloss.audit_module(module, batch) says."
    ]
    assert trainer.global_step == 6


def test_a_mixture_prior_and_a_bf16_trainer_work():
    def mixture(module, q):
        means = torch.stack([module.prior_loc, -module.prior_loc])
        return MixtureSameFamily(Categorical(torch.ones(2)), Independent(Normal(means, 1.0), 1))

    module = make_module(pytorch_lightning, AutoKL(fallback=MonteCarlo(8)), prior=mixture)
    got = logged(fit(pytorch_lightning, module, [EstimatorGap(1)], precision="bf16-mixed"))
    assert abs(got["gap_z"]) < 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be an integer of at least 1, got 0"),
        ({"num_samples": 0}, "num_samples must be .* got 0"),
        ({"side_by_side": ["analytic"]}, "side_by_side may hold .* got 'analytic'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        EstimatorGap(**arguments)


def test_two_processes_log_what_one_process_does(tmp_path):
    """The batch of two ranks is the batch of one process: the same value, the gap within its error."""
    module = make_module(pytorch_lightning, AutoKL())
    module.encoder = nn.Linear(5, 6)  # no dropout: the two runs must see the same q
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(8, 5))

    class Keep(pytorch_lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.is_global_zero:
                torch.save({k: v.item() for k, v in trainer.callback_metrics.items()}, tmp_path / "rank0.pt")

    def run(devices, batch_size):
        trainer = pytorch_lightning.Trainer(
            max_steps=1,
            accelerator="cpu",
            devices=devices,
            strategy="ddp_fork" if devices > 1 else "auto",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[EstimatorGap(1, num_samples=512), Keep()],
        )
        trainer.fit(module, DataLoader(data, batch_size=batch_size))
        return torch.load(tmp_path / "rank0.pt")

    state = {key: value.clone() for key, value in module.state_dict().items()}
    both = run(2, 4)
    module.load_state_dict(state)
    alone = run(1, 8)
    assert both["kl/kl/value"] == pytest.approx(alone["kl/kl/value"], rel=1e-5)
    assert both["kl/kl/gap_std_error"] == pytest.approx(alone["kl/kl/gap_std_error"], rel=0.2)
    difference = both["kl/kl/reference"] - alone["kl/kl/reference"]
    assert abs(difference) < 6 * math.hypot(both["kl/kl/gap_std_error"], alone["kl/kl/gap_std_error"])
