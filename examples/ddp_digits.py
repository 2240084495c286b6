"""Train the digits VAE in one process and in two, on the same images, and compare what the callbacks log.

    python examples/ddp_digits.py
    python examples/ddp_digits.py --epochs 1

Every logged step is compared: β to the last digit, the KL of training and of every latent unit up to rounding, and the
gap, whose reference every process samples for itself, within five standard errors. The exit status is 1 if they
differ by more.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from quiet import quiet
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from vae_digits import VAE, load_images

from torch_klloss import ELBOTerms
from torch_klloss.callbacks import EstimatorGap, KLAnnealing, PosteriorCollapse
from torch_klloss.schedules import Linear

BATCH_SIZE = 128  # over all processes
STEPS_AN_EPOCH = 12
GAP, GAP_ERROR = "kl/loss.kl/gap_mean", "kl/loss.kl/gap_std_error"
ROUNDED = ("kl/loss.kl/value", *(f"collapse/loss.kl/kl/{unit}" for unit in range(8)))
ROUNDING = math.sqrt(torch.finfo(torch.float64).eps)  # half of the digits: rounding errors grow in training
MAX_Z = 5.0

Log = dict[int, dict[str, float]]  # logged values by step and name


class SharedVAE(VAE):
    """The digits VAE, where several processes together draw the same z as a single process."""

    def terms(self, x: Tensor) -> ELBOTerms:
        """Return the terms of the loss, with this process's rows of the noise of the whole batch."""
        q, world_size = self.posterior(x), self.trainer.world_size
        generator = torch.Generator().manual_seed(self.global_step)
        noise = torch.randn(world_size * len(x), *q.event_shape, generator=generator, dtype=x.dtype)
        z = q.mean + q.stddev * noise[self.trainer.global_rank :: world_size]
        return self.loss(self.likelihood(z), x, q, self.prior(q))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Train on one batch; the callbacks log."""
        return self.terms(batch[0]).loss

    def train_dataloader(self) -> DataLoader:
        """Give every process its share of each batch."""
        images, _ = load_images("bernoulli")
        data, world_size = TensorDataset(images), self.trainer.world_size
        sampler = DistributedSampler(data, world_size, self.trainer.global_rank)
        return DataLoader(data, batch_size=BATCH_SIZE // world_size, sampler=sampler)


@dataclass(frozen=True)
class Comparison:
    """The last logged values of one name, and the largest difference over all steps with its limit."""

    name: str
    alone: float
    both: float
    difference: float
    allowed: float


def train(devices: int, epochs: int, seed: int, folder: Path) -> Log:
    """Train in `devices` processes and return the log; it is empty in all processes but the first."""
    pl.seed_everything(seed, verbose=False)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        precision="64-true",  # keeps rounding far below a real difference
        logger=CSVLogger(folder, name="csv", version=f"processes_{devices}"),
        callbacks=[
            EstimatorGap(every_n_steps=2),
            PosteriorCollapse(every_n_steps=2),
            KLAnnealing(Linear(steps=STEPS_AN_EPOCH * epochs), every_n_steps=2),
        ],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=2,
    )
    model = SharedVAE()
    model.pixel_log_scale.requires_grad_(False)  # the Bernoulli likelihood has none, and DDP waits for every parameter
    trainer.fit(model)
    return read_log(Path(trainer.logger.log_dir) / "metrics.csv") if trainer.is_global_zero else {}


def read_log(file: Path) -> Log:
    """Return the numbers of a metrics.csv by step and name."""
    log: Log = defaultdict(dict)
    with file.open() as lines:
        for row in csv.DictReader(lines):
            log[int(row.pop("step"))] |= {name: float(value) for name, value in row.items() if value}
    return dict(log)


def compare(alone: Log, both: Log) -> list[Comparison]:
    """Return how far two logs are apart, name by name; differences of gaps are in standard errors."""
    if not alone or {step: set(row) for step, row in alone.items()} != {step: set(row) for step, row in both.items()}:
        raise SystemExit("one process and two have not logged the same names at the same steps")
    pairs = [(row, both[step]) for step, row in sorted(alone.items())]

    def comparison(name: str, differences: list[float], allowed: float) -> Comparison:
        largest = torch.tensor(differences, dtype=torch.float64).max().item()  # NaN, if one of them is
        return Comparison(name, pairs[-1][0][name], pairs[-1][1][name], largest, allowed)

    by_name = {name: [abs(b[name] - a[name]) for a, b in pairs] for name in ("kl/beta", *ROUNDED, GAP)}
    errors = [math.hypot(a[GAP_ERROR], b[GAP_ERROR]) for a, b in pairs]
    in_errors = [difference / error for difference, error in zip(by_name[GAP], errors, strict=True)]
    return [
        comparison("kl/beta", by_name["kl/beta"], 0.0),
        *(comparison(name, by_name[name], ROUNDING * max(a[name] for a, _ in pairs)) for name in ROUNDED),
        comparison(GAP, in_errors, MAX_Z),
    ]


def report(comparisons: list[Comparison], num_steps: int) -> bool:
    """Print the comparisons, and return whether all are within their limits."""
    table = Table(title="logged values, in nats")
    for column in ("", "one process", "two", "largest difference", "allowed"):
        table.add_column(column, justify="right" if column else "left")
    for c in comparisons:
        unit = " std. errors" if c.name == GAP else ""
        table.add_row(c.name, f"{c.alone:.6f}", f"{c.both:.6f}", f"{c.difference:.2g}{unit}", f"{c.allowed:.2g}{unit}")
    agree = all(c.difference <= c.allowed for c in comparisons)
    console = Console(width=110)
    console.print(table)
    verdict = "the same" if agree else "NOT the same"
    console.print(f"{num_steps} steps logged (above, the values of the last): one process and two are {verdict}")
    return agree


def main(argv: list[str] | None = None) -> None:
    """Train both ways and compare."""
    parser = argparse.ArgumentParser(description="The digits VAE in one process and in two.")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/ddp_digits"), help="folder for the logs")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # small models are several times slower on two
    quiet(".*have no `val_dataloader`.*", ".*the posterior collapses.*")  # training is compared; so it begins

    alone: Log = {}
    if "LOCAL_RANK" not in os.environ:  # the strategy "ddp" runs this script again for the second process
        shutil.rmtree(args.out / "csv", ignore_errors=True)
        alone = train(1, args.epochs, args.seed, args.out)
    both = train(2, args.epochs, args.seed, args.out)
    if alone and not report(compare(alone, both), len(both)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
