"""Methods that the losses take, and warnings where an exact one exists."""

from __future__ import annotations

from typing import Any

from torch_klloss.callbacks.watching import EXACT, AllRanks, LossWatcher, repeated
from torch_klloss.distributions.checks import type_name
from torch_klloss.estimate import KLEstimate
from torch_klloss.losses import Call


class KLRoute(LossWatcher):
    """Report the method that every loss takes, and warn if one samples in training although an exact route exists.

    Observes every `KLLoss` of the LightningModule in training steps. A route is printed when it first occurs and
    whenever it changes, and is in `routes`, by path, and in checkpoints. Weights and random stream are as without the
    callback.

    Logged for the loss at module path `<path>` (a second call in the same step is `<path>.1`, and so on):

    - `kl/<path>/exact`: 1 if the KL is free of sampling and truncation error, else 0.
    - `kl/<path>/num_evaluations`: at how many points a batch element the log-densities were evaluated.

    Args:
        every_n_steps: observe the first training step and every n-th after it.
        prefix: the beginning of the logged names.

    Raises:
        ValueError: if `every_n_steps` is below 1.

    Examples:
        >>> from torch_klloss.callbacks import KLRoute
        >>> callback = KLRoute()  # Trainer(callbacks=[callback])
    """

    def __init__(self, every_n_steps: int = 500, prefix: str = "kl") -> None:
        super().__init__(every_n_steps, prefix)
        self.routes: dict[str, str] = {}
        self._metrics: dict[str, float] = {}
        self._news: list[str] = []
        self._warned: set[str] = set()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the routes, and print the new ones."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        for line in self._news:
            trainer.print(line)
        self._news.clear()

    def measure(self, name: str, call: Call) -> None:
        """Repeat the draws of the call, and record which method produced the value."""
        used = repeated(call)
        self._metrics[f"{name}/exact"] = float(used.exact)
        self._metrics[f"{name}/num_evaluations"] = float(used.num_evaluations)
        if self.routes.get(name) != used.method:
            self.routes[name] = used.method
            pair = f"KL({type_name(call.q)}‖{type_name(call.p)})"
            self._news.append(f"KLRoute: {name!r} takes {pair} by {used.method}")
        self._warn_of_sampling(name, call, used)

    def collect(self, all_ranks: AllRanks) -> dict[str, float]:
        """Return the values of the step."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        """Return the last routes."""
        return super().state_dict() | {"routes": self.routes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the last routes, so that only changes are printed."""
        super().load_state_dict(state_dict)
        self.routes = state_dict["routes"]

    def reset(self) -> None:
        """Forget the routes and the warnings of an earlier `fit`."""
        self.routes, self._warned = {}, set()

    def _warn_of_sampling(self, name: str, call: Call, used: KLEstimate) -> None:
        sampled = used.std_error is not None
        if name in self._warned or not sampled or not EXACT.supports(call.q, call.p):
            return
        self._warned.add(name)
        self.warn(
            f"{name!r} samples KL({type_name(call.q)}‖{type_name(call.p)}) in training ({used.method}), although "
            f"{EXACT.route(call.q, call.p)} is exact: AutoKL() takes it, without the noise in value and gradient."
        )

    def _forget(self) -> None:
        super()._forget()
        self._metrics.clear()
