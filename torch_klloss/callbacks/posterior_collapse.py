"""Use and collapse of latent units."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, get_args

import torch

from torch_klloss.callbacks.figures import log_figure
from torch_klloss.callbacks.history import History
from torch_klloss.callbacks.latent import kl_per_unit, mutual_information, posterior_means
from torch_klloss.callbacks.moments import Moments
from torch_klloss.callbacks.watching import AllRanks, LossWatcher
from torch_klloss.distributions.batch_dims import expand_to
from torch_klloss.distributions.checks import check_pair
from torch_klloss.distributions.tensors import device_of
from torch_klloss.losses import Call
from torch_klloss.numerics.arguments import check_flag, check_integer, check_number
from torch_klloss.rng import private_rng

Stage = Literal["train", "validation"]


class PosteriorCollapse(LossWatcher):
    """Log how much every latent unit is used, draw it over training, and warn once when most units have collapsed.

    Observes every `KLLoss` of the LightningModule as `EstimatorGap` does, on the batches of every n-th training step or
    on all validation data. Weights and random stream are as without the callback.

    Logged for the loss at module path `<path>` (a second call in the same step is `<path>.1`, and so on), over all
    ranks, and over the examples that the call's mask keeps, by their weights. Under a mask of the steps of sequences
    every step is an example: the units are the dimensions of one step, whatever the length of the sequences.

    - `collapse/<path>/kl/<j>`: the mean KL of unit j, in nats. The units are the dimensions that q and p both
      factorise over; a pair that does not factorise is one unit.
    - `collapse/<path>/collapsed_units`: how many of these KLs are below `collapsed_below`.
    - `collapse/<path>/active_units`: how many units of q have Cov_x(E[z|x]) above `active_above`. Absent if q has no
      mean, as Categorical.
    - `collapse/<path>/mutual_information`: an estimate of I(x; z) within a batch, in nats: at most the logarithm of the
      number of examples that one rank sees at a time; the mean over batches and ranks.

    At the end of training the heat map `collapse/<path>/units` goes to TensorBoard, WandB or MLflow, or beside the log
    as a PNG. All logged values of a `fit` are in `history`, by path, and in checkpoints: a resumed run draws the whole
    training, and does not warn again.

    Args:
        every_n_steps: measure the first training step and every n-th after it; not used on validation data.
        stage: "train", or "validation": at the end of every validation epoch, over all of its batches.
        active_above: a unit is active if the variance of its posterior means is above this.
        collapsed_below: a unit is collapsed if its KL is below this, in nats.
        patience: the warning is given after so many measurements in a row with fewer than half of the units active. If
            q has no mean, the units that have not collapsed count as active.
        num_draws: how many draws a batch the mutual information is estimated from.
        prefix: the beginning of the logged names.
        seed: the seed of these draws.
        figure: whether the heat map is drawn; it needs matplotlib and a logger.

    Raises:
        ValueError: if `every_n_steps`, `patience` or `num_draws` is below 1, or `stage` is neither word.

    References:
        *Importance weighted autoencoders* (Burda et al., 2016), appendix C, for active units and their threshold.
        *ELBO surgery* (Hoffman and Johnson, 2016), for the mutual information.

    Examples:
        >>> from torch_klloss.callbacks import PosteriorCollapse
        >>> callback = PosteriorCollapse(stage="validation")  # Trainer(callbacks=[callback])
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        stage: Stage = "train",
        active_above: float = 0.01,
        collapsed_below: float = 0.01,
        patience: int = 3,
        num_draws: int = 32,
        prefix: str = "collapse",
        seed: int = 0,
        figure: bool = True,
    ) -> None:
        super().__init__(every_n_steps, prefix)
        if stage not in get_args(Stage):
            raise ValueError(f"stage must be 'train' or 'validation', got {stage!r}.")
        for word, count in (("patience", patience), ("num_draws", num_draws)):
            check_integer(word, count)
        for word, level in (("active_above", active_above), ("collapsed_below", collapsed_below)):
            check_number(word, level, at_least=0)
        check_integer("seed", seed, at_least=None)
        check_flag("figure", figure)
        self.stage = stage
        self.measures_training = stage == "train"
        self.active_above = active_above
        self.collapsed_below = collapsed_below
        self.patience = patience
        self.num_draws = num_draws
        self.seed = seed
        self.figure = figure
        self.history = History(_draw)
        self._warned: list[str] = []
        self._statistics: dict[str, dict[str, Moments]] = {}

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the losses, if the validation is no part of a training."""
        if self.stage == "validation" and trainer.state.fn != "fit":
            self._find_losses(pl_module)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Measure the batch, if `stage` is "validation"."""
        if self.stage == "validation" and not trainer.sanity_checking:
            earlier = dict(self._statistics)
            self._open(1_000_003 * self.steps_taken(trainer) + batch_idx)
            self._statistics = earlier

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the measurements of the epoch."""
        if self._step is not None:
            self._log(trainer, self.steps_taken(trainer))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw the heat maps."""
        super().on_train_end(trainer, pl_module)
        for path, rows in self.history.items() if self.figure else ():
            log_figure(trainer, f"{self.prefix}/{path}/units", partial(_draw, path, rows), self.steps_taken(trainer))

    def measure(self, name: str, call: Call) -> None:
        """Add the statistics of a call's latent."""
        if not call.batch.elements:
            return  # no examples: nothing varies
        with private_rng(self._seed(self.seed), device_of(call.q)):
            new = _statistics(call, self.num_draws)
        old = self._statistics.get(name)
        self._statistics[name] = new if old is None else {key: old[key] + new[key] for key in old if key in new}

    def collect(self, all_ranks: AllRanks) -> dict[str, float]:
        """Return the measurements, add them to the history, and warn if most units have collapsed."""
        metrics = {}
        for path, statistics in self._statistics.items():
            row = self._row({key: moments.over_ranks(all_ranks) for key, moments in statistics.items()})
            self.history.setdefault(path, []).append({"step": self._last_step, **row})
            scalars = {key: value for key, value in row.items() if isinstance(value, (int, float))}
            units = {f"kl/{j}": value for j, value in enumerate(row["kl"])}
            metrics.update({f"{path}/{key}": float(value) for key, value in (scalars | units).items()})
            self._warn_of_collapse(path)
        return metrics

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint: callbacks of one class differ by their stage or their prefix."""
        return f"{type(self).__qualname__}(stage={self.stage!r}, prefix={self.prefix!r})"

    def state_dict(self) -> dict[str, Any]:
        """Return the history, and the losses that a warning was given for."""
        return super().state_dict() | {"history": dict(self.history), "warned": self._warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history and the warnings given."""
        super().load_state_dict(state_dict)
        self.history, self._warned = History(_draw, state_dict["history"]), state_dict["warned"]

    def reset(self) -> None:
        """Begin a new history."""
        self.history, self._warned = History(_draw), []

    def _row(self, statistics: dict[str, Moments]) -> dict[str, Any]:
        """Return plain numbers, as they go into logs and checkpoints."""
        kl = statistics["kl"].mean
        row: dict[str, Any] = {
            "kl": kl.tolist(),
            "collapsed_units": int((kl < self.collapsed_below).sum()),
            "mutual_information": statistics["information"].mean.item(),
        }
        if "means" in statistics:
            variances = statistics["means"].variance
            row |= {"variances": variances.tolist(), "active_units": int((variances > self.active_above).sum())}
        return row

    def _warn_of_collapse(self, path: str) -> None:
        last = self.history[path][-self.patience :]
        if path in self._warned or len(last) < self.patience:
            return
        alive = [_alive(row) for row in last]
        if all(2 * count < total for count, total in alive):
            self._warned.append(path)
            count, total = alive[-1]
            self.warn(
                f"{count} of the {total} latent units of {path!r} are in use after step {last[-1]['step']}: the "
                "posterior collapses. Let β rise from 0 (KLAnnealing), grant free nats (ELBOLoss(free_nats=...)), or "
                "take a smaller β or a weaker decoder."
            )

    def _forget(self) -> None:
        super()._forget()
        self._statistics.clear()


