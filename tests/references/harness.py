"""Measure a closed form, and its gradient, against mpmath at the very parameters that it was given.

A `Reference` says how to draw the parameters of a pair, how to build its distributions and what the KL is in
arbitrary precision. `measure` draws, rounds to the dtype first, evaluates the batch in one call, and compares every
element with the reference at the rounded parameters. Nothing here knows of pytest.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import mpmath
import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from tests.references.recorded import MODE, truths
from tests.references.reference import Params, Reference
from torch_klloss import kl_divergence

EVERY = 4 if MODE == "recorded" else 1
"""Which of the draws the tests measure: `make test-all` measures all."""


@dataclass(frozen=True)
class Errors:
    """Hold what went wrong, draw by draw; every list has one entry a draw.

    Args:
        value: the KL as computed.
        reference: the KL in mpmath.
        ulp: the distance of the two, in units in the last place of the dtype.
        relative: the distance divided by the reference; 0 where both are 0.
        gradient: the worst error of a gradient entry, divided by the largest entry of the draw's gradient.
    """

    value: list[float]
    reference: list[Any]
    ulp: list[float]
    relative: list[float]
    gradient: list[float]


@dataclass(frozen=True)
class Accuracy:
    """Hold the worst over the draws of one pair, regime and dtype."""

    name: str
    regime: str
    dtype: torch.dtype
    num_draws: int
    worst_ulp: float
    worst_relative: float
    worst_gradient: float
    negatives: int
    not_finite: int
    """NaN or inf where the truth is finite, or a number where it is infinite."""
    not_zero: int
    """KL(q‖q) other than 0."""
    worst_value_at: tuple[dict[str, Any], dict[str, Any]] = field(repr=False)
    worst_gradient_at: tuple[dict[str, Any], dict[str, Any]] = field(repr=False)
    errors: Errors = field(repr=False)


def measure(
    reference: Reference,
    regime: str,
    dtype: torch.dtype,
    num_draws: int = 200,
    seed: int = 0,
    kl: Callable[[Distribution, Distribution], Tensor] = kl_divergence,
    with_gradient: bool = True,
    every: int = 1,
) -> Accuracy:
    """Draw a regime of a pair and return the worst of it. The same seed gives the same draws.

    With `every` n, each n-th of the draws is measured.
    """
    q, p = ({key: t[::every] for key, t in side.items()} for side in draw(reference, regime, dtype, num_draws, seed))
    errors = errors_at(reference, q, p, kl, with_gradient)
    at_value, at_gradient = (_argmax(e) for e in (errors.ulp, errors.gradient))
    is_nonzero = (
        [bool(v != 0) for v in kl(*reference.build(q, q)).tolist()] if reference.type_q is reference.type_p else []
    )
    return Accuracy(
        name=reference.name,
        regime=regime,
        dtype=dtype,
        num_draws=len(errors.value),
        worst_ulp=errors.ulp[at_value],
        worst_relative=max(errors.relative),
        worst_gradient=errors.gradient[at_gradient],
        negatives=sum(v < 0 for v in errors.value),
        not_finite=sum(
            math.isnan(v) or math.isinf(v) != math.isinf(round_to(r, dtype))
            for v, r in zip(errors.value, errors.reference, strict=True)
        ),
        not_zero=sum(is_nonzero),
        worst_value_at=(_row(q, at_value), _row(p, at_value)),
        worst_gradient_at=(_row(q, at_gradient), _row(p, at_gradient)),
        errors=errors,
    )


def draw(reference: Reference, regime: str, dtype: torch.dtype, num_draws: int, seed: int = 0) -> tuple[Params, Params]:
    """Return the parameters of q and of p, rounded to the dtype, as leaves that require a gradient."""
    rng = np.random.default_rng([seed, zlib.crc32(f"{reference.name} {regime} {dtype}".encode())])

    def round_all(arrays: Mapping[str, Any]) -> Params:
        tensors = {key: torch.as_tensor(np.asarray(a), dtype=torch.float64).to(dtype) for key, a in arrays.items()}
        return {key: t.requires_grad_(key not in reference.constants) for key, t in tensors.items()}

    drawn_q, drawn_p = reference.draw(regime, num_draws, rng, dtype)
    return round_all(drawn_q), round_all(drawn_p)


def errors_at(
    reference: Reference,
    q: Params,
    p: Params,
    kl: Callable[[Distribution, Distribution], Tensor] = kl_divergence,
    with_gradient: bool = True,
) -> Errors:
    """Compare the KL of a batch of parameters, and its gradient, with the reference, draw by draw."""
    built_q, built_p = reference.build(q, p)
    q, p = _as_held(reference, q, built_q), _as_held(reference, p, built_p)
    value = kl(built_q, built_p)
    dtype = value.dtype
    leaves = [params[key] for params in (q, p) for key in params if key not in reference.constants]
    grads: list[Tensor] = []
    if with_gradient:
        computed = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
        grads = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(computed, leaves, strict=True)]
    values, gradient = value.detach().tolist(), [0.0] * len(value)
    known = truths(reference, q, p, with_gradient)
    references = [truth.kl for truth in known]
    with mpmath.workdps(reference.digits):
        if with_gradient:
            gradient = [gradient_error([g[i] for g in grads], t.gradient, dtype) for i, t in enumerate(known)]
        ulp = [ulp_error(v, r, dtype) for v, r in zip(values, references, strict=True)]
        relative = [relative_error(v, r, dtype) for v, r in zip(values, references, strict=True)]
    return Errors(values, references, ulp, relative, gradient)


def ulp_error(value: float, reference: Any, dtype: torch.dtype) -> float:
    """Return |value - reference| in units in the last place of the reference in the dtype.

    Where the reference exceeds the dtype's range, inf is right and costs nothing. A NaN, or an infinity in the
    wrong place, costs inf.
    """
    if value == round_to(reference, dtype) and not math.isfinite(value):
        return 0.0
    if not math.isfinite(value) or not mpmath.isfinite(reference):
        return math.inf
    return float(abs(mpmath.mpf(value) - reference) / ulp_of(reference, dtype))


def ulp_of(reference: Any, dtype: torch.dtype) -> Any:
    """Return the distance of neighbouring numbers of the dtype at the reference, subnormal ones included."""
    info = torch.finfo(dtype)
    _, exponent = mpmath.frexp(reference)  # reference = m 2^exponent with ½ ≤ m < 1
    _, smallest = math.frexp(info.tiny)
    if reference == 0:
        exponent = smallest
    return mpmath.ldexp(mpmath.mpf(info.eps), max(int(exponent), smallest) - 1)


def round_to(reference: Any, dtype: torch.dtype) -> float:
    """Return the reference rounded to the dtype; beyond its range, an infinity."""
    return float(torch.tensor(float(reference), dtype=torch.float64).to(dtype))


def relative_error(value: float, reference: Any, dtype: torch.dtype) -> float:
    """Return |value - reference| / |reference|; 0 where the two are equal, overflow of the dtype to inf included."""
    if value == reference or (math.isinf(value) and value == round_to(reference, dtype)):
        return 0.0
    if not math.isfinite(value) or not mpmath.isfinite(reference) or reference == 0:
        return math.inf
    return float(abs(mpmath.mpf(value) - reference) / abs(reference))


def gradient_error(computed: list[Tensor], reference: list[Any], dtype: torch.dtype) -> float:
    """Return the worst error of an entry, divided by the largest entry of the reference, which is one flat list.

    Draws without a finite reference, or with entries beyond the dtype's range, count 0; a NaN counts inf.
    """
    if not reference:
        return 0.0
    pairs = list(zip((entry for t in computed for entry in t.reshape(-1).tolist()), reference, strict=True))
    largest = max(abs(r) for _, r in pairs)
    if largest > torch.finfo(dtype).max:
        return 0.0
    if not all(math.isfinite(c) for c, _ in pairs):
        return math.inf
    worst = max(abs(mpmath.mpf(c) - r) for c, r in pairs)
    if largest < torch.finfo(dtype).tiny:
        return 0.0 if worst <= torch.finfo(dtype).tiny else math.inf
    return float(worst / largest)


def combinations(references: list[Reference]) -> Iterator[tuple[Reference, str, torch.dtype]]:
    """Yield every (reference, regime, dtype) that there is to measure."""
    for reference, dtype in itertools.product(references, (torch.float32, torch.float64)):
        for regime in reference.regimes:
            yield reference, regime, dtype


def _as_held(reference: Reference, params: Params, d: Distribution) -> Params:
    return {key: getattr(d, key) if key in reference.held else t for key, t in params.items()}


def _row(params: Params, i: int) -> dict[str, Any]:
    return {key: t[i].detach().tolist() for key, t in params.items()}


def _argmax(errors: list[float]) -> int:
    return max(range(len(errors)), key=lambda i: errors[i])
