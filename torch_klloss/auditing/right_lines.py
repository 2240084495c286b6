"""Right lines for a loss, each of them asked about as the loss was before it is shown."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from torch_klloss.auditing.experiment.calling import CallError
from torch_klloss.auditing.experiment.observation import Subject, observe
from torch_klloss.auditing.explanation.candidates import right_cores, unbiased_on_samples
from torch_klloss.auditing.explanation.fit import best_fits
from torch_klloss.distributions.families import diagonal_normal, standard_normal_like
from torch_klloss.language import token_kl
from torch_klloss.losses import AutoKL

_SEED = 0


def right_line(subject: Subject) -> str:
    """Return a right loss in the arguments of a loss, for as many dimensions as it was asked about; "" for none."""
    lines = [line for line in subject.binding.right.split(_OR) if line]
    found = (_for_dimensions(line, subject) for line in lines)
    return _OR.join(line for line in found if line)


_OR = ", or with torch_klloss: "
_OURS = {of.__name__: of for of in (AutoKL, diagonal_normal, standard_normal_like)}
_LANGUAGE = SimpleNamespace(token_kl=token_kl)
_TORCH = {"torch": torch, "F": torch.nn.functional, "math": math}
_SCOPE: dict[str, Any] = {**_OURS, **_TORCH, "torch_klloss": SimpleNamespace(**_OURS, language=_LANGUAGE)}


def _for_dimensions(line: str, subject: Subject) -> str:
    """Return a line, or the same with a sum over all dimensions but the first, if it is right."""
    lines = dict.fromkeys((line, line.replace(".sum(-1)", ".flatten(1).sum(-1)")))
    return next((each for each in lines if _is_right(each, subject)), "")


def _is_right(line: str, subject: Subject) -> bool:
    subject = replace(subject, fn=loss_of(line, subject.binding.names), gradient=False)
    try:
        observation = observe(subject, _SEED)
    except CallError:
        return False
    given = unbiased_on_samples(subject, observation) if subject.signature.given_samples else []
    return bool(best_fits([*given, *right_cores(subject)], subject.layout, observation, only_right=True))


def loss_of(line: str, names: tuple[str, ...]) -> Callable[..., Any]:
    """Return the loss that a line computes from parameters of these names; statements come first, with semicolons."""
    scope = {**_SCOPE}
    *statements, value = line.split("; ")
    exec("\n    ".join([f"def loss({', '.join(names)}):", *statements, f"return {value}"]), scope)
    loss: Callable[..., Any] = scope["loss"]
    return loss
