"""Randomised quasi-Monte Carlo: Sobol nets with a random shift."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.quasirandom import SobolEngine

from torch_klloss.numerics.arguments import check_integer
from torch_klloss.numerics.devices import constant_on
from torch_klloss.numerics.tracing import without_func
from torch_klloss.samplers.draws import Draws, PreparedSampler
from torch_klloss.samplers.transport import TransportedDraws, cells_of

MAX_DIMENSION = SobolEngine.MAXDIM
_NET_BITS = SobolEngine.MAXBIT
_MAX_KEPT = 2**21  # numbers in a net that is kept, of which there are at most 16: 256 MB


def sobol_net(n: int, d: int, bits: int) -> Tensor:
    """Return the first n points of a scrambled Sobol net in d dimensions, as integers below 2^bits, `[n, d]`.

    The net is the same at every call; a digital shift makes it random afterwards. No random stream is used.

    The first m = ⌈log₂ n⌉ binary digits put one point in each of 2^m strata of every dimension. The next digits place
    the point within its stratum: the parity of all m, then of all but the first, of all but the second, … Neighbours
    are then displaced in opposite directions, and errors of polynomials of low degree cancel. The remaining digits are
    zero: the shift alone determines them. Compared with random digits (Owen's scrambling) this halves the variance in
    one dimension, and brings the mean over a net nearer to a normal law, which the error from a few nets relies on.

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


# Set by torch.compiler.assume_constant_result, which would import all of the compiler.
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
    with without_func(), torch.device("cpu"):  # the engine writes in place
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


@dataclass(frozen=True)
class Sobol(PreparedSampler):
    """Draw scrambled Sobol points, shifted digitally and independently for every batch element.

    Each point is uniform in the unit cube, and hence each point of q a draw from q: expectations are unbiased. Together
    the points fill the cube more evenly than independent ones. For a smooth integrand the variance falls
    as S^-3 up to logarithms instead of S^-1, most so at S a power of two; for one that is kinked or of many dimensions
    it falls less. The dimensions of one event share a net, of at most 21,201 dimensions.

    A single net gives no error: its points spread as q does, and their mean does not. With R
    `replicates` the S points are R nets of S/R points, independent of one another; the error of their mean has R - 1
    degrees of freedom, and is NaN for R = 1. Eight nets of eight points give a reliable error, unless the variance
    comes from a tail that few of them reach: then more nets of fewer points are better.

    Args:
        replicates: R.

    References:
        *Randomly permuted (t, m, s)-nets and (t, s)-sequences* (Owen, 1995). *Recent advances in randomized
        quasi-Monte Carlo methods* (L'Ecuyer and Lemieux, 2002).

    Examples:
        >>> import torch
        >>> from torch.distributions import Uniform
        >>> from torch_klloss.samplers import Sobol
        >>> points = Sobol().draw(Uniform(torch.zeros(3), 1.0), 8, differentiable=False)
        >>> (points.x.sort(0).values * 8).int()[:, 0]
        tensor([0, 1, 2, 3, 4, 5, 6, 7], dtype=torch.int32)
    """

    replicates: int = 1

    def __post_init__(self) -> None:
        check_integer("Sobol(replicates=...)", self.replicates)

    def prepare(self, q: Distribution, num_samples: int, *, differentiable: bool) -> Draws:
        """Return the draws, the replicates one after the other."""
        n = points_each("Sobol", num_samples, self.replicates)
        cells = cells_of(q)
        net = sobol_net(n, cells.shape[-1], cells.bits)
        net = constant_on(cells.device, net) if net.numel() <= _MAX_KEPT else net.to(cells.device)
        net = net.reshape(n, *(1,) * len(q.batch_shape), cells.shape[-1])
        shifts = cells.random(self.replicates)

        def noise(start: int, stop: int) -> Tensor:
            if self.replicates == 1:
                return net[start:stop] ^ shifts
            draws = torch.arange(start, stop, device=cells.device)
            return net[draws % n] ^ shifts[draws // n]

        return TransportedDraws(q, cells, noise, num_samples, self.replicates, differentiable)


def points_each(name: str, num_samples: int, replicates: int) -> int:
    """Return the number of points of a replicate.

    Raises:
        ValueError: if the points cannot be shared out evenly.
    """
    if num_samples % replicates:
        raise ValueError(
            f"{name}(replicates={replicates}) needs a num_samples that is a multiple of {replicates}, got "
            f"{num_samples}; use {replicates * -(-num_samples // replicates)}."
        )
    return num_samples // replicates
