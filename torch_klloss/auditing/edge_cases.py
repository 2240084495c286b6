"""What a loss does at the edges: extreme and nearly equal parameters, float32, one example, one dimension, more.

Nothing here decides whether a loss is right; a remark says what its user should know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from torch_klloss.auditing.experiment.calling import CallError, Reply, call_once
from torch_klloss.auditing.experiment.observation import Asked, describe
from torch_klloss.auditing.experiment.probes import Categoricals, Layout, Normals
from torch_klloss.auditing.experiment.signatures import Leaves
from torch_klloss.auditing.explanation.expectations import analytic, categorical, misread
from torch_klloss.auditing.explanation.fit import Fit, arranged

_NEAR = 1e-4  # how far q is from p in units of p's scale: the KL is about 1e-8, float32's rounding of 1 is 6e-8
_FAR = 40.0  # log-variances of ±2·40: the standard deviation is in float32's range, and so is its square
_SLACK = 0.05  # relative: what a float32 loss may be off at q ≈ p without a remark


def remarks(asked: Asked, fit: Fit, seed: int, *, stochastic: bool) -> list[str]:
    """Return what a user should know of a loss beside its verdict, a sentence each."""
    found = [*_dtypes(asked, seed), *_shapes(asked, fit, seed, stochastic=stochastic)]
    if not stochastic:
        found += [*_near_equality(asked, fit, seed), *_extremes(asked, fit, seed)]
    return found


def _reply(asked: Asked, leaves: Leaves, dtype: torch.dtype, seed: int) -> Reply:
    live = {name: leaf.to(dtype, copy=True).requires_grad_(asked.gradient) for name, leaf in leaves.items()}
    return call_once(asked.fn, asked.call, live, seed)


def _truth(asked: Asked, leaves: Leaves, fit: Fit, value: Tensor) -> Tensor:
    """Return the KL of one probe in float64, arranged and reduced as the loss's values are."""
    layout = Layout((tuple(next(iter(leaves.values())).shape),))
    flat = {name: leaf.double().reshape(-1) for name, leaf in leaves.items()}
    pair = misread(asked.call.signature, flat, layout, {})
    core = categorical(pair, layout, {}) if isinstance(pair, Categoricals) else analytic(pair, layout, {})
    total = layout.means(core.examples) * layout.batch**fit.batch
    if value.numel() == 1:
        return total
    for arrangement in ("example", "element", "latent"):
        found = arranged(core, layout, arrangement)
        if found is not None and found.numel() == value.numel():
            return found * layout.batch ** (fit.batch if arrangement == "latent" else 0)
    raise CallError("its shape changes")


def _normals(asked: Asked, shape: tuple[int, ...], mean: float, logvar: float) -> Leaves:
    """Return the leaves of q at p = N(0, 1), or of scores that differ as much."""
    size = torch.Size(shape).numel()
    signs = torch.where(torch.arange(size) % 2 == 0, 1.0, -1.0).double()
    if asked.call.signature.categorical:
        p = torch.linspace(-1, 1, size, dtype=torch.float64)
        drawn: Normals | Categoricals = Categoricals(p + mean * signs, p, Layout((shape,)))
    else:
        zero = torch.zeros(size, dtype=torch.float64)
        drawn = Normals(mean * signs, zero + logvar, zero, zero)
    return {name: leaf.reshape(shape) for name, leaf in asked.call.signature.leaves(drawn).items()}


def _shape(asked: Asked) -> tuple[int, ...]:
    return asked.layout.shapes[1] if asked.rank > 1 else asked.layout.shapes[1][1:]


def _dtypes(asked: Asked, seed: int) -> Iterator[str]:
    leaves = {name: parts[0] if asked.rank > 1 else parts[0][0] for name, parts in asked.split.items()}
    for dtype in (torch.float32, torch.bfloat16):
        live = {name: leaf.to(dtype, copy=True) for name, leaf in leaves.items()}
        returned: list[torch.dtype] = []
        try:
            call_once(_watch(asked.fn, returned), asked.call, live, seed)
        except CallError as error:
            if dtype is torch.float32:
                yield f"in float32 {error}."
            continue
        if returned and returned[0] is not dtype and dtype is torch.float32:
            yield f"it returns {returned[0]} for {dtype} parameters."


