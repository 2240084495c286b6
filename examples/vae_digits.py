"""Train a VAE on scikit-learn's digits (1797 real 8x8 images) with a KL loss from torch_klloss.

    python examples/vae_digits.py --out runs/vae_digits
    python examples/vae_digits.py --prior mixture --num-samples 4      # no closed form: the same script samples

The loss is built in `VAE.__init__` and called in `VAE.terms`: q, p, p(x|z), and self.loss(p_x, x, q, p).
"""

from __future__ import annotations

import argparse
import csv
import shutil
from pathlib import Path

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from quiet import quiet
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    Laplace,
    MixtureSameFamily,
    Normal,
    StudentT,
)
from torch.utils.data import DataLoader, TensorDataset

from torch_klloss import (
    AnalyticKL,
    AutoKL,
    ELBOLoss,
    ELBOTerms,
    KLLoss,
    MonteCarloKL,
    diagonal_normal,
    standard_normal_like,
)
from torch_klloss.callbacks import EstimatorGap
from torch_klloss.methods import MonteCarlo
from torch_klloss.plots import gap_figure, reconstruction_figure

PIXELS = 64
NUM_TRAIN = 1500


class Prior(nn.Module):
    """The prior p(z) for a posterior q; the mixture's components are learned."""

    def __init__(self, kind: str, latent_dim: int, num_components: int = 10) -> None:
        super().__init__()
        self.kind = kind
        if kind == "mixture":
            self.logits = nn.Parameter(torch.zeros(num_components))
            self.means = nn.Parameter(2 * torch.randn(num_components, latent_dim))
            self.log_scales = nn.Parameter(torch.zeros(num_components, latent_dim))

    def forward(self, q: Distribution) -> Distribution:
        """Return the prior with q's event shape."""
        zeros = torch.zeros_like(q.mean[0])  # on the device of q
        if self.kind == "laplace":
            return Independent(Laplace(zeros, 1.0), 1)
        if self.kind == "student-t":
            return Independent(StudentT(zeros + 4.0), 1)
        if self.kind == "mixture":
            components = Independent(Normal(self.means, self.log_scales.exp()), 1)
            return MixtureSameFamily(Categorical(logits=self.logits), components)
        return standard_normal_like(q)


def kl_loss(name: str, num_samples: int) -> KLLoss:
    """Return the loss of `--kl`."""
    if name == "analytic":
        return AnalyticKL()
    if name == "monte-carlo":
        return MonteCarloKL(num_samples)
    return AutoKL(fallback=MonteCarlo(num_samples))


class VAE(pl.LightningModule):
    """A variational autoencoder: an encoder to q(z|x), a prior p(z), a decoder to p(x|z)."""

    def __init__(
        self,
        prior: str = "normal",
        kl: str = "auto",
        likelihood: str = "bernoulli",
        num_samples: int = 1,
        latent_dim: int = 8,
        hidden_dim: int = 128,
        beta: float = 1.0,
        free_nats: float = 0.0,
        learning_rate: float = 2e-3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 2 * latent_dim))
        self.decoder = nn.Sequential(nn.Linear(latent_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, PIXELS))
        self.pixel_log_scale = nn.Parameter(torch.tensor(-1.5))  # for the Gaussian likelihood
        self.prior = Prior(prior, latent_dim)
        self.loss = ELBOLoss(
            kl_loss(kl, num_samples),
            beta=beta,
            free_nats=free_nats,
            free_nats_per="dimension" if free_nats else "example",  # not every KL splits into dimensions
        )

    def posterior(self, x: Tensor) -> Distribution:
        """Return q(z|x)."""
        mean, logvar = self.encoder(x).chunk(2, dim=-1)
        return diagonal_normal(mean, logvar)

    def likelihood(self, z: Tensor) -> Distribution:
        """Return p(x|z) over the 64 pixels."""
        output = self.decoder(z)
        if self.hparams.likelihood == "bernoulli":
            return Independent(Bernoulli(logits=output), 1)
        return Independent(Normal(output, self.pixel_log_scale.exp()), 1)

    def terms(self, x: Tensor) -> ELBOTerms:
        """Return reconstruction -E_q[log p(x|z)], KL(q(z|x)‖p(z)) and the loss, in nats per image."""
        q = self.posterior(x)
        return self.loss(self.likelihood(q.rsample()), x, q, self.prior(q))

    def step(self, batch: list[Tensor], stage: str) -> Tensor:
        """Log the terms and return the loss."""
        terms = self.terms(batch[0])
        elbo = -(terms.reconstruction + terms.kl)
        metrics = {"elbo": elbo, "reconstruction": terms.reconstruction, "kl": terms.kl, "loss": terms.loss}
        self.log_dict({f"{stage}/{k}": v for k, v in metrics.items()}, on_epoch=True, on_step=False)
        self.log(f"{stage}_elbo", elbo, prog_bar=True, logger=False, on_epoch=True, on_step=False)
        return terms.loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Train on one batch."""
        return self.step(batch, "train")

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Validate on one batch."""
        self.step(batch, "val")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Use Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)


