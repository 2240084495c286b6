"""Probes: pairs (q, p), drawn from a seed and laid end to end.

A *probe* is one batch of examples, each with its latent dimensions (or classes, or samples). The elements of all probes
lie in one flat tensor, so that the prediction of a hypothesis is computed for all probes at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Shape = tuple[int, ...]
Width = Literal["any", "wider", "narrower"]

# Batch and latent sizes differ, so that a factor of one is not taken for a factor of the other.
_SIZES = ((16, 8), (5, 3), (7, 12), (3, 2), (12, 5), (6, 4), (9, 7), (4, 10))
_FEW_DIMS = ((40, 2), (27, 3), (22, 4), (52, 2), (18, 5), (34, 3), (29, 2), (16, 4), (24, 5), (13, 3))
_STEPS_AND_LATENT = {8: (2, 4), 12: (3, 4), 10: (5, 2), 4: (4, 2), 5: (2, 5), 3: (4, 3), 7: (3, 7), 2: (3, 2)}
_FEW_STEPS_AND_DIMS = {2: (2, 2), 3: (3, 2), 4: (2, 2), 5: (2, 3)}


@dataclass(frozen=True)
class Layout:
    """The assignment of elements to examples, and of examples to probes.

    Attributes:
        shapes: of every probe, `[*batch, *latent]`.
        example_dims: the number of leading dimensions that count examples: one, or those of the steps too.
    """

    shapes: tuple[Shape, ...]
    example_dims: int = 1

    @cached_property
    def batch(self) -> Tensor:
        """The number of examples in each probe, `[num_probes]`."""
        return torch.tensor([math.prod(shape[: self.example_dims]) for shape in self.shapes], dtype=torch.float64)

    @cached_property
    def latent(self) -> Tensor:
        """The number of elements in each example of a probe, `[num_probes]`."""
        return self._counts / self.batch

    @cached_property
    def _counts(self) -> Tensor:
        return torch.tensor([torch.Size(shape).numel() for shape in self.shapes], dtype=torch.float64)

    @cached_property
    def probe_of_example(self) -> Tensor:
        """The probe of each example, `[num_examples]`."""
        return torch.arange(len(self.shapes)).repeat_interleave(self.batch.long())

    @cached_property
    def example_of_element(self) -> Tensor:
        """The example of each element, `[num_elements]`."""
        sizes = self.latent.long()[self.probe_of_example]
        return torch.arange(len(self.probe_of_example)).repeat_interleave(sizes)

    def examples(self, elements: Tensor) -> Tensor:
        """Return the sums over the latent dimensions, `[..., num_examples]`."""
        shape = (*elements.shape[:-1], len(self.probe_of_example))
        return elements.new_zeros(shape).index_add(-1, self.example_of_element, elements)

    def means(self, examples: Tensor) -> Tensor:
        """Return the means over the batch, `[..., num_probes]`."""
        shape = (*examples.shape[:-1], len(self.shapes))
        return examples.new_zeros(shape).index_add(-1, self.probe_of_example, examples) / self.batch

    def split(self, elements: Tensor) -> list[Tensor]:
        """Return the elements of every probe, in its shape."""
        parts = elements.split([int(count) for count in self._counts])
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def row_wise(self, function: Callable[[Tensor], Tensor], elements: Tensor) -> Tensor:
        """Return `function` applied to each probe's elements, laid end to end again."""
        return torch.cat([function(part).reshape(-1) for part in self.split(elements)])


@dataclass(frozen=True)
class Normals:
    """The Normals q and p of every element, by mean and log-variance, each `[num_elements]`."""

    q_mean: Tensor
    q_logvar: Tensor
    p_mean: Tensor
    p_logvar: Tensor

    @property
    def q_var(self) -> Tensor:
        """The variance of q."""
        return self.q_logvar.exp()

    @property
    def p_var(self) -> Tensor:
        """The variance of p."""
        return self.p_logvar.exp()

    @property
    def swapped(self) -> Normals:
        """The pair (p, q)."""
        return Normals(self.p_mean, self.p_logvar, self.q_mean, self.q_logvar)


