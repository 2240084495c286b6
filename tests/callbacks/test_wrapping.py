"""Strategies that wrap the model, or shard it, leave what the callbacks log and what training does as it was."""

import pytest
import pytorch_lightning
import torch
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader, TensorDataset

from tests.callbacks.test_distributed import Halves
from tests.callbacks.training import LIGHTNING_SAYS
from torch_klloss import AutoKL, ELBOLoss, diagonal_normal, standard_normal_like
from torch_klloss.callbacks import EstimatorGap, KLAnnealing, KLRoute, PosteriorCollapse, estimator_gap, watching
from torch_klloss.schedules import Linear

pytestmark = LIGHTNING_SAYS

STEPS, BATCH = 3, 8


class Autoencoder(pytorch_lightning.LightningModule):
    """Has its KL two levels down, and draws nothing unless there is `noise`."""

    def __init__(self, noise=0.0):
        super().__init__()
        torch.manual_seed(3)
        self.encoder, self.decoder = nn.Linear(5, 6), nn.Linear(3, 5)
        self.loss = ELBOLoss()
        self.noise = noise

    def training_step(self, batch, batch_idx):
        mean, logvar = self.encoder(batch[0]).chunk(2, -1)
        z = mean + self.noise * torch.randn_like(mean)
        return self.loss.from_tensors(self.decoder(z), batch[0], mean, logvar, "gaussian").loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def state_dict(self, *args, **kwargs):
        return {}  # the launcher would send the weights back, which cannot be done with shards


class Sharded(Autoencoder):
    def configure_model(self):
        for module in (self.encoder, self.decoder, self.loss.kl, self):
            fully_shard(module, mesh=self.device_mesh["data_parallel"])


class Forked:
    """Starts the processes by fork, where the strategy would run the script again."""

    def _configure_launcher(self):
        self._launcher = _MultiProcessingLauncher(self, start_method="fork")

    def lightning_module_state_dict(self):
        return {}


class ForkedModelParallel(Forked, ModelParallelStrategy):
    pass


class ForkedFSDP(Forked, FSDPStrategy):
    def _setup_model(self, model):  # Lightning's own names a GPU
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


def fsdp(*wrapped):
    return ForkedFSDP(auto_wrap_policy=set(wrapped))


STRATEGIES = {
    "ddp": lambda: DDPStrategy(start_method="fork"),
    "fsdp": lambda: fsdp(nn.Linear),
    "fsdp, losses wrapped too": lambda: fsdp(nn.Linear, ELBOLoss, AutoKL),
    "fully_shard": lambda: ForkedModelParallel(data_parallel_size=2, tensor_parallel_size=1),
}


class Record(pytorch_lightning.Callback):
    """Writes every step's loss, over the ranks, and what was logged last."""

    def __init__(self, path):
        self.path, self.losses = path, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(trainer.strategy.reduce(outputs["loss"], reduce_op="mean").item())

    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            logged = {key: value.item() for key, value in trainer.callback_metrics.items()}
            wrappers = sum(isinstance(m, FullyShardedDataParallel) for m in pl_module.modules())
            torch.save((self.losses, logged, wrappers), self.path)


def posterior(module, batch):
    q = diagonal_normal(*module.encoder(batch[0]).chunk(2, -1))
    return {"posterior": (q, standard_normal_like(q))}


def run(path, strategy=None, *, watched=True, noise=0.0):
    """Return losses, logged numbers and the number of wrappers, of one process or of two under `strategy`."""
    watchers = [EstimatorGap(1, pairs=posterior), PosteriorCollapse(1), KLRoute(1)] if watched else []
    trainer = pytorch_lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1 if strategy is None else 2,
        strategy="auto" if strategy is None else STRATEGIES[strategy](),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # it would shuffle
        callbacks=[*watchers, KLAnnealing(Linear(steps=STEPS), every_n_steps=1), Record(path)],
    )
    images = torch.randn(STEPS * BATCH, 5, generator=torch.Generator().manual_seed(1))
    batches = torch.arange(STEPS * BATCH).view(STEPS, BATCH).tolist()
    sampler = Halves(batches, (BATCH // 2, BATCH // 2))
    module = Sharded(noise) if strategy == "fully_shard" else Autoencoder(noise)
    torch.manual_seed(2)
    trainer.fit(module, DataLoader(TensorDataset(images), batch_sampler=sampler))
    return torch.load(path)


def is_drawn(key):
    return key.rpartition("/")[-1] in ("reference", "gap_mean", "gap_std_error", "gap_z", "mutual_information")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_wrapped_and_in_two_processes_all_is_as_in_one(tmp_path, strategy):
    alone, logged_alone, _ = run(tmp_path / "alone.pt")
    both, logged, wrappers = run(tmp_path / "both.pt", strategy)
    assert wrappers == {"fsdp": 2, "fsdp, losses wrapped too": 4}.get(strategy, 0)
    assert both == pytest.approx(alone, rel=1e-5)
    assert (
        logged.keys()
        == logged_alone.keys()
        >= {"kl/loss.kl/gap_z", "kl/posterior/gap_z", "collapse/loss.kl/active_units", "kl/beta"}
    )
    for key in filter(lambda key: not is_drawn(key), logged):
        assert logged[key] == pytest.approx(logged_alone[key], rel=1e-5), key
    for name in ("loss.kl", "posterior"):
        assert abs(logged[f"kl/{name}/gap_z"]) < 6


def test_ranks_that_do_not_share_their_gradients_are_seen(tmp_path, monkeypatch):
    """The twin of the comparison."""
    alone, logged_alone, _ = run(tmp_path / "alone.pt")
    monkeypatch.setattr(DDPStrategy, "configure_ddp", lambda strategy: None)
    both, logged, _ = run(tmp_path / "both.pt", "ddp")
    assert both[0] == pytest.approx(alone[0], rel=1e-5)
    assert both[-1] != pytest.approx(alone[-1], rel=1e-4)
    assert logged["kl/loss.kl/value"] != pytest.approx(logged_alone["kl/loss.kl/value"], rel=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_training_is_bit_for_bit_the_same_watched_or_not(tmp_path, strategy):
    watched, _, _ = run(tmp_path / "watched.pt", strategy, noise=1.0)
    alone, logged, _ = run(tmp_path / "alone.pt", strategy, watched=False, noise=1.0)
    assert watched == alone
    assert logged.keys() == {"kl/beta"}


def test_paths_with_the_wrappers_in_them_are_seen(tmp_path, monkeypatch):
    """The twin: a loss that is not looked for behind its wrapper."""
    monkeypatch.setattr(watching, "_WRAPPED", ())
    _, logged, _ = run(tmp_path / "both.pt", "fsdp, losses wrapped too")
    assert not any("loss.kl" in key for key in logged)
    assert any("loss._fsdp_wrapped_module.kl._fsdp_wrapped_module" in key for key in logged)


def test_pairs_outside_of_the_wrapper_would_take_what_they_call_for_the_outermost(tmp_path, monkeypatch):
    """The twin: FSDP's own complaint."""
    monkeypatch.setattr(estimator_gap, "_is_fsdp", lambda module: False)
    with pytest.raises(ProcessRaisedException, match="Non-root FSDP instance"):
        run(tmp_path / "both.pt", "fsdp")
