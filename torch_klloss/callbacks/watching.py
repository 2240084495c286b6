"""Seeing the (q, p) of every KL in a LightningModule, without a change to the module."""

from __future__ import annotations

import importlib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from torch_klloss.distributions.checks import check_pair
from torch_klloss.distributions.tensors import device_of
from torch_klloss.elbo import ELBOLoss
from torch_klloss.elbo.batches import Batch
from torch_klloss.elbo.divergence import ElementwiseKL
from torch_klloss.losses import KLLoss
from torch_klloss.reduction import example_shape
from torch_klloss.rng import RngState, rng_state


def _callback_bases() -> tuple[type, ...]:
    """Return the `Callback` class of every Lightning package there is.

    The two packages have classes of the same name that know nothing of each other; a callback that derives from both
    is at home in the Trainer and the command line of either.
    """
    bases = []
    for package in ("pytorch_lightning", "lightning.pytorch"):
        try:
            bases.append(importlib.import_module(package).Callback)
        except ModuleNotFoundError:
            continue
    if not bases:
        raise ImportError(
            "torch_klloss.callbacks needs Lightning, which is not installed: pip install 'torch_klloss[lightning]' "
            "(pytorch-lightning), or pip install lightning."
        )
    return tuple(dict.fromkeys(bases))


Callback: Any = type("Callback", _callback_bases(), {"__doc__": "Base of the callbacks, for every Lightning package."})

AllRanks = Callable[[Tensor], Tensor]  # sums a tensor over the ranks

_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # what wrappers call the module in them


@dataclass(frozen=True)
class Call:
    """Hold one call of a loss: a second call in the same step has the name `<path>.1`, and so on.

    Attributes:
        name: where the loss is in the module.
        loss: the loss.
        q: what it was called with, without what is masked.
        p: likewise.
        batch: which elements of the pair count, and how much.
        reduction: how training reduces the examples; an `ELBOLoss` does what the KL inside of it does not.
        total: Σ w · KL over the examples, of what the loss returned.
        random_state: where the random streams stood before.
    """

    name: str
    loss: KLLoss
    q: Distribution
    p: Distribution
    batch: Batch
    reduction: str
    total: Tensor
    random_state: RngState


@dataclass(frozen=True)
class Watched:
    """Hold a loss of a module: its path, what is to be hooked, and how training reduces its examples."""

    path: str
    module: nn.Module
    loss: KLLoss
    reduction: str


