"""Controllers of the KL's weight, driven by training: their state is in buffers, and so in the state_dict.

A controller is an `nn.Module` called once a step with the reconstruction and the KL, both in nats per example, without
gradient; it returns the weight of that step. In training mode it then updates its state, in evaluation mode not.
Under `torch.distributed` it takes the means over all ranks, so that every rank has the same weight. A step whose mean
is NaN or infinite leaves the state as it was, with a warning: a single bad batch would otherwise decide every later β.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, distributed, nn

from torch_klloss.numerics.arguments import check_number
from torch_klloss.numerics.devices import can_be_read


class BetaController(nn.Module):
    """Base of the controllers: a weight of the KL with its state in buffers, and a `forward` that updates it."""

    @property
    def beta(self) -> Tensor:
        """The current weight."""
        raise NotImplementedError(f"{type(self).__name__} must define the property beta.")

    def forward(self, reconstruction: Tensor, kl: Tensor) -> Tensor:
        """Return the weight of this step, a scalar, and update the state in training mode."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(reconstruction, kl).")


class GECO(BetaController):
    """Keep the reconstruction at a tolerance: β falls while it is worse, and rises once it is better.

    GECO minimises KL + λ · (reconstruction - tolerance) with a Lagrange multiplier λ that grows by the factor exp(rate
    · C) a step, C the moving average of reconstruction - tolerance. Here β = 1/λ weighs the KL: the same objective,
    divided by λ.

    Args:
        tolerance: the reconstruction to reach, in nats per example.
        rate: how fast log λ moves, per nat and step.
        momentum: of the moving average, in [0, 1).
        initial: the first β.
        bounds: the least and the largest β.

    Raises:
        ValueError: if a number is out of its range.

    References:
        *Taming VAEs* (Rezende and Viola, 2018), algorithm 1.

    Examples:
        >>> import torch
        >>> from torch_klloss.elbo import GECO
        >>> weight = GECO(tolerance=20.0, rate=0.1, momentum=0.0)
        >>> [round(weight(torch.tensor(nats), torch.tensor(3.0)).item(), 3) for nats in (25.0, 20.0, 18.0, 18.0)]
        [1.0, 0.607, 0.607, 0.741]
    """

    def __init__(
        self,
        tolerance: float,
        *,
        rate: float = 0.01,
        momentum: float = 0.99,
        initial: float = 1.0,
        bounds: tuple[float, float] = (1e-4, 1e4),
    ) -> None:
        super().__init__()
        _check_bounds(bounds, positive=True)
        numbers = {"tolerance": tolerance, "rate": rate, "momentum": momentum, "initial": initial}
        for name, number in numbers.items():
            check_number(name, number)
        if not math.isfinite(tolerance) or not rate > 0 or not 0 <= momentum < 1:
            raise ValueError(
                "GECO needs a finite tolerance, a rate above 0 and a momentum in [0, 1), got "
                f"{tolerance!r}, {rate!r} and {momentum!r}."
            )
        if not bounds[0] <= initial <= bounds[1]:
            raise ValueError(f"initial must lie within the bounds {bounds}, got {initial!r}.")
        self.tolerance, self.rate, self.momentum, self.bounds = tolerance, rate, momentum, tuple(bounds)
        self.log_beta: Tensor
        self.excess: Tensor
        self.register_buffer("log_beta", torch.tensor(math.log(initial)))
        self.register_buffer("excess", torch.tensor(math.nan))  # no average before the first step

    @property
    def beta(self) -> Tensor:
        """The current weight."""
        return self.log_beta.exp().float()

    def forward(self, reconstruction: Tensor, kl: Tensor) -> Tensor:
        """Return the weight of this step; the reconstruction changes that of the next."""
        beta = self.beta
        if self.training:
            now = _mean_over_ranks(reconstruction).to(self.excess) - self.tolerance
            is_finite = _checked_finite(now, "GECO", "reconstruction")
            average = self.momentum * self.excess + (1 - self.momentum) * now
            excess = torch.where(self.excess.isnan(), now, average)
            low, high = (math.log(end) for end in self.bounds)
            log_beta = (self.log_beta - self.rate * excess).clamp(low, high)
            self.excess = torch.where(is_finite, excess, self.excess)
            self.log_beta = torch.where(is_finite, log_beta, self.log_beta)
        return beta

    def extra_repr(self) -> str:
        """Return the settings, for `repr`."""
        return f"tolerance={self.tolerance}, rate={self.rate}, momentum={self.momentum}, bounds={self.bounds}"


