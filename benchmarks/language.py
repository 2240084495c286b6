"""What do the losses of `torch_klloss.language` cost in memory and time, and how many digits are right?

A step is the loss of `[tokens, vocabulary]` logits and its gradient to the student. Every route is compared with the
formulas that people use: `F.kl_div` of the log-softmaxes in the logits' own dtype and after `.float()`, the sum of
q (log q - log p), and `torch.distributions`. A head is compared with its product and the loss of it, and with torch's
`F.linear_cross_entropy`, which has hard labels.

- Memory is the peak of what torch's allocator holds during a step beyond its inputs and gradients, as a multiple of one
  logits tensor in its own dtype. A number above its target gives exit status 1.
- Errors are against float64 of the same logits: of the value at three KLs, and of the gradient in norm.
- Times are ratios to `F.kl_div` after `.float()`, medians over rounds in which the peers take turns. One thread.

    python benchmarks/language.py --figures benchmarks/figures
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Row, argument_parser, finish, interleaved, median, quartiles, ratios, show
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.distributions import kl_divergence as torch_kl
from torch.nn.functional import kl_div, linear

from torch_klloss.language import (
    DistillationLoss,
    ForwardKL,
    Jeffreys,
    JensenShannon,
    LinearHead,
    ReverseKL,
    SkewKL,
    token_kl,
)
from torch_klloss.language.divergences import Divergence
from torch_klloss.plots import BLUE, GREEN, INK, VERMILION, new_figure, tidy_axes

Step = Callable[[], Any]
DIVERGENCES: tuple[Divergence, ...] = (ForwardKL(), ReverseKL(), Jeffreys(), JensenShannon(), SkewKL())
QUICK = (8, 4000)
SIZES = ((128, 32_000), (64, 128_256), (32, 256_000))
TARGETS = {(128, 32_000): (0.10, 0.15), (64, 128_256): (0.10, 0.15), (32, 256_000): (0.25, 0.35)}  # 4 and 2 bytes
HEAD = (512, 128, 16_000)  # tokens, hidden, vocabulary
HEAD_TARGET = 0.40
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAWS = {
    "peaked": (1.5, 2.0),
    "flat": (1.0, 1.0),
    "near": (1e-3, 2.0),
}  # distance and standard deviation of the logits; KLs of about 1, 0.5 and 5e-7
DISTANCES = (1.5, 0.14, 0.032)  # of the logits: KLs of about 1, 1e-2 and 5e-4
MEMORY = {"size": "tokens x V", "dtype": "logits", "loss": "loss", "valid": "valid|.0%", "to": "gradient to",
          "memory": "logits tensors|.3f", "target": "target|.2f"}  # fmt: skip
TIMES = {"size": "tokens x V", "dtype": "logits", "law": "laws", "loss": "loss", "valid": "valid|.0%",
         "ms": "ms|.1f", "ratio": "÷ F.kl_div upcast|.2f", "range": "quartiles"}  # fmt: skip
ERRORS = {"dtype": "logits", "loss": "loss", "kl": "KL|.1e", "error": "value|.1e", "gradient": "gradient|.1e"}


def logits(
    size: tuple[int, int], dtype: torch.dtype, distance: float = 1.5, scale: float = 2.0
) -> tuple[Tensor, Tensor]:
    """Return the logits of a teacher, with a standard deviation, and of a student at a distance from it."""
    generator = torch.Generator().manual_seed(0)
    teacher = scale * torch.randn(size, generator=generator)
    student = teacher + distance * torch.randn(size, generator=generator)
    return teacher.to(dtype), student.to(dtype).requires_grad_()


def by_kl_div(teacher: Tensor, student: Tensor) -> Tensor:
    return kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")


def by_hand(teacher: Tensor, student: Tensor) -> Tensor:
    return (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1).mean()


def by_distributions(teacher: Tensor, student: Tensor) -> Tensor:
    return torch_kl(Categorical(logits=teacher), Categorical(logits=student)).mean()


PEERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "F.kl_div": by_kl_div,
    "F.kl_div upcast": lambda t, s: by_kl_div(t.float(), s.float()),
    "by hand": by_hand,
    "torch.distributions": by_distributions,
}


def ours(divergence: Divergence, mask: Tensor | None, teacher: Tensor, student: Tensor) -> Tensor:
    value: Tensor = DistillationLoss(divergence)(student=student, teacher=teacher, mask=mask)
    return value


def step(loss: Callable[..., Tensor], *leaves: Tensor) -> None:
    """Take the loss and its gradient."""
    for leaf in leaves:
        leaf.grad = None
    loss(*leaves).backward()


def extra_memory(run: Step, leaves: tuple[Tensor, ...]) -> int:
    """Return the peak of the allocated bytes during a step, less the gradients that it leaves."""
    run()  # what is loaded at the first call stays loaded
    for leaf in leaves:
        leaf.grad = None
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    used = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            used += event.nbytes()
            peak = max(peak, used)
    return peak - sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)


def share_of(num_tokens: int, valid: float) -> Tensor | None:
    """Return a mask of the valid tokens, scattered over all."""
    if valid == 1:
        return None
    return torch.rand(num_tokens, generator=torch.Generator().manual_seed(1)) < valid


def memory_rows(
    size: tuple[int, int], dtype: torch.dtype, divergences: tuple[Divergence, ...], compiled: bool
) -> list[Row]:
    """Return the memory of every divergence, with a mask, with both gradients and compiled, and of the peers."""
    teacher, student = logits(size, dtype)
    target = TARGETS[size][dtype.itemsize < 4] if size in TARGETS else None
    rows = []

    def row(name: str, loss: Callable[..., Tensor], valid: float, to: str, target: float | None) -> None:
        leaves = (teacher, student) if to == "both" else (student,)
        for t in (teacher, student):
            t.requires_grad_(any(t is leaf for leaf in leaves)).grad = None
        memory = extra_memory(partial(step, loss, teacher, student), leaves) / student.nbytes
        rows.append({"size": _by(size), "dtype": _name(dtype), "loss": name, "valid": valid, "to": to,
                     "memory": memory, "target": target})  # fmt: skip

    for divergence in divergences:
        for valid, to in ((1.0, "student"), (0.5, "student"), (1.0, "both")):
            row(repr(divergence), partial(ours, divergence, share_of(size[0], valid)), valid, to, target)
    for divergence in divergences[:2] if compiled else ():
        torch.compiler.reset()
        loss = torch.compile(partial(ours, divergence, None))
        row(f"{divergence!r}, compiled", loss, 1.0, "student", target)
    for name, peer in PEERS.items():
        row(name, peer, 1.0, "student", None)
    return rows


def time_rows(size: tuple[int, int], dtype: torch.dtype, law: str, rounds: int) -> list[Row]:
    """Return the times of ours, at three shares of valid tokens, and of the peers."""
    teacher, student = logits(size, dtype, *LAWS[law])
    routes: dict[tuple[str, float], Callable[..., Tensor]] = {
        **{(repr(d), 1.0): partial(ours, d, None) for d in DIVERGENCES},
        **{(repr(ForwardKL()), v): partial(ours, ForwardKL(), share_of(size[0], v)) for v in (0.5, 0.1)},
        **{(name, 1.0): peer for name, peer in PEERS.items()},
    }
    steps = {str(key): partial(step, loss, teacher, student) for key, loss in routes.items()}
    seconds = interleaved(steps, rounds)
    peer = seconds[str(("F.kl_div upcast", 1.0))]
    rows = []
    for (name, valid), key in zip(routes, steps, strict=True):
        low, ratio, high = quartiles(ratios(seconds[key], peer))
        rows.append({"size": _by(size), "dtype": _name(dtype), "law": law, "loss": name, "valid": valid,
                     "ms": 1e3 * median(seconds[key]), "ratio": ratio,
                     "range": f"{low:.2f} to {high:.2f}"})  # fmt: skip
    return rows


def error_rows(size: tuple[int, int], dtype: torch.dtype, distance: float) -> tuple[list[Row], list[str]]:
    """Return the relative errors of values and gradients, and the disagreements of ours."""
    teacher, student = logits(size, dtype, distance)
    wide = student.detach().double().requires_grad_()
    truth = by_hand(teacher.double(), wide)
    (gradient,) = torch.autograd.grad(truth, wide)
    rows = []
    for name, loss in {"ForwardKL()": partial(ours, ForwardKL(), None), **PEERS}.items():
        value = loss(teacher, student)
        (found,) = torch.autograd.grad(value, student)
        rows.append({"dtype": _name(dtype), "loss": name, "kl": truth.item(),
                     "error": abs(value.item() / truth.item() - 1),
                     "gradient": ((found.double() - gradient).norm() / gradient.norm()).item()})  # fmt: skip
    info = torch.finfo(dtype)  # the stored gradient rounds, below the normal numbers to a multiple of the smallest one
    rounding = info.eps / 2 * (1 + info.smallest_normal * gradient.numel() ** 0.5 / gradient.norm().item())
    is_off = rows[0]["error"] > 1e-6 or rows[0]["gradient"] > rounding + 1e-6
    return rows, [f"ours at a KL of {truth.item():.1e}, {_name(dtype)}: {rows[0]}"] if is_off else []


def head_rows(size: tuple[int, int, int], rounds: int) -> list[Row]:
    """Return memory and time of a head that is never multiplied out, and of its peers."""
    num_tokens, hidden, vocabulary = size
    torch.manual_seed(0)
    states, weight = (
        torch.randn(num_tokens, hidden).requires_grad_(),
        (0.1 * torch.randn(vocabulary, hidden)).requires_grad_(),
    )
    teacher, labels = torch.randn(num_tokens, vocabulary), torch.randint(vocabulary, (num_tokens,))
    routes: dict[str, Callable[..., Tensor]] = {
        "LinearHead": lambda h, w: token_kl(teacher, LinearHead(h, w)).mean(),
        "product and token_kl": lambda h, w: token_kl(teacher, linear(h, w)).mean(),
        "product and F.kl_div": lambda h, w: by_kl_div(teacher, linear(h, w)),
    }
    if hasattr(nn, "LinearCrossEntropyOptions"):
        for name, options in (("whole", None), ("chunked", nn.LinearCrossEntropyOptions())):
            routes[f"F.linear_cross_entropy, {name}"] = partial(_hard_labels, labels, options)
    steps = {name: partial(step, loss, states, weight) for name, loss in routes.items()}
    seconds = interleaved(steps, rounds)
    naive = seconds["product and F.kl_div"]
    return [
        {"size": "x".join(map(str, size)), "loss": name, "memory": extra_memory(run, (states, weight)) / teacher.nbytes,
         "target": HEAD_TARGET if name == "LinearHead" else None, "ms": 1e3 * median(seconds[name]),
         "ratio": median(ratios(seconds[name], naive))}
        for name, run in steps.items()
    ]  # fmt: skip


def _hard_labels(labels: Tensor, options: Any, states: Tensor, weight: Tensor) -> Tensor:
    """Return torch's cross-entropy of a head, which has no form for the laws of a teacher."""
    value: Tensor = nn.functional.linear_cross_entropy(states, weight, labels, options=options)  # type: ignore[attr-defined,unused-ignore]
    return value


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def figure(folder: Path, vocabularies: tuple[int, ...]) -> None:
    """Draw the memory of a step against the size of the vocabulary."""
    styles = {"ForwardKL()": (BLUE, "-"), "F.kl_div": (VERMILION, (0, (4, 2))),
              "F.kl_div upcast": (GREEN, (0, (1, 1.2))),
              "torch.distributions": (INK, (0, (4, 1, 1, 1)))}  # fmt: skip
    plot = new_figure(9, 4.2)
    for axes, dtype in zip(plot.subplots(1, 2, sharey=True), (torch.float32, torch.bfloat16), strict=True):
        for name, (colour, style) in styles.items():
            line = []
            for vocabulary in vocabularies:
                teacher, student = logits((32, vocabulary), dtype)
                loss = PEERS.get(name, partial(ours, ForwardKL(), None))
                line.append(extra_memory(partial(step, loss, teacher, student), (student,)) / 2**20)
            axes.plot(vocabularies, line, color=colour, linestyle=style, marker="o", markersize=3, label=name)
        gradient = [32 * v * dtype.itemsize / 2**20 for v in vocabularies]
        axes.plot(vocabularies, gradient, color="#999999", linewidth=1, label="the gradient itself")
        axes.set(title=_name(dtype), xlabel="vocabulary", xscale="log", yscale="log")
        tidy_axes(axes)
    plot.axes[0].set_ylabel("MiB beyond the gradient, 32 tokens")
    plot.suptitle("Memory of KL(teacher‖student) and its gradient")
    plot.legend(*plot.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    plot.savefig(folder / "language_memory.png")


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    parser = argument_parser(__doc__)
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="draw the memory against the vocabulary")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    quick = args.quick
    sizes, dtypes = ((QUICK,), DTYPES[:2]) if quick else (SIZES, DTYPES)
    divergences = (ForwardKL(), JensenShannon()) if quick else DIVERGENCES

    errors, disagreements = [], []
    for dtype in dtypes:
        for distance in DISTANCES[1:2] if quick else DISTANCES:
            rows, wrong = error_rows(QUICK if quick else (16, 32_000), dtype, distance)
            errors += rows
            disagreements += wrong
    show("relative errors against float64 of the same logits", errors, ERRORS)
    memory = [
        row for size in sizes for dtype in dtypes for row in memory_rows(size, dtype, divergences, compiled=not quick)
    ]
    show("peak memory of a step beyond its gradients", memory, MEMORY)
    head = head_rows((64, 32, 2000) if quick else HEAD, 1 if quick else 9)
    show("a head, its gradient to the hidden states and the weight; times ÷ product and F.kl_div", head, {
        "size": "tokens x hidden x V", "loss": "loss", "memory": "logits tensors|.3f", "target": "target|.2f",
        "ms": "ms|.1f", "ratio": "time|.2f"})  # fmt: skip
    times = [
        row
        for size in sizes
        for dtype in dtypes[:2]
        for law in (list(LAWS)[:1] if quick else LAWS)
        for row in time_rows(size, dtype, law, 1 if quick else 9)
    ]
    show("time of a step", times, TIMES)
    for row in memory if quick else (*memory, *head):
        if row["target"] is not None and row["memory"] > row["target"]:
            disagreements.append(f"{row['loss']} at {row['size']} takes {row['memory']:.3f} logits tensors")
    if args.figures is not None:
        figure(args.figures, (500, 1000) if quick else (1000, 4000, 16_000, 64_000, 256_000))
    return finish(args.json, [*errors, *memory, *head, *times], disagreements)


if __name__ == "__main__":
    sys.exit(main())