def _watch(fn: Callable[..., object], returned: list[torch.dtype]) -> Callable[..., object]:
    def watched(*arguments: object) -> object:
        value = fn(*arguments)
        if isinstance(value, Tensor):
            returned.append(value.dtype)
        return value

    return watched


def _near_equality(asked: Asked, fit: Fit, seed: int) -> Iterator[str]:
    shape = _shape(asked)
    leaves = _normals(asked, shape, _NEAR, _NEAR)
    leaves = {name: leaf.float() for name, leaf in leaves.items()}
    try:
        reply = _reply(asked, leaves, torch.float32, seed)
        truth = _truth(asked, leaves, fit, reply.value)
    except CallError:
        return
    if fit.ids or not reply.value.isfinite().all():
        return
    worst = ((reply.value.reshape(-1) - truth).abs() / truth.abs()).max().item()
    if asked.call.signature.given_samples:
        return
    at = int(((reply.value.reshape(-1) - truth).abs() / truth.abs()).argmax())
    if worst > _SLACK:
        got = reply.value.reshape(-1)[at].item()
        negative = ", a negative KL" if got < 0 else ""
        yield (
            f"where q is near p it loses its digits in float32: {got:.3g} for {truth[at].item():.3g}{negative}. "
            f"The KL of small differences needs expm1 and log1p; AutoKL has them."
        )


def _extremes(asked: Asked, fit: Fit, seed: int) -> Iterator[str]:
    shape = _shape(asked)
    if asked.call.signature.categorical:
        cases = {"scores 200 apart": _normals(asked, shape, 100.0, 0.0)}
    else:
        cases = {
            f"log-variances of {logvar:+.0f}": _normals(asked, shape, 0.5, logvar) for logvar in (-2 * _FAR, 2 * _FAR)
        }
    for name, leaves in cases.items():
        single = {key: leaf.float() for key, leaf in leaves.items()}
        if not all(bool(leaf.isfinite().all()) for leaf in single.values()):
            continue
        try:
            reply = _reply(asked, single, torch.float32, seed)
        except CallError as error:
            yield f"at {name} {error}."
            continue
        truth = _truth(asked, single, fit, reply.value)
        if not math.isfinite(float(truth.sum())):
            continue
        if not bool(reply.value.isfinite().all()):
            word = "NaN" if bool(reply.value.isnan().any()) else "inf"
            yield f"at {name} it returns {word} in float32; the KL is {truth.max().item():.3g}."
        elif any(grad is not None and not bool(grad.isfinite().all()) for grad in reply.gradients.values()):
            yield f"at {name} its gradient is not finite in float32."


def _shapes(asked: Asked, fit: Fit, seed: int, *, stochastic: bool) -> Iterator[str]:
    if asked.rank != 2 or asked.call.signature.name in ("log_probs", "categorical"):
        return
    cases = {"a single example": (1, 5), "a single latent dimension": (4, 1), "an extra dimension": (4, 3, 5)}
    if asked.call.signature.categorical:
        del cases["a single latent dimension"]
    for name, shape in cases.items():
        leaves = {key: leaf.reshape(shape) for key, leaf in _normals(asked, shape, 0.5, 0.4).items()}
        try:
            reply = _reply(asked, leaves, torch.float64, seed)
            if stochastic or asked.call.signature.given_samples or fit.ids:
                continue
            truth = _truth(asked, leaves, fit, reply.value)
        except CallError as error:
            yield f"at {name}, {describe(shape)}, {error}."
            continue
        ratio = float(reply.value.sum() / truth.sum())
        if abs(ratio - 1) > 1e-2 and not _same_elsewhere(reply.value, truth, shape):
            if math.isclose(ratio * shape[1], 1, rel_tol=1e-2):
                yield f"at {name}, {describe(shape)}, it takes the {shape[1]} in the middle for examples too."
            else:
                yield f"at {name}, {describe(shape)}, it is {ratio:.4g} times the KL per example."


def _same_elsewhere(value: Tensor, truth: Tensor, shape: tuple[int, ...]) -> bool:
    """Return whether an unreduced loss is right in sum, or a mean was taken over time steps as well as examples."""
    return value.numel() > 1 and math.isclose(float(value.sum()), float(truth.sum()), rel_tol=1e-2)