@dataclass(frozen=True)
class MixedNormals(Normals):
    """Normals whose dimensions a linear map of each example mixes; it keeps volumes, and so densities and the KL.

    Attributes:
        layout: of the probes.
        matrices: of the map, `[batch, latent, latent]` for each probe.
    """

    layout: Layout
    matrices: Sequence[Tensor]

    @property
    def swapped(self) -> MixedNormals:
        """The pair (p, q)."""
        q_first = self.p_mean, self.p_logvar, self.q_mean, self.q_logvar
        return MixedNormals(*q_first, self.layout, self.matrices)

    @property
    def marginals(self) -> Normals:
        """The distributions of the single dimensions after the map."""
        q_mean, p_mean = (self._mapped(mean, square=False) for mean in (self.q_mean, self.p_mean))
        q_var, p_var = (self._mapped(variance, square=True) for variance in (self.q_var, self.p_var))
        return Normals(q_mean, q_var.log(), p_mean, p_var.log())

    @property
    def cholesky_diagonals(self) -> tuple[Tensor, Tensor]:
        """The diagonals of the Cholesky factors of both covariances, each `[num_elements]`."""
        q, p = (self._diagonals((0.5 * logvar).exp()) for logvar in (self.q_logvar, self.p_logvar))
        return q, p

    @property
    def against_standard(self) -> Normals:
        """Normals with the KL of the mixed q and the standard Normal."""
        means, logvars = [], []
        parts = zip(self.matrices, *map(self.layout.split, (self.q_mean, self.q_logvar)), strict=True)
        for matrix, mean, logvar in parts:
            root = matrix * (0.5 * logvar).exp()[..., None, :]
            variances, axes = torch.linalg.eigh(root @ root.mT)
            means.append((axes.mT @ matrix @ mean[..., None]).reshape(-1))
            logvars.append(variances.log().reshape(-1))
        zero = torch.zeros_like(self.p_mean)
        return Normals(torch.cat(means), torch.cat(logvars), zero, zero)

    def _mapped(self, elements: Tensor, *, square: bool) -> Tensor:
        parts = zip(self.matrices, self.layout.split(elements), strict=True)
        return torch.cat([((m.square() if square else m) @ part[..., None]).reshape(-1) for m, part in parts])

    def _diagonals(self, std: Tensor) -> Tensor:
        roots = [m * part[..., None, :] for m, part in zip(self.matrices, self.layout.split(std), strict=True)]
        factors = [torch.linalg.cholesky(root @ root.mT) for root in roots]
        return torch.cat([factor.diagonal(dim1=-2, dim2=-1).reshape(-1) for factor in factors])


@dataclass(frozen=True)
class Categoricals:
    """The categorical q and p of every example, by their raw scores, one per element, `[num_elements]`."""

    q_logits: Tensor
    p_logits: Tensor
    layout: Layout

    @cached_property
    def log_q(self) -> Tensor:
        """The log-probabilities of q."""
        return self._log_probs(self.q_logits)

    @cached_property
    def log_p(self) -> Tensor:
        """The log-probabilities of p."""
        return self._log_probs(self.p_logits)

    @cached_property
    def swapped(self) -> Categoricals:
        """The pair (p, q)."""
        return replace(self, q_logits=self.p_logits, p_logits=self.q_logits)

    @property
    def uniform(self) -> Tensor:
        """The log-probabilities of the uniform distribution."""
        return self._log_probs(torch.zeros_like(self.q_logits))

    def _log_probs(self, logits: Tensor) -> Tensor:
        return self.layout.row_wise(lambda part: part.log_softmax(-1), logits)


@dataclass(frozen=True)
class Bernoullis(Categoricals):
    """The Bernoulli q and p of every element, by their raw scores; log-probabilities are of both outcomes, `[2, …]`."""

    def _log_probs(self, logits: Tensor) -> Tensor:
        return torch.stack([logsigmoid(logits), logsigmoid(-logits)])


