"""Base of the callbacks that observe the losses of a LightningModule."""

from __future__ import annotations

import importlib
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_klloss.distributions.tensors import device_of
from torch_klloss.estimate import KLEstimate
from torch_klloss.losses import Call, KLLoss
from torch_klloss.methods import ClosedForm, Enumeration, FirstOf
from torch_klloss.numerics.arguments import call_of, check_integer, check_text
from torch_klloss.numerics.devices import has_float64
from torch_klloss.rng import replayed_rng


def _callback_bases() -> tuple[type, ...]:
    """Return the `Callback` class of every Lightning package that is installed.

    The two packages have unrelated classes of the same name; a callback that derives from both works in the Trainer and
    the command line of either.
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


if TYPE_CHECKING:
    import lightning.pytorch
    import pytorch_lightning

    class Callback(pytorch_lightning.Callback, lightning.pytorch.Callback):
        """Base of the callbacks, for every Lightning package."""
else:
    Callback = type("Callback", _callback_bases(), {"__doc__": "Base of the callbacks, for every Lightning package."})

AllRanks = Callable[[Tensor], Tensor]  # sums a tensor over the ranks

EXACT = FirstOf(ClosedForm(), Enumeration())

_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # names of the module in a wrapper


class StepCounter(Callback):
    """Base of the callbacks that count training steps: batches in which an optimiser stepped.

    So accumulated gradients count once, and so do several optimisers in one batch. The count goes on in a resumed run
    and in a second `fit` of the same Trainer; a new Trainer begins anew. What is logged begins anew with every `fit`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._num_steps = 0  # under manual optimisation, where Lightning counts every batch
        self._num_optimizer_steps = 0  # before the current batch
        self._rank = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Begin anew; the count of steps goes on where the Trainer does. A checkpoint is restored after this."""
        self._rank = trainer.global_rank
        if stage == "fit":
            if trainer.global_step == 0:
                self._num_steps = 0
            self.reset()

    def __repr__(self) -> str:
        return call_of(type(self), vars(self))

    def reset(self) -> None:
        """Forget what belongs to an earlier `fit`."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note how far the optimisers are."""
        self._num_optimizer_steps = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the batch if an optimiser stepped in it."""
        self._num_steps += trainer.global_step > self._num_optimizer_steps

    def steps_taken(self, trainer: Any) -> int:
        """Return how many batches before the current one have stepped an optimiser."""
        if trainer.lightning_module.automatic_optimization:
            return int(trainer.fit_loop.epoch_loop._batches_that_stepped)
        return self._num_steps

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps."""
        return {"steps": self._num_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of steps."""
        self._num_steps = state_dict.get("steps", 0)

    def warn(self, message: str) -> None:
        """Warn, on the first rank alone."""
        if self._rank == 0:
            warnings.warn(message, UserWarning, stacklevel=3)


class LossWatcher(StepCounter):
    """Base of the callbacks that measure losses: an observer of every `KLLoss` on the first and every n-th step.

    A step in which no loss computes a KL is made up for by the next one that has a KL; if none ever has, a warning says
    so at the end of training.

    Subclasses define what they take from a call (`measure`, run under `no_grad`) and what is logged at the end of the
    step (`collect`). On all other steps the losses have no observer. Only if a part of the module is compiled it stays:
    a graph that was traced without an observer would never call one.

    Args:
        every_n_steps: measure the first step and every n-th after it.
        prefix: the beginning of the logged names.

    Raises:
        ValueError: if `every_n_steps` is below 1.
    """

    advice = "Keep the loss as an attribute of the module (self.kl = AutoKL())."
    measures_training = True
    kinds: tuple[type[nn.Module], ...] = (KLLoss,)  # of the losses that are watched
    pairs: Any = None  # in a subclass, a function that gives pairs to measure beside the losses

    def __init__(self, every_n_steps: int, prefix: str) -> None:
        super().__init__()
        check_integer("every_n_steps", every_n_steps)
        check_text("prefix", prefix)
        self.every_n_steps = every_n_steps
        self.prefix = prefix
        self._losses: dict[Any, tuple[str, nn.Module]] = {}
        self._is_compiled = False
        self._step: int | None = None  # the step that is being measured, None on all others
        self._last_step = -1
        self._is_due = False  # a measured step had no KL
        self._has_measured = False
        self._calls: Counter[str] = Counter()

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint: callbacks of one class differ by their prefix."""
        return f"{type(self).__qualname__}(prefix={self.prefix!r})"

    def measure(self, name: str, call: Any) -> None:
        """Take what is needed from a call; training's random stream must stay where it is.

        A second call of the same loss in a step has the name `<path>.1`, and so on.
        """
        raise NotImplementedError

    def collect(self, all_ranks: AllRanks) -> dict[str, float]:
        """Return the values to log, by name without the prefix."""
        raise NotImplementedError

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find every `KLLoss`, or warn that there is none."""
        self._last_step, self._is_due, self._has_measured = -1, False, False
        self._find_losses(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Decide whether this step is measured."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.measures_training:
            step = self.steps_taken(trainer)
            if self._is_due or (step % self.every_n_steps == 0 and step != self._last_step):
                self._open(step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the measurements of the step."""
        if self._step is not None:
            self._log(trainer, self._step)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Warn if no KL was seen."""
        if self._is_due and not self._has_measured:
            names = ", ".join(repr(path) for path, _ in self._losses.values())
            self.warn(
                f"{type(self).__name__} has logged nothing: no training step that it looked at computed a KL with "
                f"{names}. Call the loss, or its estimate, in training_step."
            )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the losses."""
        self._stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the losses: Lightning calls no teardown if `fit` raises."""
        self._stop()

    @torch.compiler.disable
    def observe(self, call: Any) -> None:
        """Measure a call, if the step is one of those that are measured."""
        if self._step is None:
            return
        self._has_measured = True
        path, _ = self._losses[call.loss]
        name = f"{path}.{self._calls[path]}" if path in self._calls else path
        self._calls[path] += 1
        with torch.no_grad():
            self.measure(name, call)

    def _seed(self, seed: int) -> int:
        """Return a seed for every (seed, rank, step, call): draws that nothing else in training shares."""
        words = (seed, self._rank, self._step or 0, self._calls.total())
        mixed = 0
        for word in words:
            mixed = (mixed * 1_000_003 + word + 1) % (2**63 - 1)
        return mixed

    def _open(self, step: int) -> None:
        """Begin to measure; `step` makes this measurement's draws differ from those of others."""
        self._forget()
        self._step = step
        self._start()

    def _log(self, trainer: Any, step: int) -> None:
        """End the measurement and log it."""
        self._last_step = step
        self._is_due = not self._calls and self.pairs is None and bool(self._losses)
        metrics = self.collect(partial(trainer.strategy.reduce, reduce_op="sum"))
        self._step = None
        self._forget()
        if not self._is_compiled:
            self._stop()
        publish(trainer, {f"{self.prefix}/{name}": value for name, value in metrics.items()}, step)

    def _find_losses(self, pl_module: Any) -> None:
        self._stop()
        self._losses = losses_of(pl_module, self.kinds)
        self._is_compiled = any(_is_compiled(module) for module in pl_module.modules())
        if self._is_compiled:
            self._start()
        if not self._losses and self.pairs is None:
            self.warn(
                f"{type(self).__name__} found no KLLoss in {type(pl_module).__name__} and will log nothing. "
                f"{self.advice} Whether a KL that the module computes by hand is right, "
                "torch_klloss.audit_module(module, batch) says."
            )

    def _start(self) -> None:
        for loss, (_, called) in self._losses.items():
            if self not in loss.observers:
                loss.add_observer(self, called)

    def _stop(self) -> None:
        for loss in self._losses:
            loss.remove_observer(self)
        self._step = None
        self._forget()

    def _forget(self) -> None:
        self._calls.clear()


def losses_of(pl_module: nn.Module, kinds: tuple[type[nn.Module], ...] = (KLLoss,)) -> dict[Any, tuple[str, nn.Module]]:
    """Return the losses of some kinds in a module, each with its path and the module that is called in its place.

    That is the outermost wrapper of a loss that the compiler or FSDP has wrapped; the path is the one without wrappers.
    """
    losses: dict[Any, tuple[str, nn.Module]] = {}
    for path, module in pl_module.named_modules():
        loss = _unwrapped(module)
        if isinstance(loss, kinds) and loss not in losses:
            losses[loss] = ".".join(part for part in path.split(".") if part not in _WRAPPED), module
    return losses


def _unwrapped(module: nn.Module) -> nn.Module:
    for name in _WRAPPED:
        if isinstance(inner := module._modules.get(name), nn.Module):
            return _unwrapped(inner)
    return module


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def repeated(call: Call) -> KLEstimate:
    """Return the estimate of a call, from the same draws; the random streams stay where they are."""
    with replayed_rng(call.random_state, device_of(call.q)) as generator:
        return call.loss.estimate(call.q, call.p, generator=generator)


def publish(trainer: Any, metrics: dict[str, float], step: int) -> None:
    """Put the metrics into `trainer.callback_metrics`, for other callbacks, and send them to every logger once.

    The module's `log_dict` would take ten times as long, and would send the old values again at every
    `log_every_n_steps`.
    """
    if not metrics:
        return
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=step)


def wide(t: Tensor) -> Tensor:
    """Return the tensor in float64, or in float32 on a device without it."""
    return t.double() if has_float64(t.device) else t.float()
