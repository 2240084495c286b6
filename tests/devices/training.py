"""Short trainings on the pretended device."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import Accelerator
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils.data import DataLoader, TensorDataset

from tests.devices.pretended import COUNTS, NAME, pretended
from tests.processes import ROOT
from torch_klloss import ELBOLoss, callbacks, diagonal_normal, schedules

sys.path.insert(0, str(ROOT / "examples"))
NUM_STEPS = 10
PRIORS = ("normal", "laplace", "mixture")


def train_digits(prior: str, device: str) -> tuple[list[float], list[Tensor], list[int]]:
    """Return the losses of ten steps of the digits VAE, its weights after them, and the waits of each step."""
    from vae_digits import VAE, load_images

    torch.manual_seed(0)
    model, (images, _) = VAE(prior=prior), load_images("bernoulli")
    model = model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses, waits = [], []
    for batch in images[: 64 * NUM_STEPS].split(64):
        x = batch.to(device)
        before = COUNTS.num_waits
        optimizer.zero_grad()
        loss = model.terms(x).loss
        loss.backward()
        optimizer.step()
        waits.append(COUNTS.num_waits - before)
        losses.append(loss.item())
    return losses, [t.detach().cpu() for t in model.parameters()], waits


def compare_digits(prior: str) -> dict[str, Any]:
    """Return how far the training on the device, with and without float64, is from that on the CPU, and its waits."""
    expected, weights, _ = train_digits(prior, "cpu")
    found: dict[str, Any] = {"fall": expected[0] - expected[-1]}
    for float64 in (True, False):
        with pretended(float64=float64):
            losses, ours, waits = train_digits(prior, NAME)
        distance = max((a - b).abs().max().item() / b.abs().max().item() for a, b in zip(ours, weights, strict=True))
        gap = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
        found[f"float64={float64}"] = {"losses": gap, "weights": distance, "waits": waits[-1]}
    return found


class PretendedAccelerator(Accelerator):
    """The device, for Lightning."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


class SmallVAE(pl.LightningModule):
    """A VAE of two linear maps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.encoder, self.decoder = nn.Linear(5, 6), nn.Linear(3, 5)
        self.loss = ELBOLoss()
        self.waits: list[int] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        q = diagonal_normal(*self.encoder(batch[0]).chunk(2, -1))
        terms = self.loss.from_tensors(
            self.decoder(q.rsample()), batch[0], q.mean, q.base_dist.logvar, likelihood="gaussian"
        )
        return terms.loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.waits.append(COUNTS.num_waits)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(callback: Any | None, on_device: bool) -> tuple[SmallVAE, dict[str, float]]:
    """Train, and return the module with the metrics that the callback has logged."""
    model = SmallVAE()
    torch.manual_seed(5)
    batches = DataLoader(TensorDataset(torch.randn(32, 5)), batch_size=8)
    strategy = SingleDeviceStrategy(torch.device(NAME, 0), PretendedAccelerator()) if on_device else "auto"
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="auto" if on_device else "cpu",
        strategy=strategy,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[] if callback is None else [callback],
    )
    trainer.fit(model, batches)
    return model, {key: float(value) for key, value in trainer.callback_metrics.items()}


def make(name: str) -> Any:
    """Return a callback that logs at the first step alone, if it does at all."""
    kind = getattr(callbacks, name)
    return kind(schedules.Linear(steps=10)) if name == "KLAnnealing" else kind(every_n_steps=1000)


def compare_callback(name: str, float64: bool) -> dict[str, Any]:
    """Return what a callback logs on the CPU and on the device, and its waits in a step where it logs nothing."""
    _, expected = fit(make(name), on_device=False)
    with pretended(float64=float64):
        model, found = fit(make(name), on_device=True)
        plain, _ = fit(None, on_device=True)
    waits, usual = (m.waits[-1] - m.waits[-2] for m in (model, plain))
    return {"expected": expected, "found": found, "waits": waits - usual}


def report() -> None:
    """Print all comparisons."""
    torch.set_num_threads(1)
    Distribution.set_default_validate_args(False)
    warnings.simplefilter("ignore")  # Lightning's own
    with pretended():  # which is before the first backward pass
        pass
    digits = {prior: compare_digits(prior) for prior in PRIORS}
    logged = {name: [compare_callback(name, float64) for float64 in (True, False)] for name in callbacks.__all__}
    print(json.dumps({"digits": digits, "callbacks": logged}))
