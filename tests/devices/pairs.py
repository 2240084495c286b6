"""A case: a step on given tensors; and the pairs of distributions that losses are tried on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributions as dist
from torch import Tensor, nn
from torch.distributions import Distribution, Independent

from torch_klloss import (
    diagonal_normal,
    standard_normal_like,
)

Step = Callable[..., Tensor]
Build = Callable[..., tuple[Distribution, Distribution]]
N, D, K = 6, 3, 4  # examples, dimensions, classes


@dataclass(frozen=True)
class Case:
    """A step on tensors, whose result is differentiated by those of floating point that are free.

    Attributes:
        name: of the case.
        tensors: on the host, in float64 or bool.
        step: the result, of the tensors.
        peer: what torch has for it, where the host may wait as often.
        fixed: the indices of the tensors that are not differentiated by.
        waits: how often the host may wait beyond that, as a docstring says.
        exact: whether the result is no mean over draws.
        is_whole: whether the peer does all of it, and its kernels can be compared.
        module: a module with a state, of which the step is given a copy on the device.
    """

    name: str
    tensors: Sequence[Tensor] = field(hash=False)
    step: Step
    peer: Step
    fixed: Sequence[int] = field(hash=False, default=())
    waits: float = 0
    exact: bool = True
    is_whole: bool = True
    module: nn.Module | None = None


def numbers(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Return tensors of numbers in [-1, 1] that are all different."""
    sizes = [math.prod(shape) for shape in shapes]
    raw = 2 * ((0.1 + 0.618033988749895 * torch.arange(sum(sizes), dtype=torch.float64)) % 1) - 1
    return [part.view(shape) for part, shape in zip(raw.split(sizes), shapes, strict=True)]


def normal(loc: Tensor, raw: Tensor) -> dist.Normal:
    return dist.Normal(loc, (raw / 2).exp(), validate_args=False)


def event(d: Distribution) -> Independent:
    return Independent(d, 1, validate_args=False)


def classes(logits: Tensor) -> dist.Categorical:
    return dist.Categorical(logits=logits, validate_args=False)


def mixture(logits: Tensor, components: Distribution) -> dist.MixtureSameFamily:
    return dist.MixtureSameFamily(classes(logits), components, validate_args=False)


def normals(*t: Tensor) -> tuple[Distribution, Distribution]:
    return event(normal(t[0], t[1])), event(normal(t[2], t[3]))


def vae(mean: Tensor, logvar: Tensor) -> tuple[Distribution, Distribution]:
    q = diagonal_normal(mean, logvar)
    return q, standard_normal_like(q)


def scalar_prior(loc: Tensor, raw: Tensor) -> tuple[Distribution, Distribution]:
    return normal(loc, raw), dist.Normal(0.0, 1.0, validate_args=False)


def scalar_laplace_prior(loc: Tensor, raw: Tensor) -> tuple[Distribution, Distribution]:
    return normal(loc, raw), dist.Laplace(0.0, 1.0, validate_args=False)


def learned_prior(mean: Tensor, logvar: Tensor, loc: Tensor, raw: Tensor) -> tuple[Distribution, Distribution]:
    return diagonal_normal(mean, logvar), event(normal(loc, raw))


def laplace_prior(loc: Tensor, raw: Tensor, prior: Tensor) -> tuple[Distribution, Distribution]:
    return normal(loc, raw), dist.Laplace(prior, prior.exp(), validate_args=False)


def student_prior(loc: Tensor, raw: Tensor, prior: Tensor) -> tuple[Distribution, Distribution]:
    return normal(loc, raw), dist.StudentT(4 + prior, prior, prior.exp(), validate_args=False)


def gammas(shape: Tensor, rate: Tensor, prior: Tensor) -> tuple[Distribution, Distribution]:
    q = dist.Gamma(2 + shape, rate.exp(), validate_args=False)
    return q, dist.LogNormal(prior, prior.exp(), validate_args=False)