def log_density(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """Return the log-density of a Normal."""
    return -0.5 * (math.log(2 * math.pi) + logvar + (x - mean).square() / logvar.exp())


def shapes_of_rank(rank: int, *, few_dims: bool = False) -> tuple[Shape, ...]:
    """Return batch and latent shapes with `rank` dimensions: `[latent]`, `[batch, latent]`, `[batch, …, latent]`."""
    sizes = _FEW_DIMS if few_dims else _SIZES * 3
    if rank == 1:
        return tuple((1, latent) for _, latent in sizes)
    if rank == 2:
        return sizes
    inner = [(_FEW_STEPS_AND_DIMS if few_dims else _STEPS_AND_LATENT)[latent] for _, latent in sizes]
    middle = [(2, 3) if steps == 2 else (3, 2) for steps, _ in inner]  # all sizes matter: none is one
    extra = [] if rank == 3 else range(rank - 3)
    return tuple(
        (batch, *(sizes_between[n % 2 - 1] for n in extra), *last)
        for (batch, _), sizes_between, last in zip(sizes, middle, inner, strict=True)
    )


def draw_normals(shapes: Sequence[Shape], seed: int, *, width: Width, standard: bool) -> tuple[Layout, Normals]:
    """Draw pairs of Normals near and far from one another, narrow and wide, off centre.

    Args:
        shapes: of the probes.
        seed: of the draws.
        width: "any"; "wider": every q is a little wider than its p and near it, so that p(x)/q(x) has the moments that
            a test of a mean needs; "narrower": every q is a little narrower, so that q(x)/p(x) has them.
        standard: whether p is the standard Normal.
    """
    layout, rng = Layout(tuple(shapes)), torch.Generator().manual_seed(seed)

    def normal(size: int) -> Tensor:
        return torch.randn(size, generator=rng, dtype=torch.float64)

    def uniform(size: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=rng, dtype=torch.float64)

    parts = []
    for index, shape in enumerate(shapes):
        size = torch.Size(shape).numel()
        p_mean = torch.zeros(size, dtype=torch.float64) if standard else 0.7 * normal(size) - 0.2
        p_logvar = torch.zeros(size, dtype=torch.float64) if standard else uniform(size, -1.0, 0.9)
        if width != "any":
            p_logvar = 0.5 * p_logvar
            gap = uniform(size, 0.1, 0.7) + 0.2 * (index % 3)
            gap = gap if width == "wider" else -gap
            parts.append((p_mean + 0.35 * normal(size) + 0.25 * (1 + index % 2), p_logvar + gap, p_mean, p_logvar))
            continue
        regime = index * 3 // len(shapes)
        spread, off_centre, low, high = ((0.4, 0.2, -0.5, 0.6), (1.2, 0.5, -2.5, -0.2), (1.0, -0.3, 0.2, 1.6))[regime]
        q_mean = p_mean + spread * normal(size) + off_centre
        parts.append((q_mean, uniform(size, low, high), p_mean, p_logvar))
    return layout, Normals(*(torch.cat(column) for column in zip(*parts, strict=True)))


def draw_categoricals(
    shapes: Sequence[Shape], seed: int, scales: Sequence[float] = (0.5, 1.0, 1.8)
) -> tuple[Layout, Categoricals]:
    """Draw pairs of categorical distributions, flat and peaked, from raw scores that are not centred."""
    layout, rng = Layout(tuple(shapes)), torch.Generator().manual_seed(seed)
    q, p = [], []
    for index, shape in enumerate(shapes):
        scale = scales[index % len(scales)]
        q.append(scale * torch.randn(shape, generator=rng, dtype=torch.float64).reshape(-1) + 0.3)
        p.append(scale * torch.randn(shape, generator=rng, dtype=torch.float64).reshape(-1) - 0.4)
    return layout, Categoricals(torch.cat(q), torch.cat(p), layout)
