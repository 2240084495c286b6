"""Gaps between two estimates of the same per-example KLs, summed over examples and ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_klloss.callbacks.watching import AllRanks, wide
from torch_klloss.estimate import KLEstimate
from torch_klloss.losses import Call
from torch_klloss.reduction import Batch


@dataclass(frozen=True)
class Gap:
    """Two estimates of the same per-example KLs, `[examples]`, not yet summed over examples or ranks."""

    weights: Tensor
    gaps: Tensor
    variances: Tensor  # of the gaps; NaN for a single draw, which has no error
    references: Tensor
    total: Tensor  # Σ w · value, from the value of the call
    is_sum: bool
    sampled: str  # the one with a standard error: "value" or "reference"
    others: dict[str, tuple[Tensor, Tensor | None]]  # by name: values, and variances of sampled ones

    @classmethod
    def of(cls, call: Call, used: KLEstimate, reference: KLEstimate, others: dict[str, KLEstimate]) -> Gap:
        """Reduce the estimates of a call to its examples, and keep the examples that its mask keeps."""
        values, references, *rest = (call.batch.estimate_per_example(e) for e in (used, reference, *others.values()))
        weights = call.batch.example_weights
        weights = wide(torch.ones_like(values.value) if weights is None else weights).flatten()
        value, other = (wide(e.value).flatten() for e in (values, references))
        kept = weights != 0
        return cls(
            weights[kept],
            (value - other)[kept],
            (_variance(values) + _variance(references))[kept],
            other[kept],
            _sum_of(wide(call.value), call.batch, call.reduction),
            call.reduction == "sum",
            "reference" if used.std_error is None else "value",
            {
                name: (wide(e.value).flatten()[kept], None if e.std_error is None else _variance(e)[kept])
                for name, e in zip(others, rest, strict=True)
            },
        )

    def metrics(self, all_ranks: AllRanks) -> dict[str, float]:
        """Return the reduced values; `all_ranks` sums a tensor over the ranks."""
        w, gaps = self.weights, self.gaps
        sums = all_ranks(
            torch.stack([w.sum(), self.total, (w * self.references).sum(), (w * gaps).sum(), w.new_full((), len(w))])
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
        } | self._others(all_ranks, scale)

    def _others(self, all_ranks: AllRanks, scale: float) -> dict[str, float]:
        metrics = {}
        for name, (values, variances) in self.others.items():
            metrics[name] = all_ranks((self.weights * values).sum()).item() / scale
            if variances is not None:
                variance = all_ranks((self.weights.square() * variances).sum()).item()
                metrics[f"{name}_std_error"] = math.sqrt(variance) / scale
        return metrics


def _variance(estimate: KLEstimate) -> Tensor:
    error = torch.zeros_like(estimate.value) if estimate.std_error is None else estimate.std_error
    return wide(error).flatten().square()


def _sum_of(value: Tensor, batch: Batch, reduction: str) -> Tensor:
    """Return Σ w · KL over the examples, given the reduced KL."""
    if reduction != "mean":
        return value.sum()
    weights = batch.example_weights
    return value * (math.prod(batch.elements) if weights is None else wide(weights).sum())
