"""Other conventions for the derivative of `clamp`, `abs`, `maximum` and their like where two branches meet.

torch 2.14 made the derivative of `clamp` at a bound that is a number 0, where it had been 1. A formula whose derivative
is the same under all conventions depends on none, whatever a release chooses.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CLAMPS = {"clamp": ("min", "max"), "clip": ("min", "max"), "clamp_min": ("min",), "clamp_max": ("max",)}
RAMPS = {"relu"}  # with a corner at 0
PAIRS = {"maximum", "minimum", "fmax", "fmin"}
REDUCTIONS = {"amax": "argmax", "amin": "argmin"}


class Ties(TorchFunctionMode):
    """A mode in which the derivative at a tie has the convention that `share` says; values stay torch's.

    At a bound, `clamp` has the derivative `share` by its argument, and 1 - `share` by a bound that is a tensor;
    `maximum(a, b)` at a = b has `share` by a and 1 - `share` by b; `abs` has 2 `share` - 1 at zero; of equal largest
    elements `amax` differentiates by the first alone.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        replaced = self._replacement(name, args, kwargs)
        if replaced is None or "out" in kwargs or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        return replaced(func)

    def _replacement(self, name: str, args: Any, kwargs: dict[str, Any]) -> Callable[[Any], Tensor] | None:
        if name in CLAMPS:
            bounds = dict(zip(CLAMPS[name], args[1:], strict=False)) | kwargs
            return lambda func: self._clamp(args[0], bounds.get("min"), bounds.get("max"))
        if name in RAMPS:
            return lambda func: self._clamp(args[0], 0.0, None)
        if name in ("abs", "absolute"):
            return lambda func: _move(func(_cut(args[0], args[0] == 0)), args[0], args[0] == 0, 2 * self.share - 1)
        if name in PAIRS or (name in ("max", "min") and len(args) == 2 and isinstance(args[1], Tensor)):
            return lambda func: self._meet(func, *args)
        if name in REDUCTIONS and isinstance((*args[1:], kwargs.get("dim"))[0], int):
            return lambda func: _first(REDUCTIONS[name], *args, **kwargs)
        return None

    def _clamp(self, x: Tensor, low: Tensor | float | None, high: Tensor | float | None) -> Tensor:
        for bound, meet in ((low, torch.maximum), (high, torch.minimum)):
            if bound is not None:
                x = self._meet(meet, x, torch.as_tensor(bound, dtype=x.dtype, device=x.device))
        return x

    def _meet(self, func: Any, a: Tensor, b: Tensor) -> Tensor:
        tie = a == b
        value = func(_cut(a, tie), _cut(b, tie))
        return _move(_move(value, a, tie, self.share), b, tie, 1 - self.share)


def _cut(x: Tensor, tie: Tensor) -> Tensor:
    """Return x without a derivative where there is a tie."""
    return torch.where(tie, x.detach(), x)


def _move(value: Tensor, x: Tensor, tie: Tensor, slope: float) -> Tensor:
    """Return the value, with the derivative `slope` by x where there is a tie."""
    kept = torch.where(tie & x.isfinite(), x, 0.0)
    return value + slope * (kept - kept.detach())


def _first(position: str, x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    found = x.gather(dim, getattr(x, position)(dim, keepdim=True))
    return found if keepdim else found.squeeze(dim)
