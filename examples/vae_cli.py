"""Train the digits VAE from YAML, by LightningCLI: model, data, trainer and the callbacks of torch_klloss.

python examples/vae_cli.py fit --config examples/vae_cli.yaml
python examples/vae_cli.py fit --config examples/vae_cli.yaml --model.prior laplace --trainer.max_epochs 5
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import ArgsType, LightningCLI
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))  # the folder of vae_digits
from quiet import quiet
from vae_digits import VAE, load_images


class Digits(pl.LightningDataModule):
    """The 1797 digits of scikit-learn, binarised.

    Args:
        batch_size: the batch size of the training images.
    """

    def __init__(self, batch_size: int = 128) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.train, self.validation = (TensorDataset(images) for images in load_images("bernoulli"))

    def train_dataloader(self) -> DataLoader:
        """Shuffle the training images."""
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Take the validation images as one batch."""
        return DataLoader(self.validation, batch_size=len(self.validation))


def main(args: ArgsType = None) -> LightningCLI:
    """Run the command line."""
    torch.set_num_threads(1)  # small models are several times slower on two
    quiet()
    return LightningCLI(VAE, Digits, seed_everything_default=0, save_config_kwargs={"overwrite": True}, args=args)


if __name__ == "__main__":
    main()
