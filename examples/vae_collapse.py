"""Train the digits VAE at β = 4 twice: plain, so that its posterior collapses, and with annealing and free nats.

    python examples/vae_collapse.py --out runs/vae_collapse

A unit of the latent is active if the variance of its posterior means over the validation images is above 0.01.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytorch_lightning as pl
import torch
from quiet import quiet
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset
from vae_digits import VAE, load_images

from torch_klloss.callbacks import KLAnnealing, PosteriorCollapse
from torch_klloss.plots import annealing_figure, collapse_figure
from torch_klloss.schedules import Linear

BETA = 4.0
FREE_NATS = 0.5  # a latent dimension
STEPS_AN_EPOCH = 12


class Recorder(pl.Callback):
    """Records step, weight, KL and reconstruction of every validation."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[float, float, float, float]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: VAE) -> None:
        """Add a row."""
        if not trainer.sanity_checking:
            kl, reconstruction = (trainer.callback_metrics[f"val/{key}"].item() for key in ("kl", "reconstruction"))
            self.rows.append((trainer.global_step, pl_module.loss.beta, kl, reconstruction))


def train(
    free_nats: float, warm_up: int, epochs: int, seed: int
) -> tuple[list[dict], list[tuple[float, float, float, float]]]:
    """Train one VAE and return the records of the two callbacks."""
    pl.seed_everything(seed, verbose=False)
    images, validation = load_images("bernoulli")
    collapse, recorder = PosteriorCollapse(stage="validation"), Recorder()
    annealing = [KLAnnealing(Linear(stop=BETA, steps=warm_up))] if warm_up else []
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[collapse, *annealing, recorder],
    )
    trainer.fit(
        VAE(beta=BETA, free_nats=free_nats),
        DataLoader(TensorDataset(images), batch_size=128, shuffle=True),
        DataLoader(TensorDataset(validation), batch_size=len(validation)),
    )
    return collapse.history["loss.kl"], recorder.rows


def main(argv: list[str] | None = None) -> None:
    """Train both, print how many of their units are active, and draw them."""
    parser = argparse.ArgumentParser(description="Posterior collapse at β = 4, and what prevents it.")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/vae_collapse"), help="folder for the figures")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # small models are several times slower on two
    quiet(".*the posterior collapses.*")  # the collapse is the point here
    args.out.mkdir(parents=True, exist_ok=True)

    warm_up = STEPS_AN_EPOCH * max(1, args.epochs * 2 // 3)
    console, figures = Console(width=110), []
    table = Table(title=f"digits VAE at β = {BETA:g}, validation images, after {args.epochs} epochs")
    for column in ("", "active units", "KL", "mutual information", "reconstruction"):
        table.add_column(column, justify="right" if column else "left")
    for name, free_nats, steps in (("plain", 0.0, 0), ("annealing and free nats", FREE_NATS, warm_up)):
        history, rows = train(free_nats, steps, args.epochs, args.seed)
        units, (_, _, kl, reconstruction) = history[-1], rows[-1]
        active = f"{units['active_units']} of {len(units['variances'])}"
        table.add_row(name, active, f"{kl:.2f}", f"{units['mutual_information']:.2f}", f"{reconstruction:.2f}")
        figures.append(args.out / f"collapse_{name.split()[0]}.png")
        series = ([row[key] for row in history] for key in ("step", "kl", "active_units"))
        collapse_figure(*series, title=f"KL of every latent unit at β = {BETA:g}: {name}").savefig(figures[-1])
    figures.append(args.out / "annealing.png")
    columns = ([row[i] for row in rows] for i in range(4))
    annealing_figure(*columns, title=f"β rises to {BETA:g} over {warm_up} steps").savefig(figures[-1])
    console.print(table)
    console.print(f"all in nats per image; figures: {', '.join(map(str, figures))}", soft_wrap=True)


if __name__ == "__main__":
    main()
