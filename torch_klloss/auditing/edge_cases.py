"""Edge cases of a loss: extreme and nearly equal parameters, float32, one example, one dimension, an extra dimension.

They give remarks to the user, and do not decide whether a loss is right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torch_klloss.auditing.experiment.calling import CallError, Reply, quiet, reply_to, seeded
from torch_klloss.auditing.experiment.observation import Subject, describe
from torch_klloss.auditing.experiment.probes import Categoricals, Layout, Normals
from torch_klloss.auditing.experiment.signatures import Leaves, ProbedPair
from torch_klloss.auditing.explanation.candidates import right_core_like
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


def _reply(subject: Subject, leaves: Leaves, seed: int) -> Reply:
    live = {name: leaf.clone().requires_grad_(subject.gradient) for name, leaf in leaves.items()}
    with quiet(), seeded(seed):
        return reply_to(subject.fn, subject.binding, live, watched=False)


def _kl_like(value: Tensor, subject: Subject, leaves: Leaves, fit: Fit) -> Tensor:
    """Return the KL of one probe in float64, arranged and reduced as the loss's value is."""
    shape = tuple(next(iter(leaves.values())).shape)
    layout = replace(subject.layout, shapes=(shape if subject.rank > 1 else (1, *shape),))
    flat = {name: leaf.double().reshape(-1) for name, leaf in leaves.items()}
    core = right_core_like(replace(subject, layout=layout, leaves=flat), fit.candidate).core
    total = layout.means(core.examples) * layout.batch**fit.batch if core.totals is None else core.totals
    if value.numel() == 1:
        return total
    for arrangement in ("example", "element", "latent"):
        found = arranged(core, layout, arrangement)
        if found is not None and found.numel() == value.numel():
            return found * layout.batch ** (fit.batch if arrangement == "latent" else 0)
    raise CallError("its shape changes")


def _leaves(subject: Subject, shape: tuple[int, ...], mean: float, logvar: float) -> Leaves:
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


def _float32_leaves(subject: Subject, mean: float, logvar: float) -> Leaves:
    shape = subject.layout.shapes[1] if subject.rank > 1 else subject.layout.shapes[1][1:]
    return {name: leaf.float() for name, leaf in _leaves(subject, shape, mean, logvar).items()}


def _dtypes(subject: Subject, seed: int) -> Iterator[str]:
    returned: list[Any] = []

    def watched(*arguments: Any) -> Any:
        returned.append(subject.fn(*arguments))
        return returned[0]

    single = replace(subject, fn=watched, dtype=torch.float32, gradient=False)
    try:
        _reply(single, single.leaves_of(0), seed)
    except CallError as error:
        yield f"in float32 {error}."
        return
    if isinstance(returned[0], Tensor) and returned[0].dtype is not torch.float32:
        yield f"it returns {returned[0].dtype} for torch.float32 parameters."


def _near_equality(subject: Subject, fit: Fit, seed: int) -> Iterator[str]:
    leaves = _float32_leaves(subject, _NEAR, _NEAR)
    try:
        reply = _reply(subject, leaves, seed)
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
    cases = {f"log-variances of {logvar:+.0f}": (0.5, logvar) for logvar in (-2 * _FAR, 2 * _FAR)}
    if subject.signature.categorical:
        cases = {"scores 200 apart": (100.0, 0.0)}
    for name, parameters in cases.items():
        leaves = _float32_leaves(subject, *parameters)
        if not all(bool(leaf.isfinite().all()) for leaf in leaves.values()):
            continue
        try:
            reply = _reply(subject, leaves, seed)
            kl = _kl_like(reply.value, subject, leaves, fit)
        except CallError as error:
            yield f"at {name} {error}."
            continue
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
        leaves = _leaves(subject, shape, 0.5, 0.4)
        try:
            reply = _reply(subject, leaves, seed)
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
