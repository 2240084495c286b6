"""The KL in the whole loss of a VAE, loss_function(recon_x, x, mu, logvar), as a loss of its own."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_klloss.auditing.experiment.names import BY_NAMES

_RECON = (
    r"(?:.*_)?(?:recon\w*|rec|decoded|generated|output|outputs|pred\w*|hat|tilde|prime|logits?)(?:_.*)?|\w+_?hat|xr"
)
_DATA = r"(?:x|data|inputs?|targets?|images?|imgs?|original|batch|y|real|true)(?:_.*)?"
_SPREADS = tuple(pattern[1] for name, pattern in BY_NAMES.items() if name.startswith("mean_"))
_SHAPES = ((784,), (1, 28, 28), (3, 32, 32), (3, 64, 64))  # of an example, as losses have them written in
_LOGIT_OF_ZERO = -200.0  # whose probability is 0 in every precision
_UNIT_SPREADS = (0.0, 1.0, math.log(math.expm1(1.0)))  # of scale 1: a logarithm, the scale or variance, a raw scale
_FAR = 10.0  # of a mean: its KL is above any floor

Moments = tuple[Tensor, Tensor]


class WholeLoss:
    """A loss of (mean, spread): the whole loss where its reconstruction is zero.

    x is all zeros, and its reconstruction as well, or logits far below zero: whichever makes the loss less. Of several
    numbers that the loss returns it is the first that depends on the reconstruction and on the mean, or else the first
    that depends on the mean. A constant that the reconstruction still has there, such as log(2π)/2 for every pixel of
    a Gaussian likelihood, is taken off.
    """

    def __init__(self, fn: Callable[..., Any], names: tuple[str, str, str, str]) -> None:
        self.fn = fn
        self.names = names
        word = inspect.Parameter.POSITIONAL_OR_KEYWORD
        self.__signature__ = inspect.Signature([inspect.Parameter(name, word) for name in names[2:]])
        self._shape: tuple[int, ...] = ()
        self._recon = 0.0
        self._part: str | int | None = None
        self._without_kl: Callable[[Tensor, Tensor], Moments] | None = None
        self._is_known = False

    def __call__(self, mean: Tensor, spread: Tensor) -> Tensor:
        """Return the loss without its reconstruction."""
        if not self._is_known:
            with torch.no_grad():
                self._learn(mean.detach(), spread.detach())
        value = self._value(mean, spread)
        if self._without_kl is None:
            return value
        with torch.no_grad():
            constant = self._value(*self._without_kl(mean, spread))
        return value - constant

    @property
    def note(self) -> str:
        """What of the loss is judged, as a sentence."""
        recon, x, *_ = self.names
        at = f"{recon} = {x} = 0" if self._recon == 0 else f"{x} = 0 and {recon} = {self._recon:g} (logits)"
        part = "" if self._part is None else f", in what it returns as {self._part!r}"
        less = "" if self._without_kl is None else ", less the constant that it has there"
        return f"judged is its KL{part}: at {at}, where the reconstruction is least{less}."

    def _value(self, mean: Tensor, spread: Tensor) -> Tensor:
        return self._parts(mean, spread, self._recon)[self._part]

    def _parts(self, mean: Tensor, spread: Tensor, recon: float) -> dict[str | int | None, Tensor]:
        x = mean.new_zeros(len(mean), *self._shape)
        result = self.fn(**dict(zip(self.names, (torch.full_like(x, recon), x, mean, spread), strict=True)))
        if isinstance(result, Mapping):
            return dict(result)
        return dict(enumerate(result)) if isinstance(result, tuple | list) else {None: result}

    def _learn(self, mean: Tensor, spread: Tensor) -> None:
        """Find the shape that the loss takes, the part of it to judge, and where its reconstruction is zero."""
        for self._shape in _SHAPES:
            try:
                parts = self._parts(mean, spread, 0.0)
                break
            except Exception as error:
                failed = error
        else:
            raise failed
        other_recon, other_mean = self._parts(mean, spread, 0.5), self._parts(mean + 1, spread, 0.0)
        with_mean = [key for key, part in parts.items() if _differ(part, other_mean[key])]
        totals = [key for key in with_mean if _differ(parts[key], other_recon[key])]
        self._part = next(iter([*totals, *with_mean, *parts]))
        self._is_known = True
        if totals:
            with suppress(Exception):  # such as the error of a cross-entropy that takes probabilities
                if self._parts(mean, spread, _LOGIT_OF_ZERO)[self._part].sum() < parts[self._part].sum():
                    self._recon = _LOGIT_OF_ZERO
            with suppress(Exception):  # a loss that takes no other number of latent dimensions
                self._without_kl = self._find_constant(mean, spread)

    def _find_constant(self, mean: Tensor, spread: Tensor) -> Callable[[Tensor, Tensor], Moments] | None:
        """Return how to ask the loss for the constant of its reconstruction; None if there is none.

        A KL that is summed over the latent dimensions vanishes without any, and twice the dimensions add as much again:
        where they do not, the constant may be the KL's own, as a floor is. A mean over them is least at q = p.
        """
        far = mean + _FAR
        once, twice = self._value(far, spread), self._value(*(torch.cat([t, t], -1) for t in (far, spread)))
        if _are_close(once, twice):
            at_unit = [(self._value(*_standard(mean, spread, unit)).sum(), unit) for unit in _UNIT_SPREADS]
            _, unit = min((value, unit) for value, unit in at_unit if value.isfinite())
            without_kl: Callable[[Tensor, Tensor], Moments] = partial(_standard, unit=unit)
        elif _are_close(2 * once, twice + self._value(*_no_latent(mean, spread))):
            without_kl = _no_latent
        else:
            return None
        return without_kl if self._value(*without_kl(mean, spread)).any() else None


def whole_loss(fn: Callable[..., Any]) -> WholeLoss | None:
    """Return the KL of a whole loss by the names of its parameters; None where these are of another kind."""
    try:
        parameters = inspect.signature(fn.forward if isinstance(fn, torch.nn.Module) else fn).parameters.values()
    except (TypeError, ValueError):
        return None
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(needed) != 4:
        return None
    first, second, mean, spread = needed
    if not (_is(BY_NAMES["mean_logvar"][0], mean) and any(_is(pattern, spread) for pattern in _SPREADS)):
        return None
    recon, x = (first, second) if _is(_RECON, first) or not _is(_RECON, second) else (second, first)
    return WholeLoss(fn, (recon, x, mean, spread)) if _is(_RECON, recon) and _is(_DATA, x) else None


def _no_latent(mean: Tensor, spread: Tensor) -> Moments:
    return mean[..., :0], spread[..., :0]


def _standard(mean: Tensor, spread: Tensor, unit: float) -> Moments:
    return torch.zeros_like(mean), torch.full_like(spread, unit)


def _are_close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=100 * torch.finfo(one.dtype).eps, atol=0.0)


def _is(pattern: str, name: str) -> bool:
    return re.fullmatch(pattern, name.lower()) is not None


def _differ(part: Any, other: Any) -> bool:
    return isinstance(part, Tensor) and not torch.equal(part, other)
