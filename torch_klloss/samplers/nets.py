"""Sobol nets in integers, made once for every size."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

MAX_DIMENSION = SobolEngine.MAXDIM
_NET_BITS = SobolEngine.MAXBIT
_MAX_KEPT = 2**21  # numbers in a net that is kept, of which there are at most 16: 256 MB


def sobol_net(n: int, d: int, bits: int) -> Tensor:
    """Return the first n points of a scrambled Sobol net in d dimensions, as integers below 2^bits, `[n, d]`.

    The net is the same at every call: what makes it random is a digital shift on top of it. No random stream is
    touched.

    Its first m = ⌈log₂ n⌉ binary digits put one point in each of 2^m strata of every dimension. Those after them place
    a point within its stratum: the parity of all m, then of all but the first, of all but the second, … Each point is
    then displaced the other way than its neighbours, and what is a polynomial of low degree cancels. The digits after
    these are zero: the shift alone decides them. Over random ones (Owen's scrambling) this halves the variance in one
    dimension, and brings the mean over a net nearer to a normal law, which the error of a few nets relies on.

    Args:
        n: how many points.
        d: how many dimensions.
        bits: of the integers, int32 up to 31.

    Raises:
        ValueError: if d is more than the 21,201 dimensions that direction numbers are known for.
    """
    if d > MAX_DIMENSION:
        raise ValueError(
            f"a Sobol net has at most {MAX_DIMENSION} dimensions, got {d} for one event of q; use IID() or "
            "Stratified(), or make dimensions that are independent of one another batch dimensions."
        )
    return _kept(n, d, bits) if n * d <= _MAX_KEPT else _made(n, d, bits)


# What torch.compiler.assume_constant_result sets, and for which it would import all of the compiler.
sobol_net.__dict__["_dynamo_marked_constant"] = True


def _made(n: int, d: int, bits: int) -> Tensor:
    m = min((n - 1).bit_length(), bits)
    leading = _sobol_points(n, d) >> (_NET_BITS - m)
    net = leading << (bits - m)
    chosen = [2**m - 1] + [2**m - 1 - 2**k for k in reversed(range(m))]
    for place, digits in enumerate(chosen[: bits - m], start=1):
        net |= _parity(leading & digits) << (bits - m - place)
    return net.int() if bits < 32 else net


def _sobol_points(n: int, d: int) -> Tensor:
    with torch._C._DisableFuncTorch(), torch.device("cpu"):  # the engine writes in place
        engine = SobolEngine(d, scramble=True, seed=0)
        points = engine.quasi.clone().long().unsqueeze(0)  # the first one: `draw` would round it to float32
        if n > 1:
            following = engine.draw(n, dtype=torch.float64)[1:] * 2**_NET_BITS
            points = torch.cat([points, following.long()])
    return points


def _parity(k: Tensor) -> Tensor:
    for shift in (16, 8, 4, 2, 1):
        k = k ^ (k >> shift)
    return k & 1


_kept = lru_cache(maxsize=16)(_made)
