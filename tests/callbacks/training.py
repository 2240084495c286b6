"""A small model and a short training of it, for the tests of all callbacks."""

from inspect import signature

import pytest
import pytorch_lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_klloss import AutoKL, diagonal_normal, standard_normal_like

LIGHTNING_SAYS = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # the data are in memory
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
    pytest.mark.filterwarnings("ignore:.*The number of training batches"),  # small on purpose
    pytest.mark.filterwarnings("ignore:.*log_every_n_steps"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated"),  # Lightning's own
    pytest.mark.filterwarnings("ignore:.*starting from a mid-epoch|.*resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

# Lightning has the option from 2.6 on.
WEIGHTS_ONLY = {"weights_only": True} if "weights_only" in signature(pytorch_lightning.Trainer.fit).parameters else {}


def make_module(package=pytorch_lightning, pair=None, loss=None, latent=3, dead=0, noise=0.1, **attributes):
    """A module with the loss `kl`, of a posterior whose last `dead` units are the prior's."""

    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.encoder = nn.Linear(5, 2 * latent)
            self.kl = AutoKL() if loss is None else loss
            self.seen = []
            for name, value in attributes.items():
                setattr(self, name, value)

        def pair(self, x):
            if pair is not None:
                return pair(self, x)
            mean, logvar = self.encoder(x).chunk(2, -1)
            alive = torch.arange(latent) < latent - dead
            q = diagonal_normal(mean * alive, logvar * alive)
            return q, standard_normal_like(q)

        def training_step(self, batch, batch_idx):
            if hasattr(self, "beta"):
                self.seen.append(float(self.beta))
            q, p = self.pair(batch[0])
            return self.kl(q, p) + noise * q.rsample().square().mean() if q.has_rsample else self.kl(q, p)

        def validation_step(self, batch, batch_idx):
            self.kl(*self.pair(batch[0]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Module()


def data(steps, batch_size=8):
    generator = torch.Generator().manual_seed(7)
    return DataLoader(TensorDataset(torch.randn(batch_size * steps, 5, generator=generator)), batch_size=batch_size)


def fit(module, callbacks, steps=6, package=pytorch_lightning, validation=None, ckpt_path=None, **options):
    torch.manual_seed(11)
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "devices": 1, **options}
    trainer = package.Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **options,
    )
    trainer.fit(module, data(steps), validation, ckpt_path=ckpt_path, **WEIGHTS_ONLY)
    return trainer