class PIControl(BetaController):
    """Keep the KL at a target: a proportional and an integral term of the error e = target - KL give β.

    β = Kp / (1 + exp(e)) - Ki Σ e + β_min, kept within the bounds. While β is beyond one of them, the sum leaves out
    errors that would drive it further out. It takes those that lead back; the paper's sum rests, and may never return.

    Args:
        target: the KL to hold, in nats per example.
        proportional: Kp.
        integral: Ki.
        bounds: the least and the largest β.

    Raises:
        ValueError: if a number is out of its range.

    References:
        *ControlVAE: controllable variational autoencoder* (Shao et al., 2020), algorithm 1.

    Examples:
        >>> import torch
        >>> from torch_klloss.elbo import PIControl
        >>> weight = PIControl(target=10.0, proportional=0.01, integral=0.001)
        >>> [round(weight(torch.tensor(20.0), torch.tensor(kl)).item(), 4) for kl in (30.0, 30.0, 10.0)]
        [0.03, 0.05, 0.045]
    """

    def __init__(
        self,
        target: float,
        *,
        proportional: float = 0.01,
        integral: float = 0.0001,
        bounds: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__()
        _check_bounds(bounds, positive=False)
        for name, number in {"target": target, "proportional": proportional, "integral": integral}.items():
            check_number(name, number)
        if not all(0 <= number < math.inf for number in (target, proportional, integral)):
            raise ValueError(
                f"PIControl needs target, proportional and integral to be finite and at least 0, got {target!r}, "
                f"{proportional!r} and {integral!r}."
            )
        self.target, self.proportional, self.integral, self.bounds = target, proportional, integral, tuple(bounds)
        self.error_sum: Tensor
        self.last: Tensor
        self.register_buffer("error_sum", torch.zeros(()))  # times Ki, with its sign
        self.register_buffer("last", torch.tensor(float(bounds[0])))  # before it was bounded

    @property
    def beta(self) -> Tensor:
        """The current weight."""
        return self.last.clamp(*self.bounds).float()

    def forward(self, reconstruction: Tensor, kl: Tensor) -> Tensor:
        """Return the weight of this step, which its own KL has changed already."""
        if self.training:
            error = self.target - _mean_over_ranks(kl).to(self.last)
            is_finite = _checked_finite(error, "PIControl", "KL")
            low, high = self.bounds
            outward = ((self.last > high) & (error < 0)) | ((self.last < low) & (error > 0))
            self.error_sum = torch.where(is_finite & ~outward, self.error_sum - self.integral * error, self.error_sum)
            last = self.proportional * torch.sigmoid(-error) + self.error_sum + low
            self.last = torch.where(is_finite, last, self.last)
        return self.beta

    def extra_repr(self) -> str:
        """Return the settings, for `repr`."""
        gains = f"proportional={self.proportional}, integral={self.integral}"
        return f"target={self.target}, {gains}, bounds={self.bounds}"


def _check_bounds(bounds: tuple[float, float], *, positive: bool) -> None:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise TypeError(f"bounds must be two numbers, the least and the largest β, got {bounds!r}.")
    low, high = bounds
    check_number("bounds", low)
    check_number("bounds", high)
    if not (0 <= low <= high < math.inf) or (positive and low == 0):
        least = "above 0" if positive else "at least 0"
        raise ValueError(f"bounds must be finite, in order and {least}, got {bounds!r}.")


def _checked_finite(measured: Tensor, controller: str, what: str) -> Tensor:
    """Return whether a measured number is finite; warn of one that is not, unless asking would wait for a device."""
    is_finite = measured.isfinite()
    if can_be_read(measured) and not is_finite:
        warnings.warn(
            f"{controller} was given a {what} that is NaN or infinite; it leaves β as it was. Look for the batch that "
            "overflows.",
            RuntimeWarning,
            stacklevel=3,
        )
    return is_finite


def _mean_over_ranks(value: Tensor) -> Tensor:
    value = value.detach().clone()
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(value)
        value = value / distributed.get_world_size()
    return value
