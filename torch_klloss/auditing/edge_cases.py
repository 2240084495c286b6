"""Edge cases of a loss: extreme and nearly equal parameters, float32, one example, one dimension, an extra dimension.

They give remarks to the user, and do not decide whether a loss is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from torch_klloss.auditing.experiment.calling import CallError, Reply, call_once
from torch_klloss.auditing.experiment.observation import Subject, describe
from torch_klloss.auditing.experiment.probes import Categoricals, Layout, Normals
from torch_klloss.auditing.experiment.signatures import Leaves, ProbedPair
from torch_klloss.auditing.explanation.candidates import right_core
from torch_klloss.auditing.explanation.fit import Fit, arranged

_NEAR = 1e-4  # how far q is from p in units of p's scale: the KL is about 1e-8, float32's rounding of 1 is 6e-8
_FAR = 40.0  # log-variances of ±2·40: the standard deviation is in float32's range, and so is its square
_SLACK = 0.05  # the largest relative error of a float32 loss at q ≈ p without a remark


def remarks(subject: Subject, fit: Fit, seed: int, *, stochastic: bool) -> list[str]:
    """Return the remarks on a loss beside its verdict, a sentence each."""
    found = [*_dtypes(subject, seed), *_shapes(subject, fit, seed, stochastic=stochastic)]
    if not stochastic:
        found += [*_near_equality(subject, fit, seed), *_extremes(subject, fit, seed)]
    return found


def _reply(subject: Subject, leaves: Leaves, dtype: torch.dtype, seed: int) -> Reply:
    live = {name: leaf.to(dtype, copy=True).requires_grad_(subject.gradient) for name, leaf in leaves.items()}
    return call_once(subject.fn, subject.binding, live, seed)


def _kl_like(value: Tensor, subject: Subject, leaves: Leaves, fit: Fit) -> Tensor:
    """Return the KL of one probe in float64, arranged and reduced as the loss's value is."""
    layout = Layout((tuple(next(iter(leaves.values())).shape),))
    flat = {name: leaf.double().reshape(-1) for name, leaf in leaves.items()}
    core = right_core(replace(subject, layout=layout, leaves=flat)).core
    total = layout.means(core.examples) * layout.batch**fit.batch
    if value.numel() == 1:
        return total
    for arrangement in ("example", "element", "latent"):
        found = arranged(core, layout, arrangement)
        if found is not None and found.numel() == value.numel():
            return found * layout.batch ** (fit.batch if arrangement == "latent" else 0)
    raise CallError("its shape changes")


def _normals(subject: Subject, shape: tuple[int, ...], mean: float, logvar: float) -> Leaves:
    """Return the leaves of a q near or far from p = N(0, 1), or of two categorical distributions alike."""
    size = torch.Size(shape).numel()
    signs = torch.where(torch.arange(size) % 2 == 0, 1.0, -1.0).double()
    if subject.signature.categorical:
        p = torch.linspace(-1, 1, size, dtype=torch.float64)
        drawn: ProbedPair = Categoricals(p + mean * signs, p, Layout((shape,)))
    else:
        zero = torch.zeros(size, dtype=torch.float64)
        drawn = Normals(mean * signs, zero + logvar, zero, zero)
    return {name: leaf.reshape(shape) for name, leaf in subject.signature.leaves(drawn).items()}


def _shape(subject: Subject) -> tuple[int, ...]:
    return subject.layout.shapes[1] if subject.rank > 1 else subject.layout.shapes[1][1:]


def _dtypes(subject: Subject, seed: int) -> Iterator[str]:
    leaves = {name: parts[0] if subject.rank > 1 else parts[0][0] for name, parts in subject.split.items()}
    for dtype in (torch.float32, torch.bfloat16):
        live = {name: leaf.to(dtype, copy=True) for name, leaf in leaves.items()}
        returned: list[torch.dtype] = []
        try:
            call_once(_watch(subject.fn, returned), subject.binding, live, seed)
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