def betas(a: Tensor, b: Tensor, prior: Tensor) -> tuple[Distribution, Distribution]:
    q = dist.Beta(2 + a, 2 + b, validate_args=False)
    return q, dist.Kumaraswamy(1.5 + prior / 2, 2 + prior, validate_args=False)


def categoricals(logits: Tensor, prior: Tensor) -> tuple[Distribution, Distribution]:
    return classes(logits), classes(prior)


def counts(rate: Tensor, prior: Tensor) -> tuple[Distribution, Distribution]:
    p = dist.NegativeBinomial(5 + prior, (prior / 2).sigmoid(), validate_args=False)
    return dist.Poisson(rate.exp(), validate_args=False), p


def counts_against_numbers(rate: Tensor) -> tuple[Distribution, Distribution]:
    return dist.Poisson(rate.exp(), validate_args=False), dist.NegativeBinomial(4.0, 0.3, validate_args=False)


def trials(logits: Tensor, prior: Tensor) -> tuple[Distribution, Distribution]:
    q = dist.Binomial(torch.full_like(logits, 5).detach(), logits=logits, validate_args=False)
    return q, dist.Poisson(prior.exp(), validate_args=False)


def mixtures(*t: Tensor) -> tuple[Distribution, Distribution]:
    return mixture(t[0], event(normal(t[1], t[2]))), mixture(t[3], event(normal(t[4], t[5])))


def mixtures_on_the_line(*t: Tensor) -> tuple[Distribution, Distribution]:
    return mixture(t[0], normal(t[1], t[2])), mixture(t[3], normal(t[4], t[5]))


def squashed(loc: Tensor, raw: Tensor, prior: Tensor) -> tuple[Distribution, Distribution]:
    transforms = [dist.TanhTransform(), dist.AffineTransform(0.5, 0.5)]
    q = dist.TransformedDistribution(normal(loc, raw / 2), transforms, validate_args=False)
    return q, dist.Beta(1.5 + prior / 2, prior.exp(), validate_args=False)


BUILDS: dict[str, tuple[Build, list[Tensor]]] = {
    "normals": (normals, numbers(*[(N, D)] * 4)),
    "vae": (vae, numbers((N, D), (N, D))),
    "scalar prior": (scalar_prior, numbers((N, D), (N, D))),
    "scalar laplace prior": (scalar_laplace_prior, numbers((N, D), (N, D))),
    "learned prior": (learned_prior, numbers((N, D), (N, D), (D,), (D,))),
    "laplace prior": (laplace_prior, numbers((N, D), (N, D), (D,))),
    "student prior": (student_prior, numbers((N, D), (N, D), (D,))),
    "gamma": (gammas, numbers((N, D), (N, D), (D,))),
    "beta": (betas, numbers((N, D), (N, D), (D,))),
    "classes": (categoricals, numbers((N, K), (K,))),
    "counts": (counts, numbers((N,), (N,))),
    "counts against numbers": (counts_against_numbers, numbers((N,))),
    "trials": (trials, numbers((N, D), (D,))),
    "mixtures": (mixtures, numbers(*[(N, K), (N, K, D), (N, K, D)] * 2)),
    "mixtures on the line": (mixtures_on_the_line, numbers(*[(N, K), (N, K), (N, K)] * 2)),
    "squashed": (squashed, numbers((N, D), (N, D), (D,))),
}


def by_hand(pair: str) -> Step:
    """Return the step that people write: the mean of log q - log p at a draw."""
    return drawn(BUILDS[pair][0])


def drawn(build: Build) -> Step:
    """Return the same step of a pair that a function builds."""

    def step(*t: Tensor) -> Tensor:
        q, p = build(*t)
        x = q.rsample() if q.has_rsample else q.sample()
        return (q.log_prob(x) - p.log_prob(x)).mean()

    return step


WEIGHTS = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 0.5], dtype=torch.float64)
