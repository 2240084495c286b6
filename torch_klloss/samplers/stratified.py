"""Latin hypercubes: one draw in every stratum of every dimension."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.numerics.arguments import check_integer
from torch_klloss.samplers.draws import Draws, PreparedSampler, noise_in_blocks
from torch_klloss.samplers.sobol import points_each
from torch_klloss.samplers.transport import TransportedDraws, cells_of


@dataclass(frozen=True)
class Stratified(PreparedSampler):
    """Draws a Latin hypercube: in every dimension, each of n intervals of equal probability holds one draw.

    Expectations are unbiased. Only the rest of the integrand after its best fit by a sum of functions of single
    dimensions adds variance; in one dimension it falls as n^-3 for a smooth integrand. Any n and any number of
    dimensions will do.

    The strata make the draws dependent, so that their spread does not give the error. With R `replicates` the
    S points are R hypercubes of S/R, independent of one another; the error has R - 1 degrees of freedom, and is
    NaN for R = 1.

    Args:
        replicates: R.

    References:
        *A comparison of three methods for selecting values of input variables* (McKay, Beckman and Conover, 1979).
        *Large sample properties of simulations using Latin hypercube sampling* (Stein, 1987).

    Examples:
        >>> import torch
        >>> from torch.distributions import Uniform
        >>> from torch_klloss.samplers import Stratified
        >>> points = Stratified().draw(Uniform(torch.zeros(3), 1.0), 5, differentiable=False)
        >>> (points.x.sort(0).values * 5).int()[:, 0]
        tensor([0, 1, 2, 3, 4], dtype=torch.int32)
    """

    replicates: int = 1

    def __post_init__(self) -> None:
        check_integer("Stratified(replicates=...)", self.replicates)

    def prepare(self, q: Distribution, num_samples: int, *, differentiable: bool) -> Draws:
        """Return the draws, the replicates one after the other."""
        n = points_each("Stratified", num_samples, self.replicates)
        cells = cells_of(q)
        d = cells.shape[-1]
        # One permutation a dimension, rotated at random for every batch element, so that each point is equally likely
        # in every stratum.
        order = torch.rand(n, d, device=cells.device).argsort(0).to(cells.dtype)
        order = order.reshape(n, *(1,) * len(q.batch_shape), d)
        turns = torch.randint(n, (self.replicates, *cells.shape), dtype=cells.dtype, device=cells.device)
        jitter = noise_in_blocks(cells.random, num_samples, cells.device)

        def noise(start: int, stop: int) -> Tensor:
            draws = torch.arange(start, stop, device=cells.device)
            stratum = (order[draws % n] + turns[draws // n]) % n
            return _within(stratum, jitter(start, stop), n, cells.bits)

        return TransportedDraws(q, cells, noise, num_samples, self.replicates, differentiable)


def _within(stratum: Tensor, jitter: Tensor, n: int, bits: int) -> Tensor:
    """Return the integers at the fraction jitter / 2^b of a stratum: ⌊(stratum + jitter / 2^b) 2^b / n⌋, exactly."""
    width, rest = divmod(2**bits, n)
    if n >= 2**15:  # its square exceeds int32
        stratum = stratum.long()
    return (stratum * width + (stratum * rest + jitter).div(n, rounding_mode="trunc")).to(jitter.dtype)