def _statistics(call: Call, num_draws: int) -> dict[str, Moments]:
    """Return the moments of a call's elements: KL and posterior mean by unit (if q has a mean), mutual information."""
    shape, elements = check_pair(call.q, call.p), call.batch.elements
    dims = len(elements)
    q = expand_to(call.q, shape)
    kl = kl_per_unit(q, call.p, dims).flatten(0, dims - 1)
    weights = torch.ones_like(kl[:, 0]) if call.batch.weights is None else call.batch.weights.flatten()
    means = posterior_means(q, dims)
    information = mutual_information(q, (weights != 0).view(elements), num_draws)
    moments = {} if means is None else {"means": Moments.of(means.flatten(0, dims - 1), weights)}
    return moments | {
        "kl": Moments.of(kl, weights),
        "information": Moments.of(information.unsqueeze(-1), torch.ones_like(information)),
    }


def _alive(row: dict[str, Any]) -> tuple[int, int]:
    """Return how many units are in use, and their number."""
    if "active_units" in row:
        return row["active_units"], len(row["variances"])
    return len(row["kl"]) - row["collapsed_units"], len(row["kl"])


def _draw(path: str, rows: list[dict[str, Any]]) -> Any:
    from torch_klloss.plots import collapse_figure

    active = [row["active_units"] for row in rows] if "active_units" in rows[0] else None
    return collapse_figure(
        [row["step"] for row in rows], [row["kl"] for row in rows], active, title=f"KL of {path} by unit"
    )