def load_images(likelihood: str) -> tuple[Tensor, Tensor]:
    """Return the training and the validation images, `[n, 64]` in [0, 1]; binarised for the Bernoulli likelihood."""
    images = torch.as_tensor(load_digits().data, dtype=torch.float32) / 16
    if likelihood == "bernoulli":
        images = (images > 0.5).float()
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    return images[:NUM_TRAIN], images[NUM_TRAIN:]


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the rows of every run's metrics.csv in order, without the empty cells."""
    rows = []
    for file in sorted(folder.glob("*/metrics.csv")):
        with file.open() as lines:
            rows += [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(lines)]
    return rows


def write_metrics(rows: list[dict[str, float]], file: Path) -> None:
    """Write the rows as one CSV file, with a column for every key."""
    names = sorted({key for row in rows for key in row})
    with file.open("w", newline="") as target:
        writer = csv.DictWriter(target, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)


def last(rows: list[dict[str, float]], key: str) -> float:
    """Return the last value that was logged under `key`."""
    return next((row[key] for row in reversed(rows) if key in row), float("nan"))


def report(rows: list[dict[str, float]], route: str, console: Console) -> None:
    """Print the table of the last epoch, and the gap of the last logged step."""
    table = Table(title="nats per image, last epoch")
    for column in ("", "ELBO", "reconstruction", "KL"):
        table.add_column(column, justify="right" if column else "left")
    for stage in ("train", "val"):
        table.add_row(stage, *(f"{last(rows, f'{stage}/{key}'):.2f}" for key in ("elbo", "reconstruction", "kl")))
    console.print(table)
    gap = {key: last(rows, f"kl/loss.kl/{key}") for key in ("value", "reference", "gap_mean", "gap_std_error", "gap_z")}
    console.print(
        f"KL in training ({route}) {gap['value']:.3f}, estimated again {gap['reference']:.3f}: "
        f"gap {gap['gap_mean']:+.3f} ± {gap['gap_std_error']:.3f} nats (z = {gap['gap_z']:+.1f}), last logged step.",
        soft_wrap=True,
    )


def draw_images(model: VAE, images: Tensor) -> Figure:
    """Return the figure of images, their reconstructions, and samples from the prior."""
    model.eval()
    with torch.no_grad():
        q = model.posterior(images.to(model.device))
        prior = model.prior(q)
        z = prior.sample(q.batch_shape[: len(q.batch_shape) - len(prior.batch_shape)])
        rows = images, model.likelihood(q.mean).mean, model.likelihood(z).mean
    return reconstruction_figure(*(row.cpu().view(-1, 8, 8) for row in rows))


