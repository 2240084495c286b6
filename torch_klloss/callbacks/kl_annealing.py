"""Schedule of the KL's weight while Lightning trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from torch_klloss.callbacks.watching import StepCounter, publish
from torch_klloss.elbo import ELBOLoss
from torch_klloss.language.weight import Weighted
from torch_klloss.numerics.arguments import check_integer, check_text
from torch_klloss.schedules import Schedule

TimeUnit = Literal["step", "epoch"]

BATCHES_OF_A_PACE = 10  # that stepped, after which the pace of manual optimisation is taken


@dataclass(frozen=True)
class Pace:
    """How many batches, and steps of all optimisers together, make one step of training."""

    batches: float = 1.0
    optimizer_steps: float = 1.0

    def planned(self, trainer: Any, interval: TimeUnit) -> float:
        """Return how many steps, or epochs, the Trainer plans; infinity if it does not know."""
        batches, epochs = trainer.num_training_batches, trainer.max_epochs
        epochs = math.inf if epochs in (None, -1) else max(epochs, 1)
        if math.isfinite(batches):
            batches = math.ceil(batches / trainer.accumulate_grad_batches)
        most = math.inf if trainer.max_steps == -1 else trainer.max_steps / self.optimizer_steps
        steps = min(epochs * batches / self.batches, most)
        if interval == "epoch":
            steps = min(epochs, steps * self.batches / batches) if math.isfinite(batches) else math.inf
        return math.ceil(steps) if math.isfinite(steps) else math.inf


class KLAnnealing(StepCounter):
    """Set the weight of the KL before every training batch, by a schedule.

    Sets the `beta` of every `ELBOLoss` and the `weight` of every `DistillationLoss` and `ReferenceKL` in the
    LightningModule, or the one attribute that you name. The step is counted
    as Lightning's own callbacks count it (batches that stepped an optimiser, so that accumulated gradients count once)
    and is restored from a checkpoint: a resumed run goes on in mid-schedule. A validation uses the weight of the
    training batch before it; `trainer.validate` and `trainer.test` from a checkpoint use the weight saved in it.

    Logged as `kl/beta` on every n-th step. If the warm-up is longer than the training that the Trainer plans, a warning
    names the weight that will be reached.

    Args:
        schedule: takes a step and returns a weight: one of `torch_klloss.schedules`, or a function.
        attribute: the attribute to set instead of `ELBOLoss.beta`: a path from the LightningModule, such as "beta",
            "loss.weight" or "hparams.beta". A tensor is filled in place, everything else is replaced by a float.
        interval: whether the schedule counts in steps or in epochs.
        every_n_steps: log the weight of the first step and of every n-th after it.
        prefix: the beginning of the logged name.

    Raises:
        TypeError: if `schedule` cannot be called.
        ValueError: if `interval` is neither word or `every_n_steps` is below 1; when training starts, if the module has
            no such attribute, or the schedule gives a weight that is negative or not finite.

    References:
        *Generating sentences from a continuous space* (Bowman et al., 2016), section 3.1.
        *Ladder variational autoencoders* (Sønderby et al., 2016).

    Examples:
        >>> from torch_klloss.callbacks import KLAnnealing
        >>> from torch_klloss.schedules import Linear
        >>> callback = KLAnnealing(Linear(steps=1000))  # Trainer(callbacks=[callback])
        >>> by_epoch = KLAnnealing(Linear(stop=4.0, steps=10), attribute="beta", interval="epoch")
    """

    def __init__(
        self,
        schedule: Schedule | Callable[[float], float],
        attribute: str | None = None,
        interval: TimeUnit = "step",
        every_n_steps: int = 50,
        prefix: str = "kl",
    ) -> None:
        super().__init__()
        if not callable(schedule):
            raise TypeError(
                f"schedule must take a step and return a weight, as Linear(steps=1000) does, got {schedule!r}."
            )
        if interval not in get_args(TimeUnit):
            raise ValueError(f"interval must be 'step' or 'epoch', got {interval!r}.")
        check_integer("every_n_steps", every_n_steps)
        check_text("prefix", prefix)
        if attribute is not None:
            check_text("attribute", attribute)
        self.schedule = schedule
        self.attribute = attribute
        self.interval = interval
        self.every_n_steps = every_n_steps
        self.prefix = prefix
        self._targets: list[tuple[Any, str]] = []
        self._weight: float | None = None
        self._last_step = -1
        self._num_batches = 0  # of this fit
        self._first_steps = (0, 0)  # steps and optimiser steps before this fit
        self._is_told = False  # whether the length of the warm-up has been compared with that of training

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the attributes to set, and warn if there are none."""
        self._last_step = -1
        self._targets = self._find(pl_module)
        if not self._targets:
            self.warn(
                f"KLAnnealing found no ELBOLoss in {type(pl_module).__name__} and sets nothing. Keep the loss as an "
                "attribute of the module (self.loss = ELBOLoss()), or name an attribute: KLAnnealing(schedule, "
                "attribute='beta')."
            )

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        """Set the first weight, for the validation before training."""
        self._set_weight(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Set the weight of the first or resumed step, and warn if training is shorter than the warm-up."""
        self._set_weight(trainer)
        self._num_batches, self._first_steps = 0, (self._num_steps, trainer.global_step)
        self._is_told = not self._targets or bool(trainer.fast_dev_run)
        if pl_module.automatic_optimization:
            self._warn_of_warm_up(trainer, Pace())

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Set the weight of the batch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._set_weight(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the weight of the batch."""
        step = self.steps_taken(trainer)
        if self._targets and step % self.every_n_steps == 0 and step != self._last_step:
            self._last_step = step
            publish(trainer, {f"{self.prefix}/beta": self._weight or 0.0}, step)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._num_batches += 1
        if not self._is_told and self._num_steps - self._first_steps[0] == BATCHES_OF_A_PACE:
            self._warn_of_warm_up(trainer, self._pace(trainer))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Warn if a short training under manual optimisation has not reached the end of the warm-up."""
        if not self._is_told and self._num_steps > self._first_steps[0]:
            self._warn_of_warm_up(trainer, self._pace(trainer))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Set the weight of the checkpoint, unless the validation is part of a training."""
        if self._weight is not None and trainer.state.fn != "fit":
            self._targets = self._find(pl_module)
            self._set(self._weight)

    on_test_start = on_validation_start

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint: callbacks of one class differ by the attribute or their prefix."""
        return f"{type(self).__qualname__}(attribute={self.attribute!r}, prefix={self.prefix!r})"

    def state_dict(self) -> dict[str, Any]:
        """Return the weight that was set last."""
        return super().state_dict() | {"weight": self._weight}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the weight that was set last."""
        super().load_state_dict(state_dict)
        self._weight = state_dict["weight"]

    def _find(self, pl_module: nn.Module) -> list[tuple[Any, str]]:
        """Return what to set: pairs of an object and the name of its attribute."""
        if self.attribute is None:
            names = {ELBOLoss: "beta", Weighted: "weight"}
            return [(m, name) for m in pl_module.modules() for kind, name in names.items() if isinstance(m, kind)]
        *path, name = self.attribute.split(".")
        owner: Any = pl_module
        for part in path:
            owner = getattr(owner, part, None)
        if not hasattr(owner, name):
            raise ValueError(
                f"KLAnnealing(attribute={self.attribute!r}) must name an attribute of {type(pl_module).__name__}, "
                "which has none of that name: set it in the module's __init__, or leave the argument out to set "
                "every ELBOLoss.beta."
            )
        return [(owner, name)]

    def _pace(self, trainer: Any) -> Pace:
        """Return the pace of this fit so far, under manual optimisation."""
        steps, optimizer_steps = self._num_steps - self._first_steps[0], trainer.global_step - self._first_steps[1]
        return Pace(batches=self._num_batches / steps, optimizer_steps=optimizer_steps / steps)

    def _warn_of_warm_up(self, trainer: Any, pace: Pace) -> None:
        """Warn if the Trainer plans fewer steps, or epochs, than the warm-up takes."""
        planned, warm_up = pace.planned(trainer, self.interval), getattr(self.schedule, "total_steps", 0)
        if not self._is_told and warm_up > planned:
            reached, meant = self.schedule(max(0, planned - 1)), self.schedule(warm_up)
            self.warn(
                f"The warm-up of {self.schedule!r} takes {warm_up:g} {self.interval}s, but the Trainer plans "
                f"{planned:g}: the weight ends at {reached:.3g} instead of {meant:.3g}. Shorten the schedule or train "
                "longer."
            )
        self._is_told = True

    def _set_weight(self, trainer: Any) -> None:
        """Set the weight of the current step."""
        if not self._targets:
            return
        step = trainer.current_epoch if self.interval == "epoch" else self.steps_taken(trainer)
        weight = float(self.schedule(step))
        if not 0 <= weight < math.inf:
            raise ValueError(
                f"the weight of a KL must be at least 0 and finite, got {weight!r} from {self.schedule!r} at "
                f"{self.interval} {step}."
            )
        if weight != self._weight or step == 0:
            self._set(weight)

    def _set(self, weight: float) -> None:
        self._weight = weight
        for owner, name in self._targets:
            current = getattr(owner, name)
            if isinstance(current, Tensor):
                with torch.no_grad():
                    current.fill_(weight)
            else:
                setattr(owner, name, weight)
