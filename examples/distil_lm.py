"""Distil a language model of bytes into a smaller one: from all of its logits, from its likeliest bytes, from draws.

    python examples/distil_lm.py --out runs/distil_lm

The text is the reference of Python's own help(), which ships with it. Every student has the same size, steps and
batches; what differs is how much of the teacher it sees. How far it is in the end, the exact KL on held-out text says.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar
from quiet import quiet
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torch_klloss.language import DistillationLoss, SparseTeacher, token_kl
from torch_klloss.plots import BLUE, GREEN, VERMILION, new_figure, tidy_axes

LENGTH, BATCH, HELD_OUT = 96, 16, 64  # bytes a window, windows a batch, held-out windows
NUM_BYTES, KNOWN = 256, 6  # the vocabulary; how many bytes of a teacher are known in part
STYLES = {"full": (BLUE, "-"), f"top {KNOWN}": (VERMILION, (0, (4, 2))), f"{KNOWN} draws": (GREEN, (0, (1, 1.2)))}


class ByteModel(nn.Module):
    """A causal transformer: ids `[batch, time]` to the logits of the byte that follows each."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(NUM_BYTES, width), nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, NUM_BYTES)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits `[batch, time, 256]`."""
        x = self.bytes(ids) + self.places.weight
        return self.head(self.layers(x, mask=self.mask, is_causal=True))


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean cross-entropy of the bytes that follow, in nats."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Teacher(pl.LightningModule):
    """A model that learns from the text."""

    def __init__(self) -> None:
        super().__init__()
        self.model = ByteModel(width=128, num_layers=2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of the text."""
        return cross_entropy(self.model(batch[0]), batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Use Adam."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class Student(pl.LightningModule):
    """A smaller model that learns from a teacher alone, of which it sees what `knows` says."""

    def __init__(self, teacher: nn.Module, knows: str) -> None:
        super().__init__()
        self.model = ByteModel(width=64, num_layers=1)
        self.teacher = teacher.requires_grad_(False)
        self.knows = knows
        self.loss = DistillationLoss(shift=1)
        self.history: list[tuple[int, float, float]] = []

    def known(self, ids: Tensor) -> Tensor | SparseTeacher:
        """Return what is known of the teacher's distributions."""
        with torch.no_grad():
            logits = self.teacher(ids)
            if self.knows == "full":
                return logits
            log_probs = logits.log_softmax(-1)
            if self.knows.startswith("top"):
                best = log_probs.topk(KNOWN)
                return SparseTeacher(best.indices, best.values)
            drawn = log_probs.exp().flatten(0, 1).multinomial(KNOWN, replacement=True).view(*ids.shape, KNOWN)
            return SparseTeacher.sampled(drawn, log_probs.gather(-1, drawn))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return KL(teacher‖student), or what is known of it, in nats a byte."""
        return self.loss(student=self.model(batch[0]), teacher=self.known(batch[0]), labels=batch[0])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Record the exact KL and the cross-entropy of the held-out text."""
        (ids,) = batch
        logits = self.model(ids)
        kl = token_kl(self.teacher(ids), logits)[:, :-1].mean()
        self.log("val/kl", kl, prog_bar=True)
        if not self.trainer.sanity_checking:
            self.history.append((self.global_step, kl.item(), cross_entropy(logits, ids).item()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Use Adam."""
        return torch.optim.AdamW(self.model.parameters(), lr=3e-3)


def windows() -> tuple[Tensor, Tensor]:
    """Return windows of the text for training and, from its end, held-out ones, `[n, time]`."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    parts = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return parts[: -4 * HELD_OUT], parts[-4 * HELD_OUT :: 4]


def fit(module: pl.LightningModule, steps: int, seed: int) -> None:
    """Train for so many steps; of modules with the same seed, on the same batches."""
    train, held_out = windows()
    trainer = pl.Trainer(
        max_steps=steps, val_check_interval=max(1, steps // 10), check_val_every_n_epoch=None, accelerator="cpu",
        logger=False, enable_checkpointing=False, enable_model_summary=False, callbacks=[TQDMProgressBar(25)],
    )  # fmt: skip
    pl.seed_everything(seed, verbose=False)
    loaders = [DataLoader(TensorDataset(train), BATCH, shuffle=True, drop_last=True)]
    if isinstance(module, Student):
        loaders.append(DataLoader(TensorDataset(held_out), len(held_out)))
    trainer.fit(module, *loaders)


def peak_memory(student: Student, ids: Tensor) -> float:
    """Return the peak of the memory of a loss with its gradient, beyond its logits, in logits tensors."""
    known, logits = student.known(ids), student.model(ids).detach().requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        student.loss(student=logits, teacher=known, labels=ids).backward()
    used = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            used += event.nbytes()
            peak = max(peak, used)
    return peak / logits.nbytes


def draw(students: list[Student], path: Path) -> None:
    """Draw the exact KL of every student over the steps."""
    figure = new_figure(9, 4.2)
    axes = figure.subplots()
    for student in students:
        colour, style = STYLES[student.knows]
        steps, kl, _ = zip(*student.history, strict=True)
        axes.plot(steps, kl, color=colour, linestyle=style, marker="o", markersize=3, label=student.knows)
    axes.set(xlabel="training step", ylabel="KL(teacher‖student), nats a byte", ylim=(0, None))
    axes.legend(title="known of the teacher", frameon=False)
    tidy_axes(axes)
    figure.suptitle("Exact KL of the students to their teacher on held-out text")
    figure.savefig(path)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train the teacher and its students; print a table, draw a figure, and return the exact KL of each student."""
    parser = argparse.ArgumentParser(description="Distil a byte-level language model into a smaller one.")
    parser.add_argument("--steps", type=int, default=250, help="of a student; the teacher takes twice as many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/distil_lm"), help="folder for the figure")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # small models are several times slower on two
    quiet(".*does not have many workers.*")
    args.out.mkdir(parents=True, exist_ok=True)

    pl.seed_everything(args.seed, verbose=False)
    teacher = Teacher()
    fit(teacher, 2 * args.steps, args.seed)
    _, held_out = windows()
    with torch.no_grad():
        own = cross_entropy(teacher.model(held_out), held_out).item()

    console, students = Console(width=110), []
    table = Table(
        title=f"held-out text, after {args.steps} steps; the teacher's own cross-entropy is {own:.3f} nats a byte"
    )
    for column in ("known of the teacher", "cross-entropy", "exact KL to the teacher", "peak memory of the loss"):
        table.add_column(column, justify="right" if students or column[0] != "k" else "left")
    for knows in STYLES:
        pl.seed_everything(args.seed, verbose=False)
        students.append(Student(teacher.model, knows))
        fit(students[-1], args.steps, args.seed)
        _, kl, entropy = students[-1].history[-1]
        table.add_row(knows, f"{entropy:.3f}", f"{kl:.4f}", f"{peak_memory(students[-1], held_out):.2f} logits")
    path = args.out / "kl.png"
    draw(students, path)
    console.print(table)
    console.print(
        f"in nats (a byte); the memory includes the gradient, which is 1.00 of the logits; figure: {path}",
        soft_wrap=True,
    )
    return {student.knows: student.history[-1][1] for student in students}


if __name__ == "__main__":
    main()
