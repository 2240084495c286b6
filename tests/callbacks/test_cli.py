"""Every callback is built from the YAML of LightningCLI, in both packages."""

import lightning.pytorch
import lightning.pytorch.cli
import pytest
import pytorch_lightning
import pytorch_lightning.cli
import torch

from tests.callbacks.training import LIGHTNING_SAYS, data
from torch_klloss import AutoKL, diagonal_normal, standard_normal_like
from torch_klloss.callbacks import EstimatorGap, KLAnnealing, KLRoute, PosteriorCollapse
from torch_klloss.schedules import Linear

pytestmark = [
    *LIGHTNING_SAYS,
    # What LightningCLI asks of jsonargparse is Lightning's own affair.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]

YAML = """
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: torch_klloss.callbacks.EstimatorGap
      init_args: {every_n_steps: 2, num_samples: 32, side_by_side: [exact, quadrature]}
    - class_path: torch_klloss.callbacks.PosteriorCollapse
      init_args: {stage: train, every_n_steps: 2}
    - class_path: torch_klloss.callbacks.KLRoute
    - class_path: torch_klloss.callbacks.KLAnnealing
      init_args:
        attribute: beta
        schedule:
          class_path: torch_klloss.schedules.Linear
          init_args: {stop: 4.0, steps: 4}
"""


@pytest.mark.parametrize("package", [pytorch_lightning, lightning.pytorch], ids=["pytorch_lightning", "lightning"])
def test_the_callbacks_come_from_yaml_and_run(package, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["vae"])

    class Model(package.LightningModule):
        def __init__(self, beta: float = 1.0):
            super().__init__()
            self.encoder = torch.nn.Linear(5, 6)
            self.kl = AutoKL()
            self.beta = beta
            self.seen = []

        def training_step(self, batch, batch_idx):
            self.seen.append(self.beta)
            q = diagonal_normal(*self.encoder(batch[0]).chunk(2, -1))
            return self.kl(q, standard_normal_like(q))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

        def train_dataloader(self):
            return data(6)

    (tmp_path / "config.yaml").write_text(YAML)
    cli = package.cli.LightningCLI(
        Model,
        save_config_callback=None,
        seed_everything_default=False,
        args=["fit", "--config", str(tmp_path / "config.yaml")],
    )
    kinds = {type(callback) for callback in cli.trainer.callbacks}
    assert {EstimatorGap, PosteriorCollapse, KLRoute, KLAnnealing} <= kinds
    (annealing,) = (c for c in cli.trainer.callbacks if isinstance(c, KLAnnealing))
    assert annealing.schedule == Linear(stop=4.0, steps=4)
    assert cli.model.seen == [0.0, 1.0, 2.0, 3.0, 4.0, 4.0]
