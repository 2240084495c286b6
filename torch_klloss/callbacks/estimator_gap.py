"""What training's KL is off by: the gap between two estimates of the very same pair."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from torch_klloss.callbacks.base import Callback
from torch_klloss.estimate import KLEstimate
from torch_klloss.losses import AutoKL, KLLoss
from torch_klloss.methods import ClosedForm, Enumeration, FirstOf, MonteCarlo, NotCertifiedError
from torch_klloss.rebuild import device_of
from torch_klloss.reduction import reduce_estimate
from torch_klloss.rng import private_rng, replayed_rng, rng_state

Pairs = Callable[[Any, Any], Mapping[str, tuple[Distribution, Distribution]]]

_EXACT = FirstOf(ClosedForm(), Enumeration())


class EstimatorGap(Callback):
    """Log the gap between the KL that training used and an independent estimate of the same KL.

    A forward hook on every `KLLoss` of the LightningModule sees the (q, p) of the call. On logging steps the KL is
    estimated again there and then: by sampling where training was exact, by the closed form or an exact sum
    where training sampled and one exists, and by a larger sample elsewhere. No gradient is recorded, and training's
    random stream is left where it was: the weights come out bit for bit as without the callback. The user's model
    does not change.

    Logged, in nats, for the loss at module path `<path>` (a second call in the same step is `<path>.1`, and so on),
    under that call's own mask and reduction, over the batches of all ranks ("none" counts as the mean):

    - `kl/<path>/value`: what training used.
    - `kl/<path>/reference`: the other estimate.
    - `kl/<path>/gap_mean`: value - reference.
    - `kl/<path>/gap_std_error`: the standard error of the gap, from the errors of both estimates; where a single
      draw has none, from the spread of the per-example gaps.
    - `kl/<path>/gap_z`: the gap in standard errors. Beyond ±5, one of the two is wrong.

    Args:
        every_n_steps: log on the first step and on every n-th after it.
        num_samples: how many points the sampled reference draws for every example.
        pairs: for a model that computes its KL in a function: takes (module, batch) and returns {name: (q, p)}, which
            are compared, as `kl/<name>/…`, before the training step. It runs without gradients; buffers (batch
            norm) and random stream are put back.
        prefix: what the names begin with.
        seed: of the reference's own random stream.

    Raises:
        ValueError: if `every_n_steps` or `num_samples` is below 1.

    Example:
        >>> from torch_klloss.callbacks import EstimatorGap
        >>> callback = EstimatorGap(every_n_steps=100, num_samples=256)  # Trainer(callbacks=[callback])
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        num_samples: int = 64,
        pairs: Pairs | None = None,
        prefix: str = "kl",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self.pairs = pairs
        self.prefix = prefix
        self.seed = seed
        self._sampled = MonteCarlo(num_samples)
        self._handles: list[Any] = []
        self._step: int | None = None  # the step that is being logged, None on all others
        self._last_step = -1
        self._rank = 0
        self._gaps: dict[str, _Gap] = {}
        self._calls: Counter[str] = Counter()
        self._random_states: list[Any] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Hook every `KLLoss`, or warn that there is none."""
        self._remove_hooks()
        self._last_step, self._rank = -1, trainer.global_rank
        for path, module, loss in _losses(pl_module):
            self._handles += [
                module.register_forward_pre_hook(partial(self._before_call, loss), with_kwargs=True),
                module.register_forward_hook(partial(self._after_call, path, loss), with_kwargs=True),
            ]
        if not self._handles and self.pairs is None:
            warnings.warn(
                f"EstimatorGap found no KLLoss in {type(pl_module).__name__} and will log nothing. Keep the loss as an "
                "attribute of the module (self.kl = AutoKL()), or pass EstimatorGap(pairs=...) a function "
                "(module, batch) -> {name: (q, p)}.",
                UserWarning,
                stacklevel=2,
            )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Decide whether this step is logged, and compare the `pairs` of the batch if it is."""
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # Lightning's own callbacks count by it
        self._forget()
        self._step = step if step % self.every_n_steps == 0 and step != self._last_step else None
        if self._step is None or self.pairs is None:
            return
        with torch.no_grad(), _buffers_kept(pl_module), private_rng(self._seed(), pl_module.device):
            for name, (q, p) in self.pairs(pl_module, batch).items():
                loss = AutoKL()
                used = loss.estimate(q, p)
                self._compare(name, loss, used, loss.reduce(used).value, q, p, None)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log what the hooks have seen."""
        step, self._step = self._step, None
        if step is None or not self._gaps:
            return
        self._last_step = step
        metrics = {
            f"{self.prefix}/{path}/{key}": value
            for path, gap in self._gaps.items()
            for key, value in gap.metrics(partial(trainer.strategy.reduce, reduce_op="sum")).items()
        }
        self._forget()
        pl_module.log_dict(metrics, on_step=True, on_epoch=False, logger=False, batch_size=1)
        # Straight to the loggers: Lightning would send a step's value again, stale, at every log_every_n_steps.
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remove the hooks."""
        self._remove_hooks()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the hooks: Lightning calls no teardown where `fit` raises."""
        self._remove_hooks()

    @torch.compiler.disable
    def _before_call(self, loss: KLLoss, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._step is not None:
            q, _, _, generator = _arguments(*args, **kwargs)
            self._random_states.append(rng_state(device_of(q), generator))

    @torch.compiler.disable
    def _after_call(self, path: str, loss: KLLoss, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        if self._step is None:
            return
        q, p, mask, _ = _arguments(*args, **kwargs)
        q, p, mask = loss.drop_masked(q, p, mask)
        with torch.no_grad(), replayed_rng(self._random_states.pop(), device_of(q)) as generator:
            used = loss.estimate(q, p, generator=generator)  # the draws of that very call, with their errors
        calls = self._calls[path]
        self._calls[path] += 1
        with torch.no_grad(), private_rng(self._seed(), device_of(q)):
            self._compare(f"{path}.{calls}" if calls else path, loss, used, output.detach(), q, p, mask)

    def _compare(
        self,
        name: str,
        loss: KLLoss,
        used: KLEstimate,
        output: Tensor,
        q: Distribution,
        p: Distribution,
        mask: Tensor | None,
    ) -> None:
        """Estimate the KL in another way and keep the gap, unless there is no other way."""
        try:
            other = self._sampled if used.exact else FirstOf(_EXACT, self._sampled)
            reference = KLLoss(other, batch_dims=loss.batch_dims).estimate(q, p)
        except (NotImplementedError, NotCertifiedError) as error:
            warnings.warn(f"EstimatorGap logs no gap for {name!r}: {error}", UserWarning, stacklevel=2)
            return
        self._gaps[name] = _Gap.of(loss, used, reference, output, mask)

    def _seed(self) -> int:
        """Return a seed for every (seed, rank, step, call): draws that nothing else in training shares."""
        words = (self.seed, self._rank, self._step or 0, self._calls.total())
        seed = 0
        for word in words:
            seed = (seed * 1_000_003 + word + 1) % (2**63 - 1)
        return seed

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()
        self._step = None

    def _forget(self) -> None:
        self._gaps.clear()
        self._calls.clear()
        self._random_states.clear()


@dataclass(frozen=True)
class _Gap:
    """Hold two estimates of the same per-example KLs, `[examples]`, not yet summed over examples or ranks."""

    weights: Tensor
    gaps: Tensor
    variances: Tensor  # of the gaps; NaN where a single draw has no error
    references: Tensor
    total: Tensor  # Σ w · value, from what the loss returned
    is_sum: bool

    @classmethod
    def of(cls, loss: KLLoss, used: KLEstimate, reference: KLEstimate, output: Tensor, mask: Tensor | None) -> _Gap:
        values, references = (reduce_estimate(e, "none", loss.batch_dims) for e in (used, reference))
        weights = torch.ones_like(values.value) if mask is None else mask.to(values.value.dtype)
        weights, value, other = (_wide(t).flatten() for t in (weights, values.value, references.value))
        kept = weights != 0
        total = _wide(output).sum() * (weights.sum() if loss.reduction == "mean" else 1)
        return cls(
            weights[kept],
            (value - other)[kept],
            (_variance(values) + _variance(references))[kept],
            other[kept],
            total,
            loss.reduction == "sum",
        )

    def metrics(self, all_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the reduced values; `all_ranks` sums a tensor over the ranks."""
        w, gaps = self.weights, self.gaps
        sums = all_ranks(
            torch.stack([w.sum(), self.total, (w * self.references).sum(), (w * gaps).sum(), w.new_tensor(len(w))])
        )
        weight, total, reference, gap, count = sums.tolist()
        spread = (w * (gaps - gap / (weight or math.nan))).square().sum() * count / (count - 1 or math.nan)
        spread, variance = all_ranks(torch.stack([spread, (w.square() * self.variances).sum()])).tolist()
        scale = 1.0 if self.is_sum else weight or math.nan
        value, reference = total / scale, reference / scale
        error = math.sqrt(spread if math.isnan(variance) else variance) / scale
        gap_mean = value - reference
        return {
            "value": value,
            "reference": reference,
            "gap_mean": gap_mean,
            "gap_std_error": error,
            "gap_z": gap_mean / error if error else math.nan,
        }


def _variance(estimate: KLEstimate) -> Tensor:
    error = torch.zeros_like(estimate.value) if estimate.std_error is None else estimate.std_error
    return _wide(error).flatten().square()


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.device.type == "mps" else t.double()  # Apple's devices have no float64


def _losses(pl_module: nn.Module) -> Iterator[tuple[str, nn.Module, KLLoss]]:
    """Yield path, module to hook and loss; a compiled loss is hooked outside of what is compiled."""
    compiled: set[nn.Module] = set()
    for path, module in pl_module.named_modules():
        inner = getattr(module, "_orig_mod", None)
        if isinstance(inner, KLLoss):
            compiled.add(inner)
            yield path, module, inner
        elif isinstance(module, KLLoss) and module not in compiled:
            yield path, module, module


def _arguments(
    q: Distribution, p: Distribution, mask: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Distribution, Distribution, Tensor | None, torch.Generator | None]:
    """Bind the arguments of a call, by position or by name, as `KLLoss.forward` does."""
    return q, p, mask, generator


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Put the buffers back after the block: batch norm counts its batches in them."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, copy in kept:
            buffer.copy_(copy)