def _near_equality(subject: Subject, fit: Fit, seed: int) -> Iterator[str]:
    shape = _shape(subject)
    leaves = _normals(subject, shape, _NEAR, _NEAR)
    leaves = {name: leaf.float() for name, leaf in leaves.items()}
    try:
        reply = _reply(subject, leaves, torch.float32, seed)
        kl = _kl_like(reply.value, subject, leaves, fit)
    except CallError:
        return
    if fit.ids or subject.signature.given_samples or not reply.value.isfinite().all():
        return
    errors = (reply.value.reshape(-1) - kl).abs() / kl.abs()
    at = int(errors.argmax())
    if float(errors[at]) > _SLACK:
        got = reply.value.reshape(-1)[at].item()
        negative = ", a negative KL" if got < 0 else ""
        yield (
            f"where q is near p it loses its digits in float32: {got:.3g} for {kl[at].item():.3g}{negative}. "
            f"The KL of small differences needs expm1 and log1p; AutoKL has them."
        )


def _extremes(subject: Subject, fit: Fit, seed: int) -> Iterator[str]:
    shape = _shape(subject)
    if subject.signature.categorical:
        cases = {"scores 200 apart": _normals(subject, shape, 100.0, 0.0)}
    else:
        cases = {
            f"log-variances of {logvar:+.0f}": _normals(subject, shape, 0.5, logvar) for logvar in (-2 * _FAR, 2 * _FAR)
        }
    for name, leaves in cases.items():
        single = {key: leaf.float() for key, leaf in leaves.items()}
        if not all(bool(leaf.isfinite().all()) for leaf in single.values()):
            continue
        try:
            reply = _reply(subject, single, torch.float32, seed)
        except CallError as error:
            yield f"at {name} {error}."
            continue
        kl = _kl_like(reply.value, subject, single, fit)
        if not math.isfinite(float(kl.sum())):
            continue
        if not bool(reply.value.isfinite().all()):
            word = "NaN" if bool(reply.value.isnan().any()) else "inf"
            yield f"at {name} it returns {word} in float32; the KL is {kl.max().item():.3g}."
        elif any(grad is not None and not bool(grad.isfinite().all()) for grad in reply.gradients.values()):
            yield f"at {name} its gradient is not finite in float32."


def _shapes(subject: Subject, fit: Fit, seed: int, *, stochastic: bool) -> Iterator[str]:
    if subject.rank != 2 or subject.signature.name in ("log_probs", "categorical"):
        return
    cases = {"a single example": (1, 5), "a single latent dimension": (4, 1), "an extra dimension": (4, 3, 5)}
    if subject.signature.categorical:
        del cases["a single latent dimension"]
    for name, shape in cases.items():
        leaves = {key: leaf.reshape(shape) for key, leaf in _normals(subject, shape, 0.5, 0.4).items()}
        try:
            reply = _reply(subject, leaves, torch.float64, seed)
            if stochastic or subject.signature.given_samples or fit.ids:
                continue
            kl = _kl_like(reply.value, subject, leaves, fit)
        except CallError as error:
            yield f"at {name}, {describe(shape)}, {error}."
            continue
        ratio = float(reply.value.sum() / kl.sum())
        if abs(ratio - 1) > 1e-2 and not _is_kl_in_sum(reply.value, kl):
            if math.isclose(ratio * shape[1], 1, rel_tol=1e-2):
                yield f"at {name}, {describe(shape)}, it takes the {shape[1]} in the middle for examples too."
            else:
                yield f"at {name}, {describe(shape)}, it is {ratio:.4g} times the KL per example."


def _is_kl_in_sum(value: Tensor, kl: Tensor) -> bool:
    """Return whether the values of an unreduced loss add up to the KL."""
    return value.numel() > 1 and math.isclose(float(value.sum()), float(kl.sum()), rel_tol=1e-2)
