"""What do the callbacks cost a training step of the digits VAE?

In one training run, another callback (or none) is switched on every 50 steps, in random order; each logs to a CSV file
once in its 50 steps. Two answers:

- "inside": the time spent in the callback's own code and hooks, as a share of the steps without any callback; both are
  medians over the rounds.
- "blocks": how much longer its blocks of 50 steps are than blocks without a callback, as the median over the rounds,
  with quartiles. It includes what the callback costs outside of its own code, and is noisier.

Both are measured in processor time, which other programs affect less than wall time.

Checked before timing: the weights are bit for bit the same as without callbacks, the gap is within its error, and the
KL of the units adds up to the KL that training used; otherwise exit status 1. One thread.
"""

from __future__ import annotations

import gc
import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from common import Row, argument_parser, finish, median, quartiles, ratios, show
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from torch_klloss.callbacks import EstimatorGap, KLAnnealing, KLRoute, PosteriorCollapse
from torch_klloss.schedules import Linear

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from quiet import quiet
from vae_digits import VAE, load_images

BLOCK = 50
TARGETS = {"EstimatorGap": 0.02, "PosteriorCollapse": 0.01}
WATCHED = ("on_train_batch_start", "on_train_batch_end", "_before_call", "_after_call")
COLUMNS = {
    "callback": "callback, every 50 steps",
    "step_us": "step (µs)|.0f",
    "inside_us": "inside (µs a step)|.1f",
    "inside": "inside (% of a step)|.2f",
    "blocks": "blocks (%)|+.2f",
    "low": "from|+.2f",
    "high": "to|+.2f",
    "target": "target (%)|.0f",
}


def callbacks() -> dict[str, Any]:
    """Return the callbacks, without their figures, which are drawn after training."""
    return {
        "EstimatorGap": EstimatorGap(every_n_steps=BLOCK, figure=False),
        "PosteriorCollapse": PosteriorCollapse(every_n_steps=BLOCK, patience=10**6, figure=False),
        "KLRoute": KLRoute(every_n_steps=BLOCK),
        "KLAnnealing": KLAnnealing(Linear(start=1.0, steps=10), every_n_steps=BLOCK),
    }


class Switch(pl.Callback):
    """Passes the hooks on to one callback (or none) for a block of steps each, and records the times."""

    def __init__(self, callbacks: dict[str, Any]) -> None:
        super().__init__()
        self.callbacks = callbacks
        self.blocks: dict[str, list[float]] = {name: [] for name in ("none", *callbacks)}
        self.inside: dict[str, list[float]] = {name: [] for name in self.blocks}
        self._order: list[str] = []
        self._random = random.Random(0)
        self._name, self._begin, self._inside = "", 0.0, 0.0
        for callback in callbacks.values():
            for method in WATCHED:
                if hasattr(callback, method):
                    setattr(callback, method, partial(self._timed, getattr(callback, method)))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Pass it on to all of them."""
        for callback in self.callbacks.values():
            callback.on_fit_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        """Pass it on to the one that is switched on."""
        if trainer.global_step % BLOCK == 0:
            self._turn()
        if self._name in self.callbacks:
            self.callbacks[self._name].on_train_batch_start(trainer, *args)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """Pass it on to the one that is switched on."""
        if self._name in self.callbacks:
            self.callbacks[self._name].on_train_batch_end(trainer, *args)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """End the last block."""
        self._turn()

    def _turn(self) -> None:
        """End a block and begin the next."""
        now = time.process_time()
        if self._name:
            self.blocks[self._name].append(now - self._begin)
            self.inside[self._name].append(self._inside)
        self._inside = 0.0
        if not self._order:
            self._order = self._random.sample(list(self.blocks), len(self.blocks))
        self._name = self._order.pop()
        self._begin = time.process_time()

    def _timed(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        begin = time.process_time()
        method(*args, **kwargs)
        self._inside += time.process_time() - begin


def train(steps: int, callbacks: list[Any], folder: str | None) -> VAE:
    """Train the digits VAE for `steps` steps, and return it."""
    pl.seed_everything(0, verbose=False)
    images = TensorDataset(load_images("bernoulli")[0])
    model = VAE()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=CSVLogger(folder, name="", version="") if folder else False,
        log_every_n_steps=BLOCK,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=callbacks,
    )
    sampler = RandomSampler(images, replacement=True, num_samples=128 * steps)
    trainer.fit(model, DataLoader(images, batch_size=128, sampler=sampler))
    return model


def disagreements() -> list[str]:
    """Return the disagreements: wrong logged values, or weights that the callbacks changed."""
    named = callbacks()
    watchers = [named[name] for name in ("EstimatorGap", "PosteriorCollapse", "KLRoute")]
    plain, watched = train(BLOCK + 1, [], None), train(BLOCK + 1, watchers, None)
    wrong = []
    if not all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True)):
        wrong.append("the weights differ from a training without callbacks")
    gaps, units = (named[name].history["loss.kl"] for name in ("EstimatorGap", "PosteriorCollapse"))
    for gap, unit in zip(gaps, units, strict=True):
        if abs(gap["gap_z"]) > 6:
            wrong.append(f"step {gap['step']:.0f}: the gap is {gap['gap_z']:.1f} standard errors")
        # 8 float32 units an example, whose means are summed in float64
        if abs(sum(unit["kl"]) - gap["value"]) > 16 * torch.finfo(torch.float32).eps * gap["value"]:
            wrong.append(f"step {gap['step']:.0f}: units of {sum(unit['kl'])} nats for a KL of {gap['value']}")
    return wrong


def measure(rounds: int, warm_up: int) -> list[Row]:
    """Return one row for every callback, and one for training without a callback.

    In the rounds of warm-up the CSV file gets its columns, and the allocator its memory.
    """
    switch = Switch(callbacks())
    with tempfile.TemporaryDirectory() as folder:
        gc.collect()
        gc.disable()
        try:
            train(BLOCK * len(switch.blocks) * (rounds + warm_up), [switch], folder)
        finally:
            gc.enable()
    blocks = {name: seconds[warm_up:] for name, seconds in switch.blocks.items()}
    step = median(blocks["none"]) / BLOCK
    rows: list[Row] = []
    for name, seconds in blocks.items():
        inside = median(switch.inside[name][warm_up:]) / BLOCK
        low, middle, high = (100 * (r - 1) for r in quartiles(ratios(seconds, blocks["none"])))
        rows.append(
            {
                "callback": name,
                "step_us": 1e6 * median(seconds) / BLOCK,
                "inside_us": 1e6 * inside,
                "inside": 100 * inside / step,
                "blocks": middle,
                "low": low,
                "high": high,
                "target": 100 * TARGETS[name] if name in TARGETS else None,
            }
        )
    return rows


def main() -> int:
    """Check, time, print; return the exit status."""
    arguments = argument_parser(__doc__).parse_args()
    torch.set_num_threads(1)
    quiet(".*have no `val_dataloader`.*")  # nothing but steps
    wrong = disagreements()
    rows = measure(1, warm_up=0) if arguments.quick else measure(30, warm_up=2)
    show("digits VAE, batches of 128, one row a callback", rows, COLUMNS)
    for row in rows:
        if row["target"] is not None:
            print(f"{row['callback']}: {row['inside']:.2f} % of a training step; target: below {row['target']:.0f} %")
    return finish(arguments.json, rows, wrong)


if __name__ == "__main__":
    raise SystemExit(main())