class LossWatcher(Callback):
    """Base of the callbacks that watch losses: hooks in, a measurement, hooks out, on every n-th step.

    Subclasses say what they do with a call (`observe`, run under `no_grad`) and what is logged at the end of the step
    (`collect`). On all other steps there is no hook. Only where something is compiled the hooks stay: what was traced
    without them would never call them.

    Args:
        every_n_steps: measure the first step and every n-th after it.
        prefix: what the logged names begin with.

    Raises:
        ValueError: if `every_n_steps` is below 1.
    """

    way_out = "Keep the loss as an attribute of the module (self.kl = AutoKL())."

    def __init__(self, every_n_steps: int, prefix: str) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self.prefix = prefix
        self._watched: list[Watched] = []
        self._is_compiled = False
        self._handles: list[Any] = []
        self._step: int | None = None  # the step that is being measured, None on all others
        self._last_step = -1
        self._rank = 0
        self._calls: Counter[str] = Counter()
        self._random_states: list[RngState] = []

    def observe(self, call: Call) -> None:
        """Take what is needed from a call; training's random stream must stay where it is."""
        raise NotImplementedError

    def collect(self, all_ranks: AllRanks) -> dict[str, float]:
        """Return what is to be logged, by name without the prefix, and forget the step."""
        raise NotImplementedError

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find every `KLLoss`, or warn that there is none."""
        self._remove_hooks()
        self._last_step, self._rank = -1, trainer.global_rank
        self._watched = list(losses_of(pl_module))
        self._is_compiled = any(_is_compiled(module) for module in pl_module.modules())
        if self._is_compiled:
            self._add_hooks()
        if not self._watched and not self._has_other_source():
            warnings.warn(
                f"{type(self).__name__} found no KLLoss in {type(pl_module).__name__} and will log nothing. "
                f"{self.way_out}",
                UserWarning,
                stacklevel=2,
            )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Decide whether this step is measured."""
        step = steps_taken(trainer)
        if step % self.every_n_steps == 0 and step != self._last_step:
            self._open(step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log what the hooks have seen."""
        if self._step is not None:
            self._last_step = self._step
            metrics = self.collect(sum_over_ranks(trainer))
            self._close()
            publish(trainer, self._prefixed(metrics), self._last_step)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remove the hooks."""
        self._remove_hooks()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the hooks: Lightning calls no teardown where `fit` raises."""
        self._remove_hooks()

    @torch.compiler.disable
    def _before_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._step is not None:
            q, _, _, generator = _arguments(*args, **kwargs)
            self._random_states.append(rng_state(device_of(q), generator))

    @torch.compiler.disable
    def _after_call(self, watched: Watched, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        if self._step is None:
            return
        q, p, mask, _ = _arguments(*args, **kwargs)
        loss, output = watched.loss, wide(output.detach())
        if isinstance(module, ElementwiseKL):
            batch = module.batch
            total = batch.reduce(batch.per_example(output), "sum")
        else:
            q, p, mask = loss.drop_masked(q, p, mask)
            examples = example_shape(check_pair(q, p), loss.batch_dims)
            batch = Batch(examples, len(examples), mask)
            total = sum_of(output, batch, loss.reduction)
        calls = self._calls[watched.path]
        self._calls[watched.path] += 1
        name = f"{watched.path}.{calls}" if calls else watched.path
        with torch.no_grad():
            self.observe(Call(name, loss, q, p, batch, watched.reduction, total, self._random_states.pop()))

    def _seed(self, seed: int) -> int:
        """Return a seed for every (seed, rank, step, call): draws that nothing else in training shares."""
        words = (seed, self._rank, self._step or 0, self._calls.total())
        mixed = 0
        for word in words:
            mixed = (mixed * 1_000_003 + word + 1) % (2**63 - 1)
        return mixed

    def _has_other_source(self) -> bool:
        """Return whether there is something to log without a hook."""
        return False

    def _prefixed(self, metrics: dict[str, float]) -> dict[str, float]:
        return {f"{self.prefix}/{name}": value for name, value in metrics.items()}

    def _open(self, step: int) -> None:
        """Begin to measure; `step` tells this measurement's draws from those of others."""
        self._forget()
        self._step = step
        self._add_hooks()

    def _close(self) -> None:
        """Cease to measure."""
        if not self._is_compiled:
            self._remove_hooks()
        self._step = None
        self._forget()

    def _add_hooks(self) -> None:
        if self._handles:
            return
        for watched in self._watched:
            self._handles += [
                watched.module.register_forward_pre_hook(self._before_call, with_kwargs=True),
                watched.module.register_forward_hook(partial(self._after_call, watched), with_kwargs=True),
            ]

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._step = None
        self._forget()

    def _forget(self) -> None:
        self._calls.clear()
        self._random_states.clear()


def losses_of(pl_module: nn.Module) -> Iterator[Watched]:
    """Yield the losses of a module, each once.

    A loss that is wrapped, by the compiler or by FSDP, is hooked at its outermost wrapper, which is what the model
    calls; its path is the one it has without.
    """
    seen: set[nn.Module] = set()
    reductions: dict[nn.Module, str] = {}  # of those in an ELBOLoss, which comes before what is in it
    for path, module in pl_module.named_modules():
        loss = _unwrapped(module)
        if isinstance(loss, ELBOLoss):
            reductions[_unwrapped(loss.kl)] = loss.reduction
        if isinstance(loss, KLLoss) and loss not in seen:
            seen.add(loss)
            name = ".".join(part for part in path.split(".") if part not in _WRAPPED)
            yield Watched(name, module, loss, reductions.get(loss, loss.reduction))


def _unwrapped(module: nn.Module) -> nn.Module:
    for name in _WRAPPED:
        if isinstance(inner := module._modules.get(name), nn.Module):
            return _unwrapped(inner)
    return module


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def steps_taken(trainer: Any) -> int:
    """Return how many batches have stepped an optimiser: what Lightning's own callbacks count, resumed with it."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def sum_over_ranks(trainer: Any) -> AllRanks:
    """Return the function that sums a tensor over the ranks."""
    return partial(trainer.strategy.reduce, reduce_op="sum")


def publish(trainer: Any, metrics: dict[str, float], step: int) -> None:
    """Put the metrics where callbacks find them (`trainer.callback_metrics`), and send them to every logger once.

    Not by the module's `log_dict`: it takes ten times as long, and would send a step's value to the loggers again,
    stale, at every `log_every_n_steps`.
    """
    if not metrics:
        return
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=step)


def sum_of(output: Tensor, batch: Batch, reduction: str) -> Tensor:
    """Return Σ w · KL over the examples, given what a loss has made of it."""
    if reduction != "mean":
        return output.sum()
    weights = batch.example_weights
    return output * (math.prod(batch.elements) if weights is None else wide(weights).sum())


def wide(t: Tensor) -> Tensor:
    """Return the tensor in float64, or in float32 on Apple's devices, which have no other."""
    return t.float() if t.device.type == "mps" else t.double()


def _arguments(
    q: Distribution, p: Distribution, mask: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Distribution, Distribution, Tensor | None, torch.Generator | None]:
    """Bind the arguments of a call, by position or by name, as `KLLoss.forward` does."""
    return q, p, mask, generator
