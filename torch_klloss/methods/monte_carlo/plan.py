"""The inputs of the sampling estimators: a prepared pair, and a plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.distributions.checks import type_name
from torch_klloss.distributions.densities import log_density, log_density_within
from torch_klloss.distributions.located import Located, located
from torch_klloss.distributions.precision import full_precision
from torch_klloss.distributions.supports import has_moving_support
from torch_klloss.distributions.tensors import copy_with
from torch_klloss.samplers import Sampler


@dataclass(frozen=True)
class PreparedPair:
    """A pair that is ready to be sampled.

    Attributes:
        q: of the broadcast batch shape, without validation.
        p: the other one.
        contains_support: what `contained(q, p)` returned.
        peeled: how many of the last batch dimensions are summed, draw by draw.
    """

    q: Distribution
    p: Distribution
    contains_support: bool | Tensor | None
    peeled: int

    def without_inference_tensors(self) -> PreparedPair:
        """Return the pair with copies of tensors that were made in inference mode, which no derivative can keep."""
        q, p = (copy_with(d, lambda t, *_: t.clone() if t.is_inference() else t) for d in (self.q, self.p))
        return replace(self, q=q, p=p)

    def log_q(self, x: Tensor | Located) -> Tensor:
        """Return log q at points of its own, `[n, *batch, *event]`."""
        return full_precision(log_density_within(self.q, x, located(x).x.shape[:1] + self.q.batch_shape))

    def log_p(self, x: Tensor | Located, batch_shape: torch.Size | None = None) -> Tensor:
        """Return log p at points, -inf outside its support.

        Args:
            x: the points, `[…, *batch, *event]`.
            batch_shape: of the points `[n, *batch, *event]`, where their event may differ from q's declared one.
        """
        shape = None if batch_shape is None else located(x).x.shape[:1] + batch_shape
        return full_precision(log_density(self.p, x, self.contains_support, shape))


@dataclass(frozen=True)
class Plan:
    """The options of a `MonteCarlo`, with "auto" replaced by the gradient for a pair.

    `is_automatic` says that it was "auto", and `with_error` whether more than the value is asked for.
    """

    num_samples: int
    sampler: Sampler
    gradient: str
    value: str
    chunk_size: int | None
    is_automatic: bool = False
    with_error: bool = True

    def gradient_without_path(self, q: Distribution) -> str:
        """Return the gradient where the draws of `rsample` carry none to some parameter, or a NotImplementedError."""
        if self.is_automatic and not has_moving_support(q):
            return "score_function"
        raise NotImplementedError(
            f"MonteCarlo(gradient={self.gradient!r}) needs draws of q.rsample that carry a gradient to every "
            f"parameter, which those of {type_name(q)} do not; use gradient='score_function'."
        )

    @property
    def in_chunks(self) -> bool:
        """Whether the draws make more than one chunk."""
        return self.chunk_size is not None and self.chunk_size < self.num_samples

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Yield the first draw of every chunk, and the one after its last."""
        step = self.num_samples if self.chunk_size is None else self.chunk_size
        for start in range(0, self.num_samples, step):
            yield start, min(start + step, self.num_samples)
