"""Gap between the training KL and an independent estimate of the same pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from torch_klloss.callbacks.figures import log_figure
from torch_klloss.callbacks.gap import Gap
from torch_klloss.callbacks.history import History
from torch_klloss.callbacks.token_gap import TokenGap, token_gap
from torch_klloss.callbacks.watching import EXACT, AllRanks, LossWatcher, repeated
from torch_klloss.distributions.tensors import device_of
from torch_klloss.elbo.arguments import Pair
from torch_klloss.elbo.batches import batch_of
from torch_klloss.estimate import KLEstimate
from torch_klloss.language import DistillationLoss, ReferenceKL
from torch_klloss.language.observers import TokenCall
from torch_klloss.losses import AutoKL, Call, KLLoss
from torch_klloss.methods import FirstOf, Method, MonteCarlo, NotCertifiedError, Quadrature
from torch_klloss.numerics.arguments import check_flag, check_integer
from torch_klloss.rng import private_rng, rng_state

PairFunction = Callable[[Any, Any], Mapping[str, Pair]]
Column = Literal["sampled", "exact", "quadrature"]


class EstimatorGap(LossWatcher):
    """Log the gap between the KL that training used and an independent estimate of the same KL.

    The callback observes every `KLLoss` of the LightningModule. On logging steps it estimates the KL of a call again,
    within that call: by sampling if training did not sample (a closed form, a sum, a quadrature), by the closed form or
    a sum if training sampled and one exists, and by a larger sample otherwise. No gradient is recorded, and training's
    random stream stays where it was: the weights are bit for bit those without the callback. The user's model does not
    change.

    Logged, in nats, for the loss at module path `<path>` (a second call in the same step is `<path>.1`, and so on),
    under that call's own mask and reduction, over the batches of all ranks ("none" counts as the mean). In an
    `ELBOLoss` the KL is reduced as in its terms: under a mask of the steps of sequences, to nats a sequence.

    - `kl/<path>/value`: the KL that training used.
    - `kl/<path>/reference`: the other estimate.
    - `kl/<path>/gap_mean`: value - reference.
    - `kl/<path>/gap_std_error`: the standard error of the gap, from the errors of both estimates; for a single draw,
      which has no error, from the spread of the per-example gaps.
    - `kl/<path>/gap_z`: the gap in standard errors. Beyond ±5, one of the two is wrong.
    - `kl/<path>/sampled` with `sampled_std_error`, `kl/<path>/exact`, `kl/<path>/quadrature`: the estimates named in
      `side_by_side`. NaN, and one warning, if a pair has no such route.

    `DistillationLoss` and `ReferenceKL` of `torch_klloss.language` are observed as well, and logged in the same way:

    - for `DistillationLoss` on logits that are tensors, `value` is exact and `reference` the mean log-ratio at
      `num_samples` tokens that are drawn for every token from the divergence's first argument.
    - for `ReferenceKL` on logits, `exact`, `k1` and `k3` are the three estimates along the call's own sequences, with
      `k1_gap_mean`, `k1_gap_std_error` and the same of k3: what they are off by against `exact`, and the error of that
      from its spread over the sequences. `reference` is `exact`, or `k1` where training used the exact steps.

    At the end of training the figure `kl/<path>/gap` goes to TensorBoard, WandB or MLflow, or beside the log as a PNG.
    All logged values of a `fit` are in `history`, by path, and in checkpoints: a resumed run draws the whole training.
    `history.to_dict()` is a table of them, and `history.figure()` the figure.

    Args:
        every_n_steps: log on the first step and on every n-th after it.
        num_samples: how many points the sampled reference draws for every example.
        pairs: for a model that computes its KL in a function: takes (module, batch) and returns {name: (q, p)}, which
            are compared, as `kl/<name>/…`, before the training step. It runs without gradients; buffers (batch
            norm) and random stream are restored.
        prefix: the beginning of the logged names.
        seed: the seed of the reference's own random stream.
        side_by_side: further estimates to log: "sampled", "exact", "quadrature".
        figure: whether the figure is drawn; it needs matplotlib and a logger.
        prog_bar: whether `value` and `gap_mean` are shown in the progress bar, too.

    Raises:
        ValueError: if `every_n_steps` or `num_samples` is below 1, or `side_by_side` holds another word.

    Examples:
        >>> from torch_klloss.callbacks import EstimatorGap
        >>> callback = EstimatorGap(every_n_steps=100, num_samples=256)  # Trainer(callbacks=[callback])
    """

    kinds = (KLLoss, DistillationLoss, ReferenceKL)
    advice = (
        "Keep the loss as an attribute of the module (self.kl = AutoKL()), or pass EstimatorGap(pairs=...) a function "
        "(module, batch) -> {name: (q, p)}."
    )

    def __init__(
        self,
        every_n_steps: int = 50,
        num_samples: int = 64,
        pairs: PairFunction | None = None,
        prefix: str = "kl",
        seed: int = 0,
        side_by_side: Sequence[Column] = (),
        figure: bool = True,
        prog_bar: bool = False,
    ) -> None:
        super().__init__(every_n_steps, prefix)
        check_integer("seed", seed, at_least=None)
        check_flag("figure", figure)
        check_flag("prog_bar", prog_bar)
        if pairs is not None and not callable(pairs):
            raise TypeError(f"pairs must be a function (module, batch) -> {{name: (q, p)}}, got {pairs!r}.")
        if not isinstance(side_by_side, (list, tuple)):
            raise TypeError(
                f"side_by_side must be a list of 'sampled', 'exact' and 'quadrature', got {side_by_side!r}."
            )
        unknown = [word for word in side_by_side if word not in get_args(Column)]
        if unknown:
            raise ValueError(f"side_by_side may hold 'sampled', 'exact' and 'quadrature', got {unknown[0]!r}.")
        self.num_samples = num_samples
        self.pairs = pairs
        self.seed = seed
        self.side_by_side = tuple(side_by_side)
        self.figure = figure
        self.prog_bar = prog_bar
        self.history = History(_draw)
        self._sampled = MonteCarlo(num_samples)
        self._methods: dict[str, Method] = {"sampled": self._sampled, "exact": EXACT, "quadrature": Quadrature()}
        self._gaps: dict[str, Gap | TokenGap] = {}
        self._warned: set[str] = set()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Decide whether this step is logged, and compare the `pairs` of the batch if it is."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._step is None or self.pairs is None:
            return
        with torch.no_grad(), _buffers_kept(pl_module), private_rng(self._seed(self.seed), pl_module.device):
            _within_wrapper(
                trainer.strategy.model, pl_module, partial(self._compare_pairs, self.pairs, pl_module, batch)
            )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the measurements of the step, and show them in the progress bar if that is asked for."""
        is_measured = self._step is not None
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.prog_bar and is_measured:
            latest = {path: rows[-1] for path, rows in self.history.items() if rows[-1]["step"] == self._last_step}
            shown = {f"{self.prefix}/{path}/{k}": row[k] for path, row in latest.items() for k in ("value", "gap_mean")}
            pl_module.log_dict(shown, prog_bar=True, logger=False)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw the figures."""
        super().on_train_end(trainer, pl_module)
        for path, rows in self.history.items() if self.figure else ():
            log_figure(trainer, f"{self.prefix}/{path}/gap", partial(_draw, path, rows), self.steps_taken(trainer))

    def measure(self, name: str, call: Call | TokenCall) -> None:
        """Repeat the draws of the call, for their errors, and compare them with the other estimate."""
        if isinstance(call, TokenCall):
            self._compare_tokens(name, call)
            return
        used = repeated(call)
        with private_rng(self._seed(self.seed), device_of(call.q)):
            self._compare(name, call, used)

    def collect(self, all_ranks: AllRanks) -> dict[str, float]:
        """Return the gaps, and remember them."""
        metrics = {}
        for path, gap in self._gaps.items():
            values = gap.metrics(all_ranks)
            row = {"step": float(self._last_step), "sampled_reference": float(gap.sampled == "reference"), **values}
            self.history.setdefault(path, []).append(row)
            metrics.update({f"{path}/{key}": value for key, value in values.items()})
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return the history."""
        return super().state_dict() | {"history": dict(self.history)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history."""
        super().load_state_dict(state_dict)
        self.history = History(_draw, state_dict["history"])

    def reset(self) -> None:
        """Begin a new history."""
        self.history, self._warned = History(_draw), set()

    def _compare_pairs(self, pairs: PairFunction, pl_module: Any, batch: Any) -> None:
        for name, (q, p) in pairs(pl_module, batch).items():
            loss = AutoKL()
            state = rng_state(device_of(q))
            used = loss.estimate(q, p)
            examples = batch_of(used.value.shape, loss.batch_dims)
            call = Call(loss, q, p, examples, loss.reduce(used).value, loss.reduction, state)
            self._compare(name, call, used)

    def _compare(self, name: str, call: Call, used: KLEstimate) -> None:
        """Estimate the KL by another method and keep the gap, unless no other method takes the pair."""
        try:
            other = self._sampled if used.std_error is None else FirstOf(EXACT, self._sampled)
            reference = _estimate(other, call)
        except (NotImplementedError, NotCertifiedError) as error:
            self.warn(f"EstimatorGap logs no gap for {name!r}: {error}")
            return
        others = {str(word): self._column(f"{name}/{word}", word, call, used) for word in self.side_by_side}
        self._gaps[name] = Gap.of(call, used, reference, others)

    def _compare_tokens(self, name: str, call: TokenCall) -> None:
        """Keep the gap of a loss of token distributions, or warn once why there is none."""
        try:
            with private_rng(self._seed(self.seed), call.value.device):
                self._gaps[name] = token_gap(call, self.num_samples)
        except NotImplementedError as error:
            if name not in self._warned:
                self._warned.add(name)
                self.warn(f"EstimatorGap logs no gap for {name!r}: {error}")

    def _column(self, name: str, word: str, call: Call, used: KLEstimate) -> KLEstimate:
        """Return one of the estimates side by side, of NaN if the pair has no such route."""
        try:
            return _estimate(self._methods[word], call)
        except (NotImplementedError, NotCertifiedError) as error:
            if name not in self._warned:
                self._warned.add(name)
                self.warn(f"EstimatorGap logs NaN as {name}: {error}")
            nan = torch.full_like(used.value, torch.nan)
            return KLEstimate(nan, exact=False, std_error=nan if word == "sampled" else None, method=word)

    def _forget(self) -> None:
        super()._forget()
        self._gaps.clear()


def _estimate(method: Method, call: Call) -> KLEstimate:
    return KLLoss(method, batch_dims=call.loss.batch_dims).estimate(call.q, call.p)


def _draw(path: str, rows: list[dict[str, float]]) -> Any:
    from torch_klloss.plots import gap_figure

    columns = ([row[key] for row in rows] for key in ("step", "value", "reference", "gap_std_error"))
    deterministic = bool(rows[-1]["sampled_reference"])
    return gap_figure(
        *columns,
        value_label="deterministic" if deterministic else "sampled",
        reference_label="sampled" if deterministic else "deterministic, or a larger sample",
        sampled="reference" if deterministic else "value",
        title=f"KL(q‖p) of {path} in training",
    )


def _within_wrapper(wrapper: nn.Module, module: nn.Module, function: Callable[[], None]) -> None:
    """Call a function within the forward of an FSDP wrapper.

    There the parameters that the wrapper shards are whole. Submodules with wrappers of their own can be called there
    too; before the first forward of the outermost wrapper they would take themselves for the outermost.
    """
    if not _is_fsdp(wrapper):
        function()
        return
    forward = module.forward
    module.forward = function
    try:
        wrapper()
    finally:
        module.forward = forward


def _is_fsdp(module: nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel

    return isinstance(module, FullyShardedDataParallel)


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Restore the buffers after the block: batch norm counts its batches in them."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, copy in kept:
            buffer.copy_(copy)
