"""One pair of distributions under every method: what the command `compare` shows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from torch.distributions import Distribution
from torch.utils.benchmark import Timer

from torch_klloss.distributions.simplify import check_pair
from torch_klloss.distributions.tensors import device_of
from torch_klloss.estimate import KLEstimate
from torch_klloss.losses import KLLoss
from torch_klloss.methods import ClosedForm, Enumeration, Method, MonteCarlo, NotCertifiedError, Quadrature
from torch_klloss.methods.base import name_of
from torch_klloss.methods.monte_carlo.method import Gradient
from torch_klloss.methods.monte_carlo.options import HELD_OUT
from torch_klloss.rng import private_rng


@dataclass(frozen=True)
class Row:
    """Hold what one method made of the pair; None where there is nothing to say.

    Attributes:
        method: its name.
        gradient: the gradient option of a sampling method.
        value: the KL in nats, the mean over batch elements.
        std_error: of `value`.
        gap: `value` less that of the exact method.
        z: `gap` in standard errors.
        microseconds: the median time of a call.
        reason: why the method does not take the pair.
    """

    method: str
    gradient: str | None = None
    value: float | None = None
    std_error: float | None = None
    gap: float | None = None
    z: float | None = None
    microseconds: float | None = None
    reason: str | None = None


def compare_methods(q: Distribution, p: Distribution, num_samples: int = 1000, seed: int = 0) -> list[Row]:
    """Compute KL(q‖p) by every method, in nats: the mean over batch elements, with its error and its time.

    Every sampling method starts from the same seed, and the global random stream is left alone.

    Args:
        q: the distribution that the expectation is under.
        p: the other one; all dimensions of the broadcast batch shape count as examples.
        num_samples: how many samples the sampling methods draw.
        seed: of the samples.

    Raises:
        ValueError: if the shapes do not fit, or q is discrete and p continuous, or the reverse.
        TypeError: if q or p is not a distribution.

    Example:
        >>> from torch.distributions import Normal
        >>> from torch_klloss.cli.compare import compare_methods
        >>> rows = compare_methods(Normal(1.0, 1.0), Normal(0.0, 1.0))
        >>> rows[0].method, rows[0].value, rows[0].gap
        ('closed_form', 0.5, 0.0)
        >>> sampled = [row for row in rows if row.method == "monte_carlo"]
        >>> all(abs(row.z) < 6 for row in sampled)
        True
    """
    batch_dims = len(check_pair(q, p))
    rows: list[Row] = []
    exact: float | None = None
    for method, gradient in _methods(num_samples):
        loss = KLLoss(method, reduction="mean", batch_dims=batch_dims)
        name = name_of(method)
        try:
            estimate = loss.reduce(loss.estimate(q, p, generator=torch.Generator().manual_seed(seed)))
        except (NotImplementedError, NotCertifiedError) as refusal:
            rows.append(Row(name, gradient, reason=str(refusal)))
            continue
        if exact is None and estimate.std_error is None:
            exact = estimate.value.item()
        rows.append(_row(name, gradient, estimate, exact, _microseconds(loss, q, p, seed)))
    return rows


def _methods(num_samples: int) -> Iterator[tuple[Method, str | None]]:
    """Yield every method, with its gradient option where it has one."""
    yield ClosedForm(), None
    yield Enumeration(), None
    yield Quadrature(), None
    for gradient in get_args(Gradient):
        if gradient != "mixed" or num_samples >= HELD_OUT:
            yield MonteCarlo(num_samples, gradient=gradient), gradient


def _row(name: str, gradient: str | None, estimate: KLEstimate, exact: float | None, microseconds: float) -> Row:
    value, gap, z = estimate.value.item(), None, None
    std_error = None if estimate.std_error is None else estimate.std_error.item()
    if exact is not None:
        gap = 0.0 if value == exact else value - exact  # inf is no gap from inf
    if gap is not None and std_error is not None:
        # Samples that all agree have no spread, but they still round.
        noise = max(std_error, torch.finfo(estimate.value.dtype).eps * abs(value))
        z = gap / noise if noise else 0.0
    return Row(name, gradient, value, std_error, gap, z, microseconds)


def _microseconds(loss: KLLoss, q: Distribution, p: Distribution, seed: int) -> float:
    timer = Timer("loss.estimate(q, p)", globals={"loss": loss, "q": q, "p": p}, num_threads=1)
    with private_rng(seed, device_of(q)):
        return timer.blocked_autorange(min_run_time=0.1).median * 1e6