def draw_gap(rows: list[dict[str, float]], route: str, num_samples: int) -> Figure:
    """Return the figure of the KL and its gap over the steps."""
    logged = [row for row in rows if "kl/loss.kl/value" in row]
    names = ("step", "kl/loss.kl/value", "kl/loss.kl/reference", "kl/loss.kl/gap_std_error")
    columns = [[row[name] for row in logged] for name in names]
    trained_exactly = route != "monte_carlo"
    return gap_figure(
        *columns,
        value_label=route.replace("_", " "),
        reference_label=f"{num_samples} draws an image" if trained_exactly else "closed form, or a larger sample",
        sampled="reference" if trained_exactly else "value",
        title="KL(q‖p) of the digits VAE, in nats per image",
    )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Train a VAE on digits with a KL loss from torch_klloss.")
    parser.add_argument("--prior", choices=("normal", "laplace", "student-t", "mixture"), default="normal")
    parser.add_argument("--kl", choices=("auto", "analytic", "monte-carlo"), default="auto")
    parser.add_argument("--likelihood", choices=("bernoulli", "gaussian"), default="bernoulli")
    parser.add_argument("--num-samples", type=int, default=1, help="samples for a KL that is sampled (default 1)")
    parser.add_argument("--latent-dim", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--beta", type=float, default=1.0, help="weight of the KL (default 1)")
    parser.add_argument("--accelerator", default="auto", help="as in Lightning: auto, cpu, gpu, mps (default auto)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/vae_digits"), help="folder for the results")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train, report, and draw."""
    args = parse_arguments(argv)
    torch.set_num_threads(1)  # small models are several times slower on two
    quiet("Checkpoint directory .* exists and is not empty")  # --resume
    pl.seed_everything(args.seed, verbose=False)
    console = Console()
    checkpoint = args.out / "checkpoints" / "last.ckpt"
    if args.resume and not checkpoint.exists():
        raise SystemExit(f"--resume needs {checkpoint}, which does not exist: run without --resume first.")
    if not args.resume:
        for folder in ("csv", "tensorboard", "checkpoints"):
            shutil.rmtree(args.out / folder, ignore_errors=True)

    train, validation = load_images(args.likelihood)
    options = ("prior", "kl", "likelihood", "num_samples", "latent_dim", "beta")
    model = VAE(**{name: getattr(args, name) for name in options})
    with torch.no_grad():
        q = model.posterior(train[:2])
        try:
            route = model.loss.kl.route(q, model.prior(q))
        except NotImplementedError as error:
            raise SystemExit(f"{error} With --kl auto the same script samples.") from None
    console.print(f"prior {args.prior}: the KL takes the route {route!r}")

    gap = EstimatorGap(every_n_steps=10)
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        accelerator=args.accelerator,
        devices=1,
        logger=[
            CSVLogger(args.out, name="csv", version=f"run_{len(list(args.out.glob('csv/*'))):03d}"),
            TensorBoardLogger(args.out, name="tensorboard"),
        ],
        callbacks=[gap, TQDMProgressBar(), ModelCheckpoint(args.out / "checkpoints", save_last=True)],
        log_every_n_steps=10,
        enable_model_summary=False,
    )
    trainer.fit(
        model,
        DataLoader(TensorDataset(train), batch_size=128, shuffle=True),
        DataLoader(TensorDataset(validation), batch_size=len(validation)),
        ckpt_path=checkpoint if args.resume else None,
    )

    rows = read_metrics(args.out / "csv")
    write_metrics(rows, args.out / "metrics.csv")
    report(rows, route, console)
    figures = {
        args.out / "images.png": draw_images(model, validation[:12]),
        args.out / "kl_gap.png": draw_gap(rows, route, gap.num_samples),
    }
    for file, figure in figures.items():
        figure.savefig(file)
    console.print(f"figures: {', '.join(map(str, figures))}; metrics: {args.out / 'metrics.csv'}", soft_wrap=True)


if __name__ == "__main__":
    main()
