"""Two processes log what one process does with the same data: sums over the ranks, not means of means."""

import math

import pytest
import pytorch_lightning
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tests.callbacks.training import LIGHTNING_SAYS, make_module
from torch_klloss.callbacks import EstimatorGap, KLAnnealing, KLRoute, PosteriorCollapse
from torch_klloss.schedules import Linear

pytestmark = LIGHTNING_SAYS


class Keep(pytorch_lightning.Callback):
    """Writes what rank 0 has logged."""

    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save({k: v.item() for k, v in trainer.callback_metrics.items()}, self.path)


def run(devices, loader, path, steps=2):
    module = make_module(beta=1.0, dead=1, noise=0.0)  # the ranks have draws of their own
    callbacks = [
        EstimatorGap(1, num_samples=512, side_by_side=["exact"]),
        PosteriorCollapse(1),
        KLAnnealing(Linear(steps=steps), "beta", every_n_steps=1),
        KLRoute(1),
        Keep(path),
    ]
    trainer = pytorch_lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=callbacks,
    )
    trainer.fit(module, loader)
    return torch.load(path)


class Halves(DistributedSampler):
    """Gives the first `sizes[0]` examples of every batch to rank 0 and the others to rank 1."""

    def __init__(self, batches, sizes):
        self.batches, self.sizes = batches, sizes

    def __iter__(self):
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else None
        for batch in self.batches:
            yield batch if rank is None else batch[: self.sizes[0]] if rank == 0 else batch[self.sizes[0] :]

    def __len__(self):
        return len(self.batches)


@pytest.mark.parametrize("sizes", [(4, 4), (6, 2)], ids=["even", "uneven"])
def test_two_processes_log_what_one_does(tmp_path, sizes):
    dataset = TensorDataset(torch.randn(16, 5))
    batches = [list(range(8)), list(range(8, 16))]
    loader = DataLoader(dataset, batch_sampler=Halves(batches, sizes))
    # DDP gives the ranks' gradients the same weight, whatever their number of examples: the second step differs.
    steps = 2 if sizes[0] == sizes[1] else 1
    both = run(2, loader, tmp_path / "both.pt", steps)
    alone = run(1, loader, tmp_path / "alone.pt", steps)
    exact = ["kl/kl/value", "kl/kl/exact", "kl/beta", "kl/kl/num_evaluations"]
    exact += [f"collapse/kl/{key}" for key in ("kl/0", "kl/1", "kl/2", "active_units", "collapsed_units")]
    for key in exact:
        assert both[key] == pytest.approx(alone[key], rel=1e-5), key
    assert both.keys() == alone.keys()
    error = math.hypot(both["kl/kl/gap_std_error"], alone["kl/kl/gap_std_error"])
    assert abs(both["kl/kl/gap_mean"] - alone["kl/kl/gap_mean"]) < 6 * error
    assert both["kl/kl/gap_std_error"] == pytest.approx(alone["kl/kl/gap_std_error"], rel=0.2)
    assert 0 <= both["collapse/kl/mutual_information"] <= math.log(max(sizes))
