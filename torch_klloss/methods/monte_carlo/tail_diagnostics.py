"""Heavy tails, which make the spread of a sample useless as the error of its mean."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from torch_klloss.numerics.devices import can_be_read, has_float64

_MIN_TAIL = 5
_VARIANCE, _WARN = 0.5, 0.7


class HeavyTailWarning(UserWarning):
    """Warns that the ratios p(x)/q(x) have too heavy a tail for the mean over the draws."""


def tail_shape(log_ratio: Tensor) -> Tensor:
    """Return the shape k of a generalised Pareto distribution fitted to the largest ratios, over the first dimension.

    Moments of order 1/k and above are infinite: from k = 1/2 on the variance, and the mean converges ever more slowly;
    from 0.7 on it is of no practical use. As in Pareto-smoothed importance sampling, the largest min(S/5, 3 √S) of S
    ratios are the tail, and the estimate is shrunk towards 1/2 with the weight of ten observations. NaN for fewer than
    25 draws, which have no tail to fit, and where a ratio is NaN.

    Args:
        log_ratio: the logarithms, `[S, *batch]`.

    References:
        *Pareto smoothed importance sampling* (Vehtari, Simpson, Gelman, Yao and Gabry, 2024). *A new and efficient
        estimation method for the generalized Pareto distribution* (Zhang and Stephens, 2009).

    Examples:
        >>> import torch
        >>> from torch_klloss.methods.monte_carlo.tail_diagnostics import tail_shape
        >>> uniform = (torch.arange(4096) + 0.5) / 4096
        >>> pareto = -0.8 * uniform.log()  # exp of it has the shape 0.8
        >>> round(tail_shape(pareto).item(), 1), bool(tail_shape(uniform) < 0)
        (0.8, True)
    """
    log_ratio = log_ratio.detach()
    log_ratio = log_ratio.double() if has_float64(log_ratio.device) else log_ratio.float()
    size = min(len(log_ratio) // 5, math.ceil(3 * len(log_ratio) ** 0.5))
    if size < _MIN_TAIL:
        return torch.full_like(log_ratio.sum(0), math.nan)
    top = log_ratio.sort(0).values[-size - 1 :]
    tail = (top - top[-1]).exp()
    return _pareto_shape(tail[1:] - tail[0])


def _pareto_shape(x: Tensor) -> Tensor:
    """Return the posterior mean of the shape, x sorted along the first dimension."""
    n = len(x)
    num_guesses = 30 + int(n**0.5)
    guess = torch.arange(1, num_guesses + 1, dtype=x.dtype, device=x.device).reshape(-1, 1, *(1,) * (x.dim() - 1))
    quarter = x[int(n / 4 + 0.5) - 1].clamp_min(torch.finfo(x.dtype).tiny)
    theta = 1 / x[-1].clamp_min(torch.finfo(x.dtype).tiny) + (1 - (num_guesses / (guess - 0.5)).sqrt()) / (3 * quarter)
    shape = torch.log1p(-theta * x).mean(1, keepdim=True)
    log_likelihood = n * ((-theta / shape).log() - shape - 1)
    weights = log_likelihood.nan_to_num(nan=-math.inf).softmax(0)
    mean = (theta * weights).sum((0, 1))
    k = torch.log1p(-mean * x).mean(0)
    return (k * n + 0.5 * 10) / (n + 10)


def may_have_heavy_tail(log_ratio: Tensor, what: str, remedy: str) -> Tensor:
    """Return where the standard error of exponentiated log-ratios is unreliable, and warn where their mean is too.

    The warning is given on the CPU alone: an accelerator would have to be waited for.

    Args:
        log_ratio: the logarithms of the ratios, `[S, *batch]`.
        what: the option that exponentiates them, for the warning.
        remedy: what to do instead, for the warning.

    Returns:
        bool `[*batch]`: where the fitted shape is 1/2 or more, or not known.
    """
    shape = tail_shape(log_ratio)
    heavy = shape > _WARN
    if can_be_read(heavy) and bool(heavy.any()):
        warnings.warn(
            f"{what} exponentiates ratios of densities whose largest values look like a Pareto tail of shape "
            f"{shape[heavy].max().item():.2f} (above 0.7 in {int(heavy.sum())} of {heavy.numel()} batch elements): "
            f"their variance would be infinite, and more draws hardly help. {remedy}",
            HeavyTailWarning,
            stacklevel=3,
        )
    return ~(shape < _VARIANCE)
